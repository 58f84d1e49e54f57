"""The command line: `ldm PROMPT`, or `ldm COMMAND …`; `python -m ldm` is the same."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for wrong input, told in one line on standard error, or 1 for a file in
    which `inspect` finds damage, NaN or code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv and argv[0] in COMMANDS else "generate"
    if name != "generate":
        argv = argv[1:]
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    parser = argparse.ArgumentParser(prog="ldm" if name == "generate" else f"ldm {name}", description=COMMANDS[name].__doc__)
    try:
        return COMMANDS[name](parser, argv) or 0
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def generate(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """Make pictures of a prompt. (Also: ldm replay, models, train, export, assemble, grid, inspect. `--` before a prompt that is such a word.)"""
    from ldm.images import check_writable

    parser.add_argument("prompt", help="what to show; an empty text is unconditional")
    parser.add_argument("-o", "--output", default="ldm.png", help="the PNG to write (default: %(default)s)")
    parser.add_argument("--n", type=int, help="how many pictures (default: the model's, 1 or, of unCLIP, 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture; the next has the next (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: the model's)")
    parser.add_argument("--negative", default="", help="what not to show")
    parser.add_argument("--sampler", help="sampling method (default: the model's)")
    grid_options(parser)
    parser.add_argument("--size", type=size, help="SIDE or WIDTHxHEIGHT in pixels (default: the model's)")
    parser.add_argument("--separate", action="store_true", help="one file a picture, named by seed, in place of a grid")
    model_options(parser)
    args = parser.parse_args(argv)
    check_writable(args.output)
    pipe = load(args)
    if not hasattr(pipe, "text_to_image"):
        raise ValueError(f"{args.model!r} makes no pictures of texts: it is one network alone")
    width, height = args.size or (None, None)
    images = pipe.text_to_image(
        args.prompt, n=args.n, seed=args.seed, steps=args.steps, guidance=args.guidance, negative=args.negative, sampler=args.sampler,
        height=height, width=width, convention=args.convention, spacing=args.spacing,
    )  # fmt: skip
    if images.flagged is not None and any(images.flagged):
        seeds = ", ".join(str(seed) for seed, flag in zip(images.seeds, images.flagged, strict=True) if flag)
        print(f"warning: the safety checker flagged the pictures of seeds {seeds}", file=sys.stderr)
    for path in images.save(args.output, separate=args.separate):
        print(path)
    return None


def replay(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """Make a picture again from the recipe in its PNG, bit for bit on the same machine."""
    from ldm.images import check_writable, read_recipe
    from ldm.replay import replay as again

    parser.add_argument("picture", help="a PNG that ldm has written")
    parser.add_argument("-o", "--output", help="where to write it (default: NAME-replay.png)")
    parser.add_argument("--weights", help="weights in place of the embedded ones, if the picture was made with such")
    args = parser.parse_args(argv)
    recipe = read_recipe(args.picture)
    output = check_writable(args.output or f"{args.picture.removesuffix('.png')}-replay.png")
    images = again(recipe, weights=args.weights)
    for path in images.save(output):
        print(path)
    return None


def models(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """List the models that can be loaded by name."""
    from ldm.cards import find_card
    from ldm.registry import list_models

    parser.parse_args(argv)
    for name in list_models():
        print(f"{name}: {find_card(name)[0].summary}")
    return None


def train(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """Train a part by its configuration; a run that was interrupted goes on from its last checkpoint."""
    parser.add_argument("config", help="a YAML file, such as configs/emoji-vae.yaml")
    parser.add_argument("--runs", default="runs", help="the folder of runs (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to train (default: %(default)s)")
    parser.add_argument("--until", type=int, help="stop, with a checkpoint, at this step")
    args = parser.parse_args(argv)
    from ldm.training.run import open_run

    run = open_run(args.config, runs=args.runs, device=args.device)
    try:
        run.train(until=args.until)
    except KeyboardInterrupt:
        print(f"interrupted at step {run.step}; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if run.step == run.config.steps:
        run.export(run.folder / "export")
        print(run.folder / "export")
    return None


def export(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """Write the averaged weights of a run, finished or not, as half-precision files."""
    from pathlib import Path

    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("--to", help="the folder to write into (default: RUN/export)")
    parser.add_argument("--runs", default="runs", help="the folder of runs (default: %(default)s)")
    args = parser.parse_args(argv)
    from ldm.training.run import open_run

    run = open_run(args.config, runs=args.runs)
    if run.step == 0:
        raise ValueError(f"{args.config!r}: the run {run.config.name!r} has no checkpoint; train it first")
    folder = Path(args.to) if args.to else run.folder / "export"
    run.export(folder)
    print(folder)
    return None


def assemble(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """Make the folder of an unCLIP model from its card and the exports of its trainings."""
    parser.add_argument("card", help="a YAML file such as configs/cards/emoji-unclip.yaml: the card, and where each part was exported to")
    parser.add_argument("folder", help="the folder to write, which --weights and ldm.load take")
    args = parser.parse_args(argv)
    from ldm.pipelines.unclip_gather import gather

    print(gather(args.card, args.folder))
    return None


def grid(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """Print what a sampler will do: t, alpha-bar, sigma/alpha, lambda, evaluations."""
    from ldm.cards import find_model
    from ldm.conventions import get_convention
    from ldm.plan import describe

    parser.add_argument("--model", default="emoji-ldm", help="the model whose schedule and conventions count (default: %(default)s)")
    parser.add_argument("--sampler", help="sampling method (default: the model's)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    grid_options(parser)
    args = parser.parse_args(argv)
    card = find_model(args.model)
    rules = get_convention(args.convention) if args.convention else card.grids()
    changes = {"spacing": args.spacing} if args.spacing else {}
    sampler, steps = args.sampler or card.defaults.sampler, card.defaults.steps if args.steps is None else args.steps
    print(describe(rules.grid(card.schedule.make(), steps, sampler, **changes), sampler, **rules.options.get(sampler, {})))
    return None


def inspect(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """Tell what is in a file of weights, from its headers alone; nothing in it is executed."""
    from ldm.inspect import inspect as look

    parser.add_argument("path", help="a .safetensors, .ckpt or .pt file, or a folder")
    parser.add_argument("--nan", action="store_true", help="look for NaN and infinity, which reads every tensor")
    parser.add_argument("--no-hash", action="store_true", help="leave the SHA-256 out, which reads every byte")
    args = parser.parse_args(argv)
    report = look(args.path, nan=args.nan, digest=not args.no_hash)
    print(report.text())
    return 1 if report.unsafe or report.bad or not report.parts else None


Command = Callable[[argparse.ArgumentParser, Sequence[str]], "int | None"]
COMMANDS: dict[str, Command] = {
    "generate": generate, "replay": replay, "models": models, "train": train, "export": export, "assemble": assemble, "grid": grid,
    "inspect": inspect,
}  # fmt: skip


def model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model, and where it runs."""
    parser.add_argument("--model", help="the model's name; `ldm models` lists them (default: that of the folder of weights, else emoji-ldm)")
    parser.add_argument("--weights", help="a single file, a folder of diffusers, one that ldm.save wrote, or `random`; in place of the model's own")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the fastest that is safe)")
    parser.add_argument("--variant", help="of a folder's files, such as fp16")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help="the averaged weights of a file that has both (default: if it has them)")
    parser.add_argument("--prediction", choices=("eps", "v"), help="what the network predicts, where keys cannot tell (default: the model's)")
    parser.add_argument("--safety", help="the safety checker's file or folder; flagged pictures are named on standard error")
    parser.add_argument("--black", action="store_true", help="make flagged pictures black")


def grid_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how the timesteps are laid."""
    parser.add_argument("--convention", help="lay the grid, start and draw noise as diffusers, compvis, sgm or k does (default: the model's)")
    parser.add_argument("--spacing", help="leading, trailing, linspace, karras, lambda, … in place of the convention's; a wrong name lists all")


def load(args: argparse.Namespace) -> Any:
    """The model that the options name."""
    from ldm.registry import load as load_model

    return load_model(
        args.model, weights=args.weights, device=args.device, dtype=args.dtype, variant=args.variant, ema=args.ema, prediction=args.prediction,
        safety=args.safety, black=args.black,
    )  # fmt: skip


def size(text: str) -> tuple[int, int]:
    """SIDE or WIDTHxHEIGHT as (width, height)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r}: expected SIDE or WIDTHxHEIGHT in pixels, such as 128 or 128x192")
    return int(sides[0]), int(sides[-1])


if __name__ == "__main__":
    sys.exit(main())
