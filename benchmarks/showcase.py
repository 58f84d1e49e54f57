"""Generate the sample sheets of the documentation.

python benchmarks/showcase.py -o samples.png                # 32 prompts, seeds 0 to 31
python benchmarks/showcase.py --drawn data/emoji -o 64.png  # 64 captions drawn from the data set's facts
python benchmarks/showcase.py --tasks -o tasks.png          # every task once, seed 0
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import ldm
from ldm.data import EmojiData, Mix, caption
from ldm.data.mix import sample_facts
from ldm.images.sheets import caption_font, to_bytes
from ldm.support.files import open_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = (
    "a red apple",
    "a red apple",
    "a red apple",
    "a cat face",
    "a cat face",
    "a rocket",
    "a rocket",
    "a guitar",
    "three red apples",
    "two dogs on a green background",
    "four rockets on a black background",
    "three cat faces on a purple background",
    "a red apple and a cat face",
    "a snowman and a rocket on a blue background",
    "a dog face to the left of a banana",
    "a rocket above a house on a yellow background",
    "a blue cat face",
    "a green guitar",
    "a purple rocket on a white background",
    "a yellow octopus on a blue background",
    "a red cat face and a blue apple",
    "a green bus to the right of a pink house",
    "an orange fish below a purple butterfly",
    "a blue dog face and a red bus on a gray background",
    "a noto unicorn on a pink background",
    "a fluent unicorn on a pink background",
    "a twemoji unicorn on a pink background",
    "a flat unicorn on a pink background",
    "a kitty",
    "a small ghost in the top right corner on a blue background",
    "a sunflower on the left",
    "a pizza in the bottom left corner on a green background",
)
NAMES = (  # for a model that was trained on names alone
    "red apple",
    "cat face",
    "snowman",
    "rocket",
    "grinning face",
    "guitar",
    "sunflower",
    "fire engine",
    "cat face on a blue background",
    "snowman on a purple background",
    "rocket on a black background",
    "a pizza on a green background",
    "unicorn on a pink background",
    "octopus on a yellow background",
    "bicycle on an orange background",
    "ghost on a gray background",
    "fluent red apple",
    "fluent cat face",
    "fluent rocket",
    "fluent guitar",
    "twemoji red apple",
    "twemoji cat face",
    "twemoji rocket",
    "twemoji guitar",
    "a kitty",
    "a small red apple on the left",
    "a small ghost in the top right corner on a blue background",
    "a snowman and a rocket side by side",
    "a dragon",
    "castle",
    "avocado",
    "a whale on a blue background",
)
LABEL, GAP = 20, 8  # of the sheet of tasks, in pixels: height of a label, space between images
COLUMNS = 6  # images in a row of the sheet of tasks
Cell = tuple[str, list[Tensor]]  # label, images (3, 128, 128) from left to right


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("samples.png"))
    parser.add_argument("--tasks", action="store_true", help="a sheet of all tasks instead of the prompts")
    parser.add_argument("--names", action="store_true", help="32 other prompts, which are names alone")
    parser.add_argument("--drawn", type=Path, help="draw 64 captions from the facts of this data set")
    parser.add_argument("--model", default="emoji-ldm")
    parser.add_argument("--weights", default=None, help="weights instead of the model's own")
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--steps", type=int, default=None)
    options = parser.parse_args(arguments)
    pipe = ldm.load(options.model, weights=options.weights)
    given = {"guidance": options.guidance, "steps": options.steps}
    own = {name: value for name, value in given.items() if value is not None}
    if options.tasks:
        # 128 colours, here and below: a quarter of the bytes at little visible difference
        image = sheet(tasks(pipe, own)).quantize(128)
    elif options.drawn is not None:
        made = pipe.text_to_image(drawn_captions(options.drawn, 64), seed=0, **own)
        image = made.captioned(columns=8).quantize(128)
    else:
        image = pipe.text_to_image(NAMES if options.names else PROMPTS, seed=0, **own).grid(columns=8)
    with open_atomically(options.output) as file:
        image.save(file, format="PNG", optimize=True)
    print(options.output)


def drawn_captions(folder: Path, n: int) -> list[str]:
    """Return n captions of random facts about the images of a data set, in random wordings."""
    index, rng = EmojiData.open(folder).index, np.random.default_rng(0)
    mix = Mix(two=0.4, count=0.2, colour=0.35)
    return [caption(sample_facts(rng, index, mix), index, rng) for _ in range(n)]


def tasks(pipe: Any, options: dict[str, Any]) -> list[Cell]:
    """Run every task once on generated images, at default settings except for the strengths named."""
    cat, apple, car = pipe.text_to_image(
        ["cat face", "red apple", "police car"], seed=[0, 0, 0], **options
    ).tensor
    side = cat.shape[-1]
    mask = torch.zeros(side, side)
    mask[:, side // 2 :] = 1
    hidden, cut = cat * (1 - mask) + 0.6 * mask, car[..., : side // 2]
    large = pipe.upscale(cat, "cat face", factor=2, **options).tensor[0]
    quarter = F.interpolate(cat[None, :, : side // 2, : side // 2], scale_factor=2, mode="nearest")[0]
    varied = pipe.variations(apple, n=2, strength=0.8, **options).tensor
    wide = pipe.outpaint("police car", cut, right=side // 2, **options).tensor[0]
    between = pipe.interpolate("cat face", "red apple", n=6, **options).tensor
    return [
        ("text to image: cat face, red apple, police car", [cat, apple, car]),
        ("variations of the apple, strength 0.8", [apple, *varied]),
        (
            "inpaint: the grey half is repainted",
            [hidden, pipe.inpaint("cat face", cat, mask, **options).tensor[0]],
        ),
        ("outpaint: police car, to the right", [F.pad(cut, (0, side // 2), value=1.0), wide]),
        (
            "image to image: tiger face, strength 0.6",
            [cat, pipe.image_to_image("tiger face", cat, strength=0.6, **options).tensor[0]],
        ),
        ("interpolate: from cat face to red apple", list(between)),
        (
            "edit: red apple to green apple",
            [apple, pipe.edit("red apple", "green apple", image=apple, **options).tensor[0]],
        ),
        ("upscale: a quarter, and twice its size", [quarter, large[:, :side, :side]]),
        ("reconstruct: inverted and back", [cat, pipe.reconstruct(cat).tensor[0]]),
    ]


def sheet(cells: list[Cell]) -> Image:
    """Return the cells with their labels above them, `COLUMNS` images per row."""
    from PIL import Image, ImageDraw

    side = cells[0][1][0].shape[-1]
    places, row, column = [], 0, 0
    for _, images in cells:
        if column + len(images) > COLUMNS:
            row, column = row + 1, 0
        places.append((row, column))
        column += len(images)
    made = Image.new("RGB", (COLUMNS * (side + GAP) - GAP, (row + 1) * (side + LABEL)), "white")
    draw = ImageDraw.Draw(made)
    for (label, images), (row, column) in zip(cells, places, strict=True):
        left, top = column * (side + GAP), row * (side + LABEL)
        draw.text((left + 2, top + 2), label, fill="black", font=caption_font())
        for i, image in enumerate(to_bytes(torch.stack(images))):
            made.paste(Image.fromarray(image), (left + i * (side + GAP), top + LABEL))
    return made


if __name__ == "__main__":
    main()
