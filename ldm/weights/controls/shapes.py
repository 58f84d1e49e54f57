"""The shapes in a control's file: a configuration is read from them, and none is taken for granted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm.support.text import escaped
from ldm.weights.keymap import Shape

MOST_PARTS = 64  # of one kind, such as the blocks of an attention; published networks have ten


def shapes_in(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the shapes of tensors."""
    return {key: tuple(value.shape) for key, value in tensors.items()}


def size_of(shapes: Mapping[str, Shape], key: str, axis: int) -> int:
    """Return the size of an axis, from 0, of the tensor with a key.

    Raises:
        ValueError: If there is no such tensor, or it has fewer axes.
    """
    if key not in shapes:
        raise ValueError(f"it has no {escaped(key, 200)}")
    if len(shapes[key]) <= axis:
        raise ValueError(
            f"{escaped(key, 200)} has the shape {shapes[key]}, expected at least {axis + 1} dimensions"
        )
    return shapes[key][axis]


def count_of(shapes: Iterable[str], pattern: str, what: str) -> int:
    """Return how many parts the keys number from 0 on.

    Args:
        shapes: The keys.
        pattern: Regular expression of the beginning of the parts' keys, whose group 1 is the number.
        what: Name of the parts, for messages.

    Raises:
        ValueError: If there are more than `MOST_PARTS`, or a number is left out.
    """
    regex = re.compile(pattern)
    found = {int(match[1]) for key in shapes if (match := regex.match(key))}
    if len(found) > MOST_PARTS or max(found, default=-1) >= len(found):
        raise ValueError(
            f"it has {len(found)} {what}, the last of number {escaped(max(found), 20)}: expected at most"
            f" {MOST_PARTS}, numbered from 0 on"
        )
    return len(found)
