"""The commands that make pictures: each is the method of a pipeline, with its options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm.cli.options import given, load, picture_options, size, write

Parser = argparse.ArgumentParser


def run(
    task: str,
    parser: Parser,
    argv: Sequence[str],
    arguments: Callable[[argparse.Namespace], Sequence[Any]],
    *options: str,
) -> None:
    """Parse, load the model that is asked for, call its method ``task`` with ``arguments`` and the
    ``options`` given, and write the pictures."""
    from ldm.images.files import check_writable

    args = parser.parse_args(argv)
    check_writable(args.output)
    positional = arguments(args)
    pipe = load(args)
    if not hasattr(pipe, task):
        alone = "" if hasattr(pipe, "text_to_image") else " of texts: it is one network alone"
        raise ValueError(f"{args.model!r} makes no pictures{alone or f' by {task}'}")
    width, height = getattr(args, "size", None) or (None, None)
    sizes = {name: side for name, side in (("width", width), ("height", height)) if side is not None}
    write(getattr(pipe, task)(*positional, **sizes, **given(args, *options)), args)


def generate(parser: Parser, argv: Sequence[str]) -> None:
    """Make pictures of a prompt. (Also: ldm inpaint, outpaint, vary, interpolate, edit, reconstruct, upscale,
    image, replay, models, train, export, grid, inspect, each with --help. `--` before a prompt that is one of
    these words.)"""
    parser.add_argument("prompt", help="what to show; an empty text is unconditional")
    parser.add_argument("--size", type=size, help="SIDE or WIDTHxHEIGHT in pixels (default: the model's)")
    picture_options(parser)
    run("text_to_image", parser, argv, lambda args: [args.prompt])


def image(parser: Parser, argv: Sequence[str]) -> None:
    """Make pictures of a prompt that begin from a picture."""
    parser.add_argument("prompt", help="what to show")
    parser.add_argument("image", help="the picture's file")
    parser.add_argument("--strength", type=float, help="0 keeps the picture, 1 ignores it (default: 0.75)")
    picture_options(parser)
    run("image_to_image", parser, argv, lambda args: [args.prompt, args.image], "strength")


def inpaint(parser: Parser, argv: Sequence[str]) -> None:
    """Make a part of a picture anew; all other pixels stay as they are."""
    parser.add_argument("prompt", help="what the picture shows")
    parser.add_argument("image", help="the picture's file")
    parser.add_argument("mask", help="a picture of the same size, white where to repaint")
    parser.add_argument(
        "--strength", type=float, help="less than 1 begins from what the mask hides (default: 1)"
    )
    border_options(parser)
    picture_options(parser)
    run("inpaint", parser, argv, lambda args: [args.prompt, args.image, args.mask], "strength", *BORDER)


def outpaint(parser: Parser, argv: Sequence[str]) -> None:
    """Continue a picture beyond its sides; its own pixels stay as they are."""
    parser.add_argument("prompt", help="what the whole picture shows")
    parser.add_argument("image", help="the picture's file")
    for side in SIDES:
        parser.add_argument(
            f"--{side}", type=int, default=0, help="pixels to add at this side (default: %(default)s)"
        )
    border_options(parser)
    picture_options(parser)
    run("outpaint", parser, argv, lambda args: [args.prompt, args.image], *SIDES, *BORDER)


def vary(parser: Parser, argv: Sequence[str]) -> None:
    """Make variations of a picture."""
    parser.add_argument("image", help="the picture's file")
    parser.add_argument("--prompt", help="what they show (default: not said)")
    parser.add_argument("--strength", type=float, help="0 keeps the picture, 1 ignores it (default: 0.6)")
    picture_options(parser)
    run("variations", parser, argv, lambda args: [Path(args.image)], "prompt", "strength")


def interpolate(parser: Parser, argv: Sequence[str]) -> None:
    """Make the pictures between two texts, two seeds or two pictures."""
    parser.add_argument("a", help="where to begin")
    parser.add_argument("b", help="where to end")
    parser.add_argument(
        "--between",
        choices=("texts", "seeds", "pictures"),
        default="texts",
        help="what A and B are (default: %(default)s)",
    )
    parser.add_argument("--prompt", help="what is shown between two seeds or pictures (default: not said)")
    picture_options(parser)

    def ends(args: argparse.Namespace) -> list[Any]:
        return [{"texts": str, "seeds": int, "pictures": Path}[args.between](end) for end in (args.a, args.b)]

    run("interpolate", parser, argv, ends, "prompt")


def edit(parser: Parser, argv: Sequence[str]) -> None:
    """Change a picture that one text describes into what another says: the picture of a file, by inversion,
    or the one that a seed makes."""
    parser.add_argument("source", help="what the picture shows")
    parser.add_argument("prompt", help="what it is to show")
    parser.add_argument(
        "--image", help="the picture's file (default: the picture that the seed makes of the source)"
    )
    parser.add_argument(
        "--strength", type=float, help="of the inversion: less keeps more of the picture (default: 0.8)"
    )
    parser.add_argument(
        "--cross",
        type=float,
        help="share of the run with the source's attention to the words of both (default: 0.8; 0 of a file)",
    )
    parser.add_argument(
        "--within",
        type=float,
        help="share of the run with the source's attention between positions (default: 0.4; 0 of a file)",
    )
    parser.add_argument(
        "--emphasis",
        type=emphasis,
        action=Gather,
        metavar="WORD=FACTOR",
        help="attend so many times as much to a word; repeatable",
    )
    inversion_options(parser)
    picture_options(parser, "sampler")
    run(
        "edit",
        parser,
        argv,
        lambda args: [args.source, args.prompt],
        "image",
        "strength",
        "cross",
        "within",
        "emphasis",
        "exact",
    )


def reconstruct(parser: Parser, argv: Sequence[str]) -> None:
    """Invert a picture to the noise that it comes from, and make it of that again."""
    parser.add_argument("image", help="the picture's file")
    parser.add_argument("--prompt", help="what it shows (default: not said)")
    inversion_options(parser)
    picture_options(parser, "n", "sampler")
    run("reconstruct", parser, argv, lambda args: [args.image], "prompt", "exact")


def upscale(parser: Parser, argv: Sequence[str]) -> None:
    """Enlarge a picture."""
    parser.add_argument("image", help="the picture's file")
    parser.add_argument("--prompt", help="what it shows (default: not said)")
    parser.add_argument("--factor", type=int, help="how many times (default: 2; upscalers have their own)")
    parser.add_argument("--strength", type=float, help="how much is made anew (default: 0.3)")
    parser.add_argument(
        "--noise-level",
        type=int,
        dest="noise_level",
        help="of upscalers: how much noise it is given, 0 to 349 (default: 20)",
    )
    parser.add_argument("--window", type=int, help="the side in pixels of what the network sees at a time")
    picture_options(parser)
    run(
        "upscale",
        parser,
        argv,
        lambda args: [args.image],
        "prompt",
        "factor",
        "strength",
        "noise_level",
        "window",
    )


def emphasis(text: str) -> tuple[str, float]:
    """WORD=FACTOR."""
    word, _, factor = text.partition("=")
    try:
        return word, float(factor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WORD=FACTOR, such as red=2") from None


class Gather(argparse.Action):
    """Gathers pairs in a mapping."""

    def __call__(
        self, parser: Parser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), values[0]: values[1]})


SIDES = ("left", "right", "top", "bottom")
BORDER = ("resample", "jump", "seam", "feather", "window")


def border_options(parser: Parser) -> None:
    """The options of what is made beside what is known."""
    parser.add_argument(
        "--resample", type=int, help="how often each stretch of steps is taken (RePaint; default: once)"
    )
    parser.add_argument("--jump", type=int, help="the steps of such a stretch (default: 5)")
    parser.add_argument(
        "--seam",
        type=float,
        help="pixels over which new and known are made to meet (default: an eighth of the model's side)",
    )
    parser.add_argument(
        "--feather",
        type=int,
        help="pixels inside the mask over which the old picture passes into the new (default: 0)",
    )
    parser.add_argument("--window", type=int, help="the side in pixels of what the network sees at a time")


def inversion_options(parser: Parser) -> None:
    """The option of how a picture is inverted."""
    parser.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        help="by two coupled tracks, which can be undone (default), or by DDIM",
    )


TASKS: dict[str, Callable[[Parser, Sequence[str]], None]] = {
    "image": image,
    "inpaint": inpaint,
    "outpaint": outpaint,
    "vary": vary,
    "interpolate": interpolate,
    "edit": edit,
    "reconstruct": reconstruct,
    "upscale": upscale,
}
