"""The table of the commands that generate images: each is a method of a pipeline, with its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.cli.options import (
    BORDER,
    EXACT,
    IMAGE,
    IMAGE_PROMPT,
    IMAGE_SIZE,
    PROMPT,
    SAMPLING,
    TOKEN_OPTIONS,
    WINDOW,
)
from ldm.cli.parsing import Argument, CollectPairs, UsageError, argument, parse_emphasis, parse_text
from ldm.support.text import shown


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """One command that generates images.

    Args:
        name: Its name: that of the pipeline's method, with hyphens.
        summary: See `Command`.
        arguments: The method's own arguments, positional ones in its order.
        aliases: See `Command`. Default: none.
        details: See `Command`. Default: none.
        method: Name of the method, if it is not that of the command. Default: "".
        without: Sampling options that the method does not take, by name. Default: none.
        prepare: Converts the parsed arguments in place. Default: None.
        tables: Whether the prompts may come from a table (see `ldm.cli.tables`). Default: False.
    """

    name: str
    summary: str
    arguments: Sequence[Argument]
    aliases: Sequence[str] = ()
    details: str = ""
    method: str = ""
    without: Sequence[str] = ()
    prepare: Callable[[argparse.Namespace], None] | None = None
    tables: bool = False

    @property
    def method_name(self) -> str:
        """Return the name of the pipeline's method."""
        return self.method or self.name.replace("-", "_")

    @property
    def passed(self) -> tuple[Argument, ...]:
        """Return the arguments that are passed on to the method."""
        return (*self.arguments, *(each for each in SAMPLING if each.dest not in self.without))


def convert_ends(args: argparse.Namespace) -> None:
    """Convert A and B of `interpolate` to what `--between` says: prompts, seeds or image files."""
    if args.between == "seeds" and not (args.a.isdecimal() and args.b.isdecimal()):
        raise UsageError(f"A and B: expected seeds, whole numbers, got {shown(args.a)} and {shown(args.b)}")
    kinds: dict[str, Callable[[str], object]] = {"texts": parse_text, "seeds": int}
    kind = kinds.get(args.between, Path)
    args.a, args.b, args.between = kind(args.a), kind(args.b), None


def open_ranker(args: argparse.Namespace) -> None:
    """Replace the name of a CLIP in `--clip` by the CLIP."""
    if args.clip is None:
        return
    from ldm.analysis.metrics.features import ClipFeatures, open_features

    found = open_features(args.clip)
    if not isinstance(found, ClipFeatures):
        raise UsageError(f"--clip {shown(args.clip)}: expected a CLIP, got the features {found.name!r}")
    args.clip = found


def strength(help: str) -> Argument:
    """Return the option `--strength` with a help text."""
    return argument("--strength", help, type=float)


def margin(side: str) -> Argument:
    """Return the option of a side in `outpaint`."""
    return argument(f"--{side}", "pixels to add at this side (default: %(default)s)", type=int, default=0)


IMAGE_TASKS: tuple[ImageTask, ...] = (
    ImageTask(
        name="generate",
        summary="Generate images from a prompt.",
        aliases=("text-to-image",),
        details=(
            "`ldm PROMPT` is its short form. With --prompts and --out it generates a data set in WebDataset"
            " shards; under torchrun each process generates its share."
        ),
        arguments=(
            argument(PROMPT.name, PROMPT.help, **{**PROMPT.settings, "nargs": "?"}),
            IMAGE_SIZE,
            *TOKEN_OPTIONS,
        ),
        method="text_to_image",
        tables=True,
    ),
    ImageTask(
        name="image-to-image",
        summary="Generate images from a prompt and an initial image.",
        aliases=("image",),
        arguments=(
            PROMPT,
            IMAGE,
            strength("in [0, 1]: 0 keeps the image, 1 ignores it (default: 0.75)"),
        ),
    ),
    ImageTask(
        name="inpaint",
        summary="Repaint the masked part of an image.",
        details="All other pixels are preserved exactly.",
        arguments=(
            PROMPT,
            IMAGE,
            argument("mask", "an image file of the same size, white where to repaint", type=Path),
            strength("in [0, 1]: below 1 starts from what the mask hides (default: 1)"),
            *BORDER,
        ),
    ),
    ImageTask(
        name="outpaint",
        summary="Extend an image beyond its sides.",
        details="The given pixels are preserved exactly.",
        arguments=(
            PROMPT,
            IMAGE,
            *(margin(side) for side in ("left", "right", "top", "bottom")),
            *BORDER,
        ),
    ),
    ImageTask(
        name="variations",
        summary="Generate variations of an image.",
        aliases=("vary",),
        arguments=(
            IMAGE,
            IMAGE_PROMPT,
            strength("in [0, 1], latent diffusion only: 0 keeps the image, 1 ignores it (default: 0.6)"),
        ),
    ),
    ImageTask(
        name="interpolate",
        summary="Generate images between two prompts, seeds or images.",
        arguments=(
            argument("a", "the first endpoint"),
            argument("b", "the last endpoint"),
            argument(
                "--between",
                "what A and B are (default: %(default)s)",
                choices=("texts", "seeds", "images", "pictures"),
                default="texts",
                metavar="{texts,seeds,images}",
            ),
            argument(
                "--prompt", "what is shown between two seeds or images (default: no prompt)", type=parse_text
            ),
        ),
        prepare=convert_ends,
    ),
    ImageTask(
        name="edit",
        summary="Change an image that one prompt describes into another prompt.",
        details="The image is a file, which is inverted, or the one that the seed generates.",
        arguments=(
            argument("source", "what the image shows", type=parse_text),
            argument("prompt", "what the edited image shows", type=parse_text),
            argument("--image", "the image file (default: the image that the seed generates)", type=Path),
            strength("in (0, 1], with --image: less keeps more of the image (default: 0.8)"),
            argument(
                "--cross",
                "fraction of the steps with the source's attention to the common words (default: 0.8; 0 with"
                " --image)",
                type=float,
            ),
            argument(
                "--within",
                "fraction of the steps with the source's attention between positions (default: 0.4; 0 with"
                " --image)",
                type=float,
            ),
            argument(
                "--emphasis",
                "multiply the attention to a word by a factor; repeatable",
                type=parse_emphasis,
                action=CollectPairs,
                metavar="WORD=FACTOR",
            ),
            EXACT,
        ),
        without=("sampler",),
    ),
    ImageTask(
        name="reconstruct",
        summary="Invert an image to noise and generate it again.",
        arguments=(
            IMAGE,
            IMAGE_PROMPT,
            EXACT,
        ),
        without=("n", "sampler"),
    ),
    ImageTask(
        name="upscale",
        summary="Enlarge an image.",
        arguments=(
            IMAGE,
            IMAGE_PROMPT,
            argument("--factor", "enlargement (default: 2; upscalers have their own)", type=int),
            strength("in [0, 1]: how much is generated again (default: 0.3)"),
            argument("--noise-level", "noise added to an upscaler's input, 0 to 349 (default: 20)", type=int),
            WINDOW,
        ),
    ),
    ImageTask(
        name="depth-to-image",
        summary="Generate images from a prompt, an initial image and its depth map.",
        details="For models with a depth input, such as sd-v2-depth.",
        arguments=(
            PROMPT,
            IMAGE,
            argument("depth", "the file of the depth map, larger values being nearer", type=Path),
            strength("in [0, 1]: 0 keeps the image, 1 keeps only its depth (default: 0.8)"),
        ),
    ),
    ImageTask(
        name="instruct",
        summary="Change an image as an instruction says.",
        details="For InstructPix2Pix models.",
        arguments=(
            argument("prompt", "the instruction, such as `make it winter`", type=parse_text),
            IMAGE,
            argument("--image-guidance", "guidance scale of the image (default: 1.5)", type=float),
        ),
    ),
    ImageTask(
        name="class-to-image",
        summary="Generate images of a class.",
        details="For class-conditional models.",
        arguments=(
            argument("label", "number of the class", type=int),
            IMAGE_SIZE,
        ),
        without=("negative",),
    ),
    ImageTask(
        name="unconditional",
        summary="Generate images without a condition.",
        details="For unconditional models.",
        arguments=(IMAGE_SIZE,),
        without=("guidance", "negative"),
    ),
    ImageTask(
        name="text-difference",
        summary="Move an image along the difference of two texts.",
        details="For unCLIP models.",
        arguments=(
            IMAGE,
            argument("source", "what the image shows", type=parse_text),
            argument("target", "what the last image shows", type=parse_text),
            argument(
                "--most", "fraction of the arc, in [0, 1], of the last image (default: 0.5)", type=float
            ),
            argument(
                "--invert",
                "start from the image's inverted noise (default) or from the seed's",
                action=argparse.BooleanOptionalAction,
            ),
        ),
    ),
    ImageTask(
        name="rerank",
        summary="Generate many images and keep those most similar to the prompt.",
        details=(
            "For unCLIP models and DALL·E Mini; CLIP measures the similarity. The result cannot be replayed."
        ),
        arguments=(
            PROMPT,
            argument(
                "--clip",
                "the CLIP: emoji-clip, clip=FOLDER in Hugging Face's layout, or open_clip's NAME=FILE"
                " (default: the model's own; DALL·E Mini has none)",
                metavar="NAME[=PATH]",
            ),
            argument("--of", "number of images to generate (default: 16)", type=int),
            argument("--keep", "number of images to keep (default: 4)", type=int),
            IMAGE_SIZE,
            *TOKEN_OPTIONS,
        ),
        without=("n",),
        prepare=open_ranker,
    ),
)
