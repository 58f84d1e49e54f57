"""Several images in one, with or without captions."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


CAPTION, LINES = 11, 3  # of a caption: the height of its letters in pixels, and the most lines of a prompt


def sheet_of(pictures: Sequence[Image], columns: int | None = None) -> Image:
    """Pictures of one width in one, row by row on white, as near to a square as it goes unless ``columns`` is
    given."""
    from PIL import Image

    columns = columns or -(-len(pictures) // max(1, round(len(pictures) ** 0.5)))
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    w, h = pictures[0].width, max(picture.height for picture in pictures)
    sheet = Image.new("RGB", (w * min(columns, len(pictures)), h * -(-len(pictures) // columns)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (w * (i % columns), h * (i // columns)))
    return sheet


def captioned(picture: Image, prompt: str, seed: int) -> Image:
    """A picture with its prompt and seed below, at least 120 pixels wide."""
    from PIL import Image

    font = caption_font()
    width = max(picture.width, 120)
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width - 6:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"{lines[LINES - 1]} …"]
    return _below(Image, font, picture, width, [*lines, f"seed {seed}"])


@functools.cache
def caption_font() -> Any:
    """DejaVu Sans, which has most alphabets, where matplotlib is installed, which brings it; else the small
    font of PIL."""
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")  # finds the folder and imports nothing
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), CAPTION)
    return ImageFont.load_default(CAPTION)


def _below(image: Any, font: Any, picture: Image, width: int, lines: Sequence[str]) -> Image:
    from PIL import ImageDraw

    step = CAPTION + 3
    out = image.new("RGB", (width, picture.height + step * len(lines) + 8), "white")
    out.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(out)
    for i, line in enumerate(lines):
        while len(line) > 1 and font.getlength(line) > width - 4:  # one word wider than the picture
            line = f"{line.rstrip('…')[:-1]}…"
        draw.text(
            (width / 2, picture.height + 2 + step * i),
            line,
            fill="black" if i < len(lines) - 1 else "gray",
            font=font,
            anchor="ma",
        )
    return out


def to_bytes(tensor: Tensor) -> Any:
    """(B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8, rounded to nearest."""
    return (tensor.detach().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
