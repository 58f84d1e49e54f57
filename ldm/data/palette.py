"""The ten background colours, and those of them that things take."""

from __future__ import annotations

PALETTE: dict[str, tuple[int, int, int]] = {  # sRGB, 0 to 255
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (220, 50, 47),
    "green": (60, 160, 80),
    "blue": (50, 100, 210),
    "yellow": (245, 210, 60),
    "purple": (130, 80, 190),
    "orange": (240, 140, 40),
    "pink": (245, 160, 190),
    "gray": (140, 140, 140),
}
# a thing in white, black or gray cannot be told from one in weak colours
THING_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink")
