"""The command line: `ldm PROMPT`, or `ldm COMMAND …`; `python -m ldm` is the same."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from ldm.cli.options import grid_options
from ldm.cli.tasks import TASKS, generate


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for wrong input, told in one line on standard
    error, or 1 for a file in which `inspect` finds damage, NaN or code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv and argv[0] in COMMANDS else "generate"
    if name != "generate":
        argv = argv[1:]
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    parser = argparse.ArgumentParser(
        prog="ldm" if name == "generate" else f"ldm {name}", description=COMMANDS[name].__doc__
    )
    try:
        return COMMANDS[name](parser, argv) or 0
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def replay(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """Make a picture again from the recipe in its PNG, bit for bit on the same machine."""
    from ldm.images.files import check_writable, read_recipe
    from ldm.registry.replaying import replay as again

    parser.add_argument("picture", help="a PNG that ldm has written")
    parser.add_argument("-o", "--output", help="where to write it (default: NAME-replay.png)")
    parser.add_argument(
        "--weights", help="weights in place of the embedded ones, if the picture was made with such"
    )
    args = parser.parse_args(argv)
    recipe = read_recipe(args.picture)
    output = check_writable(args.output or f"{args.picture.removesuffix('.png')}-replay.png")
    images = again(recipe, weights=args.weights)
    for path in images.save(output):
        print(path)
    return None


def models(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """List the models that can be loaded by name."""
    from ldm.catalog.lookup import find_card
    from ldm.registry.names import list_models

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
        print(
            f"interrupted at step {run.step}; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
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
    parser.add_argument(
        "card",
        help=(
            "a YAML file such as configs/cards/emoji-unclip.yaml: the card, and where each part was"
            " exported to"
        ),
    )
    parser.add_argument("folder", help="the folder to write, which --weights and ldm.load take")
    args = parser.parse_args(argv)
    from ldm.registry.unclip.bundle import gather

    print(gather(args.card, args.folder))
    return None


def grid(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """Print what a sampler will do: t, alpha-bar, sigma/alpha, lambda, evaluations."""
    from ldm.analysis.plan import describe_grid
    from ldm.catalog.lookup import find_model
    from ldm.samplers.conventions import get_convention

    parser.add_argument(
        "--model",
        default="emoji-ldm",
        help="the model whose schedule and conventions count (default: %(default)s)",
    )
    parser.add_argument("--sampler", help="sampling method (default: the model's)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    grid_options(parser)
    args = parser.parse_args(argv)
    card = find_model(args.model)
    rules = get_convention(args.convention) if args.convention else card.grids()
    changes = {"spacing": args.spacing} if args.spacing else {}
    sampler, steps = (
        args.sampler or card.defaults.sampler,
        (card.defaults.steps if args.steps is None else args.steps),
    )
    print(
        describe_grid(
            rules.grid(card.schedule.make(), steps, sampler, **changes),
            sampler,
            **rules.options.get(sampler, {}),
        )
    )
    return None


def inspect(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int | None:
    """Tell what is in a file of weights, from its headers alone; nothing in it is executed."""
    from ldm.registry.inspection import inspect as look

    parser.add_argument("path", help="a .safetensors, .ckpt or .pt file, or a folder")
    parser.add_argument(
        "--nan", action="store_true", help="look for NaN and infinity, which reads every tensor"
    )
    parser.add_argument(
        "--no-hash", action="store_true", help="leave the SHA-256 out, which reads every byte"
    )
    args = parser.parse_args(argv)
    report = look(args.path, nan=args.nan, digest=not args.no_hash)
    print(report.text())
    return 1 if report.unsafe or report.bad or not report.parts else None


Command = Callable[[argparse.ArgumentParser, Sequence[str]], "int | None"]
COMMANDS: dict[str, Command] = {
    "generate": generate,
    **TASKS,
    "replay": replay,
    "models": models,
    "train": train,
    "export": export,
    "assemble": assemble,
    "grid": grid,
    "inspect": inspect,
}


if __name__ == "__main__":
    sys.exit(main())
