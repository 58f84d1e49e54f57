"""Options that several commands share, and what is done with them."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.images.result import Images

SAMPLING = ("n", "seed", "steps", "guidance", "negative", "sampler", "convention", "spacing")


def picture_options(parser: argparse.ArgumentParser, *without: str) -> None:
    """The options of every command that makes pictures, but for those ``without``."""
    parser.add_argument("-o", "--output", default="ldm.png", help="the PNG to write (default: %(default)s)")
    if "n" not in without:
        parser.add_argument("--n", type=int, help="how many pictures (default: the task's or the model's)")
    parser.add_argument(
        "--seed", type=int, help="seed of the first picture; the next has the next (default: 0)"
    )
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's; 50 of inversion)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: the model's)")
    parser.add_argument("--negative", help="what not to show")
    if "sampler" not in without:
        parser.add_argument("--sampler", help="sampling method (default: the model's)")
    grid_options(parser)
    parser.add_argument(
        "--separate", action="store_true", help="one file a picture, named by seed, in place of a grid"
    )
    model_options(parser)


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the sampling options, and of the options of these names, that were given."""
    return {
        name: getattr(args, name) for name in (*SAMPLING, *names) if getattr(args, name, None) is not None
    }


def write(images: Images, args: argparse.Namespace) -> None:
    """Write the pictures where the options say, and print the paths; flagged ones are named on standard
    error."""
    if images.flagged is not None and any(images.flagged):
        seeds = ", ".join(str(seed) for seed, flag in zip(images.seeds, images.flagged, strict=True) if flag)
        print(f"warning: the safety checker flagged the pictures of seeds {seeds}", file=sys.stderr)
    for path in images.save(args.output, separate=args.separate):
        print(path)


def model_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model, and where it runs."""
    parser.add_argument(
        "--model",
        help=(
            "the model's name; `ldm models` lists them (default: that of the folder of weights, else"
            " emoji-ldm)"
        ),
    )
    parser.add_argument(
        "--weights",
        help=(
            "a single file, a folder of diffusers, one that ldm.save wrote, or `random`; in place of the"
            " model's own"
        ),
    )
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the fastest that is safe)")
    parser.add_argument("--variant", help="of a folder's files, such as fp16")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the averaged weights of a file that has both (default: if it has them)",
    )
    parser.add_argument(
        "--prediction",
        choices=("eps", "v"),
        help="what the network predicts, where keys cannot tell (default: the model's)",
    )
    parser.add_argument(
        "--safety", help="the safety checker's file or folder; flagged pictures are named on standard error"
    )
    parser.add_argument("--black", action="store_true", help="make flagged pictures black")


def grid_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how the timesteps are laid."""
    parser.add_argument(
        "--convention",
        help="lay the grid, start and draw noise as diffusers, compvis, sgm or k does (default: the model's)",
    )
    parser.add_argument(
        "--spacing",
        help=(
            "leading, trailing, linspace, karras, lambda, … in place of the convention's; a wrong name"
            " lists all"
        ),
    )


def load(args: argparse.Namespace) -> Any:
    """The model that the options name."""
    from ldm.registry.loading import load as load_model

    return load_model(
        args.model,
        weights=args.weights,
        device=args.device,
        dtype=args.dtype,
        variant=args.variant,
        ema=args.ema,
        prediction=args.prediction,
        safety=args.safety,
        black=args.black,
    )


def size(text: str) -> tuple[int, int]:
    """SIDE or WIDTHxHEIGHT as (width, height)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected SIDE or WIDTHxHEIGHT in pixels, such as 128 or 128x192"
        )
    return int(sides[0]), int(sides[-1])
