"""The sizes that a model makes, and the nearest of them to another size."""

from __future__ import annotations

import math
from typing import Any

AREA = (0.5, 1.5)  # smallest and largest number of pixels, in those of the model's own size
LONGEST_SHAPE = 3.0  # largest ratio of the sides
ON_CANVAS = 4.0  # largest number of pixels of an edited image, which is drawn through windows


def final_size(card: Any) -> tuple[int, int]:
    """Return the (width, height) of the images that a model's card states, or its last upsampler's.

    Args:
        card: The card of any model that draws images.
    """
    upsamplers = getattr(card, "upsamplers", ())
    defaults = upsamplers[-1].defaults if upsamplers else card.usual()
    return defaults.width, defaults.height


def nearest_size(size: tuple[int, int], own: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return the size that a model makes whose shape, and then whose area, is nearest to another.

    The sides are multiples of `multiple`, and the number of pixels is 0.5 to 1.5 times that of the model's
    own size.

    Args:
        size: (width, height) that is wanted.
        own: (width, height) of the model's own images.
        multiple: What the sides must be a multiple of.
    """
    usual = own[0] * own[1]
    if fits(size, own, multiple):
        return size
    wanted = math.log(size[0] / size[1])
    longest = int(AREA[1] * usual / multiple**2)

    def distance(candidate: tuple[int, int]) -> tuple[float, float]:
        width, height = candidate
        # a difference in shape below 2 % is not seen
        shape = max(abs(math.log(width / height) - wanted) - 0.02, 0.0)
        return shape, abs(math.log(width * height / usual))

    candidates = [own]
    for columns in range(1, longest + 1):
        least, most = AREA[0] * usual / multiple**2 / columns, AREA[1] * usual / multiple**2 / columns
        rows = round(columns * size[1] / size[0])
        for each in {math.ceil(least), rows, int(most)}:
            slim = max(columns, each) / max(min(columns, each), 1)
            if each >= 1 and least <= each <= most and slim <= LONGEST_SHAPE:
                candidates.append((columns * multiple, each * multiple))
    return min(candidates, key=distance)


def fits(size: tuple[int, int], own: tuple[int, int], multiple: int, most: float = AREA[1]) -> bool:
    """Return whether a model makes a size: multiples of `multiple`, and an area near that of its own size.

    Args:
        size, own, multiple: See `nearest_size`.
        most: Largest number of pixels, in those of the model's own size. Default: 1.5.
    """
    area = size[0] * size[1] / (own[0] * own[1])
    slim = max(size) / min(size)
    return all(side % multiple == 0 for side in size) and AREA[0] <= area <= most and slim <= LONGEST_SHAPE


def usual_sizes(own: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """Return sizes in usual shapes that a model makes: its own, and 3:2, 2:3, 16:9, 9:16."""
    side = math.sqrt(own[0] * own[1])
    shapes = ((1, 1), (3, 2), (2, 3), (16, 9), (9, 16))
    scaled = [(round(side * math.sqrt(a / b)), round(side * math.sqrt(b / a))) for a, b in shapes]
    return list(dict.fromkeys([own, *(nearest_size(size, own, multiple) for size in scaled)]))
