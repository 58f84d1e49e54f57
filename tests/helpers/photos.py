"""Folders of drawn images with captions, and image files of every kind that can go wrong."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 200), "yellow": (240, 200, 40)}
SHAPES = ("disc", "box", "bar")


def drawn_photo(i: int, width: int = 48, height: int = 40) -> tuple[Image.Image, str]:
    """Return image i, and its caption: a shape of a colour at a place of its own."""
    colour, shape = list(COLOURS)[i % len(COLOURS)], SHAPES[i // len(COLOURS) % len(SHAPES)]
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(i)
    x, y = x - rng.uniform(0.35, 0.65) * width, y - rng.uniform(0.35, 0.65) * height
    r = 0.3 * min(width, height)
    inside = {
        "disc": np.hypot(x, y) < r,
        "box": np.maximum(abs(x), abs(y)) < r,
        "bar": (abs(x) < r) & (abs(y) < r / 3),
    }[shape]
    pixels = np.full((height, width, 3), 235, dtype=np.uint8)
    pixels[inside] = COLOURS[colour]
    return Image.fromarray(pixels), f"a {colour} {shape}"


def write_photos(folder: Path, n: int, **sides: int) -> Path:
    """Write n images as PNG, each with its caption in a text file, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        image, caption = drawn_photo(i, **sides)
        image.save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(caption, encoding="utf-8")
    return folder


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """Return an image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def giant_png(side: int) -> bytes:
    """Return a PNG whose header states an image of side × side, and which has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def write_broken(folder: Path) -> dict[str, str]:
    """Write files of every kind that can go wrong, and return the kind of problem of each by its name.

    An empty kind stands for none. Every image but "bare.png" has a caption.
    """
    image, _ = drawn_photo(0)
    png, jpeg = encoded(image), encoded(drawn_photo(0, 480, 400)[0], "JPEG")
    frames = [drawn_photo(i)[0] for i in range(3)]
    files = {
        "truncated.png": (png[: len(png) * 2 // 3], "unreadable"),
        "truncated.jpg": (jpeg[: len(jpeg) * 2 // 3], "unreadable"),
        "cut in the header.jpg": (jpeg[:20], "unreadable"),
        "empty.png": (b"", "unreadable"),
        "one pixel.png": (encoded(Image.new("RGB", (1, 1))), "too small"),
        "cmyk.jpg": (encoded(drawn_photo(1)[0].convert("CMYK"), "JPEG"), ""),
        "animated.gif": (
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            "several frames",
        ),
        "giant.png": (giant_png(20_000), "too large"),
        "text.png": (b"This is no image.\n" * 40, "unreadable"),
        "bare.png": (encoded(drawn_photo(2)[0]), "no caption"),
        "Äpfel und 梨 🍐.png": (encoded(drawn_photo(3)[0]), ""),
        "with spaces (1).png": (encoded(drawn_photo(4)[0]), ""),
        "copy.png": (encoded(drawn_photo(3)[0]), "duplicate"),
        "sixteen bits.png": (
            encoded(Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 30)),
            "",
        ),
        "palette.png": (encoded(drawn_photo(5)[0].quantize(8)), ""),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
        if name != "bare.png":
            (folder / name).with_suffix(".txt").write_text(f"a caption of {name}", encoding="utf-8")
    (folder / "alone.txt").write_text("no image has this caption", encoding="utf-8")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    os.symlink(folder, folder / "loop", target_is_directory=True)
    os.symlink(folder / "self.png", folder / "self.png")
    os.mkfifo(folder / "pipe.png")  # opening it would wait for a writer
    kinds = {name: kind for name, (_, kind) in files.items()}
    kinds["Äpfel und 梨 🍐.png"] = "duplicate"  # the copy comes first
    kinds["copy.png"] = ""
    return {
        **kinds,
        "alone.txt": "caption without an image",
        "notes.pdf": "not an image",
        "loop": "symlink loop",
        "self.png": "symlink loop",
        "pipe.png": "unreadable",
    }
