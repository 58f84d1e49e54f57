"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.parsing import argument, parse_adapter, parse_control, parse_size, parse_text

PROMPT = argument("prompt", "what the images show; an empty text is unconditional", type=parse_text)
IMAGE = argument("image", "the image file", type=Path)
IMAGE_PROMPT = argument("--prompt", "what the image shows (default: no prompt)", type=parse_text)
IMAGE_SIZE = argument("--size", "SIDE or WIDTHxHEIGHT in pixels (default: the model's)", type=parse_size)
WINDOW = argument("--window", "side in pixels of the part that the network sees at a time", type=int)
EXACT = argument(
    "--exact",
    "invert by EDICT's two coupled tracks, which are exactly reversible (default), or by DDIM",
    action=argparse.BooleanOptionalAction,
)

GRID = (
    argument(
        "--convention",
        "grid, start and noise of diffusers, compvis, sgm or k (default: the model's)",
    ),
    argument(
        "--spacing",
        "leading, trailing, linspace, karras, lambda, … instead of the convention's; a wrong name lists all",
    ),
)

SAMPLING = (
    argument("--n", "number of images (default: the task's or the model's)", type=int),
    argument("--seed", "seed of the first image; each next image has the next seed (default: 0)", type=int),
    argument("--steps", "sampling steps (default: the model's; 50 for inversion)", type=int),
    argument("--guidance", "guidance scale; 1 is no guidance (default: the model's)", type=float),
    argument("--negative", "what not to show", type=parse_text),
    argument("--sampler", "sampling method (default: the model's); a wrong name lists all"),
    *GRID,
)

TOKEN_OPTIONS = (
    argument(
        "--temperature",
        "DALL·E Mini: divisor of the logits; 0 takes the likeliest token (default: 1)",
        type=float,
    ),
    argument(
        "--top-k", "DALL·E Mini: number of the likeliest tokens that are drawn from (default: 256)", type=int
    ),
    argument(
        "--top-p", "DALL·E Mini: probability of the tokens that are drawn from (default: 1)", type=float
    ),
)

BORDER = (
    argument("--resample", "times each stretch of steps is run (RePaint; default: 1)", type=int),
    argument("--jump", "steps in such a stretch (default: 5)", type=int),
    argument(
        "--seam",
        "reach in pixels of the correction at the border (default: an eighth of the model's side; 0: none)",
        type=float,
    ),
    argument(
        "--feather",
        "pixels inside the mask over which the given image blends into the generated one (default: 0)",
        type=int,
    ),
    WINDOW,
)

ANIMATE = argument(
    "--animate",
    "also write a GIF of how the images appear: the prediction of each step, or the rows of tokens of DALL·E"
    " Mini",
    type=Path,
    metavar="FILE.gif",
)

QUALITY = argument("--quality", "quality of .jpg and .webp, 1 to 100 (default: 95)", type=int)

OUTPUT = (
    argument(
        "--output",
        "file to write (default: %(default)s): .png is lossless, .jpg and .webp are lossy; each carries the"
        " recipe that `ldm replay` reads",
        short="-o",
        default="ldm.png",
    ),
    QUALITY,
    argument("--separate", "write a file for each image, named by its seed, not a grid", action="store_true"),
)

MODEL = (
    argument(
        "--model",
        "name of the model; `ldm models` lists them (default: that of the folder of weights, else emoji-ldm)",
    ),
    argument(
        "--weights",
        "weights instead of the model's own: a single file, a diffusers folder, a folder that ldm.save wrote,"
        " or `random`",
    ),
    argument("--device", "cpu, cuda or mps (default: the best available)"),
    argument(
        "--dtype",
        "float32, bfloat16, float16, or auto, by the free memory (default: the fastest that is safe)",
    ),
    argument("--variant", "variant of a folder's files, such as fp16"),
    argument(
        "--ema",
        "averaged weights of a file that has both (default: if it has them)",
        action=argparse.BooleanOptionalAction,
    ),
    argument(
        "--prediction",
        "what the network predicts, where the weights cannot tell (default: the model's)",
        choices=("eps", "v"),
    ),
    argument(
        "--safety",
        "file or folder of a safety checker; flagged images are named on standard error",
    ),
    argument("--black", "make flagged images black", action="store_true"),
)
ADAPTERS = argument(
    "--adapter",
    "file of a LoRA, of another adapter or of a textual inversion; repeatable",
    type=parse_adapter,
    action="append",
    metavar="FILE[:STRENGTH]",
)
CONTROLS = argument(
    "--control",
    "file or folder of a ControlNet, T2I-Adapter or IP-Adapter, and the image that it reads; the strength"
    " (default: 1) and the fractions of the steps between which it acts may follow; repeatable",
    type=parse_control,
    action="append",
    metavar="FILE:HINT[:STRENGTH[:START:END]]",
)
VISION = argument(
    "--vision",
    "file or folder of CLIP's image tower, which IP-Adapters among the controls read",
)
ADDITIONS = (ADAPTERS, CONTROLS, VISION)
MODEL_KEYWORDS = tuple(each.dest for each in MODEL if each.dest != "model")
