"""Several images arranged in one, with or without captions."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ldm.support.scalars import whole_number

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

CAPTION_HEIGHT = 11  # of the letters, in pixels
CAPTION_LINES = 3  # most lines of a prompt
CAPTION_WIDTH = 120  # least width of a captioned image, in pixels


def arrange(images: Sequence[Image], columns: int | None = None) -> Image:
    """Return images of one width in one, row by row on white.

    Args:
        images: The images, at least one.
        columns: Images per row, at least 1. Default: None, a grid as close to square as possible.
    """
    from PIL import Image

    if columns is None:
        columns = -(-len(images) // max(1, round(len(images) ** 0.5)))
    columns = whole_number("columns", columns, least=1)
    w, h = images[0].width, max(image.height for image in images)
    sheet = Image.new("RGB", (w * min(columns, len(images)), h * -(-len(images) // columns)), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (w * (i % columns), h * (i // columns)))
    return sheet


def with_caption(image: Image, prompt: str, seed: int) -> Image:
    """Return an image with its prompt and seed below, at least `CAPTION_WIDTH` pixels wide."""
    return with_lines(image, prompt, f"seed {seed}")


def with_lines(image: Image, prompt: str, last: str) -> Image:
    """Return an image with its prompt and a gray line below, at least `CAPTION_WIDTH` pixels wide."""
    from PIL import Image, ImageDraw

    font, width = caption_font(), max(image.width, CAPTION_WIDTH)
    lines = [*wrap_prompt(prompt, font, width - 6), last]
    line_height = CAPTION_HEIGHT + 3
    out = Image.new("RGB", (width, image.height + line_height * len(lines) + 8), "white")
    out.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(out)
    for i, line in enumerate(lines):
        line = f"{line[:width]}…" if len(line) > width else line  # hardly a letter is one pixel wide
        while len(line) > 1 and font.getlength(line) > width - 4:  # one word wider than the image
            line = f"{line.rstrip('…')[:-1]}…"
        draw.text(
            (width / 2, image.height + 2 + line_height * i),
            line,
            fill="black" if i < len(lines) - 1 else "gray",
            font=font,
            anchor="ma",
        )
    return out


def wrap_prompt(prompt: str, font: FreeTypeFont | ImageFont, width: int) -> list[str]:
    """Return a prompt in lines of at most `width` pixels (longer words excepted), at most `CAPTION_LINES`."""
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
        if len(lines) > CAPTION_LINES + 1:
            break
    lines = [line for line in lines if line]
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], f"{lines[CAPTION_LINES - 1]} …"]
    return lines


@functools.cache
def caption_font() -> FreeTypeFont | ImageFont:
    """Return DejaVu Sans, which covers most alphabets, if matplotlib is installed, else PIL's own font."""
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")  # locates the package without importing it
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), CAPTION_HEIGHT)
    return ImageFont.load_default(CAPTION_HEIGHT)


def to_bytes(tensor: Tensor) -> np.ndarray:
    """Return images (B, 3, H, W) in [0, 1] as uint8 (B, H, W, 3), rounded to nearest.

    NumPy computes it: PyTorch would start threads for the caller's thread, and OpenMP lets threads wait
    without sleeping only as long as there are no more of them than processors.
    """
    import numpy as np

    levels = np.rint(tensor.detach().float().cpu().numpy() * np.float32(255)).clip(0, 255)
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(0, 2, 3, 1))
