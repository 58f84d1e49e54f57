"""Read the hints of controls, fit them to the image to be made, and check their conventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.catalog.control_cards import ControlCard
from ldm.images.canvas import repeat_edges
from ldm.images.pixels import to_mask, to_pixels
from ldm.pipelines.control.control_use import Control
from ldm.support.text import shown
from ldm.support.warn import warn_user

ASPECT = 0.02  # relative difference of two aspect ratios that count as equal


class HintConvention(UserWarning):
    """A hint looks as if its polarity, or its order of channels, were not those of the card."""


@dataclass(frozen=True, kw_only=True)
class HintFrame:
    """The sizes that a hint is fitted to.

    Args:
        image: (H, W) of the images to be made.
        hint: (H', W') of the hint that the network reads.
        multiple: Number to multiples of which a call pads the images that it is given.
        count: Number B of images to be made.
    """

    image: tuple[int, int]
    hint: tuple[int, int]
    multiple: int
    count: int


def read_hint(option: Control, card: ControlCard, channels: int, frame: HintFrame) -> Tensor:
    """Return the hint of a control as its network reads it, (1 or B, C, H, W), float32.

    Args:
        option: The control.
        card: Its card.
        channels: Channels that the network reads.
        frame: The sizes that it is fitted to.

    Raises:
        ValueError: If the hint, or its mask, cannot be read or does not fit.

    Warns:
        HintConvention: If it looks inverted, or as if its channels were in the other order.
    """
    where = f"control {shown(option.name)}"
    pixels, mask = _read(where, option, card, frame.count)
    check_convention(where, card, pixels)
    if any(option.margins):
        pixels, mask = extended(pixels, mask, card, option.margins)
    pixels = fitted(where, pixels, frame)
    if mask is not None:
        hole = fitted(where, mask, frame) >= 0.5
        pixels = torch.where(hole, -1.0, pixels)  # (B, 3, H, W)
    if channels == 1:
        return pixels.mean(1, keepdim=True)
    if channels != 3:
        raise ValueError(f"{where}: its network reads {channels} channels, expected 1 or 3")
    return pixels.flip(1) if card.order == "bgr" else pixels


def read_image(option: Control, card: ControlCard, count: int) -> Tensor:
    """Return the hint of a control that reads images of any size, (1 or B, 3, H, W), float32 in [0, 1].

    Args:
        option: The control.
        card: Its card.
        count: Number B of images to be made.

    Raises:
        ValueError: If it cannot be read, or there is another number of them.
    """
    return _read(f"control {shown(option.name)}", option, card, count)[0]


def _read(where: str, option: Control, card: ControlCard, count: int) -> tuple[Tensor, Tensor | None]:
    """Return the image and the mask of a control; the errors begin with `where`."""
    try:
        pixels = to_pixels(option.hint)
        mask = None if option.mask is None else to_mask(option.mask, pixels.shape[-2:])
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: hint: {error}") from None
    if (mask is not None) != card.masked:
        wanted = "expected a mask, white where to fill in" if card.masked else "expected no mask"
        raise ValueError(f"{where}: {wanted}: its hints are {card.shows}")
    if len(pixels) not in (1, count):
        raise ValueError(
            f"{where}: {len(pixels)} hints for {count} images to be made: expected one, or one for each"
        )
    return pixels, mask


def extended(
    pixels: Tensor, mask: Tensor | None, card: ControlCard, margins: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """Return a hint and its mask with margins of which nothing is known.

    Where hints are lines on black, the margins have no lines. Where they have a mask, the margins are to be
    filled in. Others repeat their edges, as a depth or a colour continues.

    Args:
        pixels: The hint, shape (B, 3, H, W).
        mask: Its mask, shape (B or 1, 1, H, W), or None.
        card: Its card.
        margins: Pixels at left, right, top and bottom.
    """
    if mask is not None:
        mask = F.pad(mask, margins, value=1.0)
    mode = "constant" if card.lines or mask is not None else "replicate"
    return F.pad(pixels, margins, mode), mask


def of_canvas(controls: Sequence[Control], size: tuple[int, int], margins: Sequence[int]) -> list[Control]:
    """Return the controls of an image that is extended by margins.

    A hint of exactly the image's size belongs to the image and is extended with it; any other one is of the
    whole canvas.

    Args:
        controls: The controls.
        size: (H, W) of the image.
        margins: Pixels at left, right, top and bottom.
    """
    left, right, top, bottom = margins
    return [
        replace(each, margins=(left, right, top, bottom)) if hint_size(each) == size else each
        for each in controls
    ]


def hint_size(option: Control) -> tuple[int, int]:
    """Return (H, W) of a control's hint; ValueError or FileNotFoundError if it cannot be read."""
    try:
        pixels = to_pixels(option.hint)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"control {shown(option.name)}: hint: {error}") from None
    return pixels.shape[-2], pixels.shape[-1]


def fitted(where: str, pixels: Tensor, frame: HintFrame) -> Tensor:
    """Return an image (B, C, H, W) at the hint's size (H', W'), padded as a call pads images, or resized.

    Args:
        where: The control, for messages.
        pixels: The image.
        frame: The sizes.

    Raises:
        ValueError: If it has another aspect ratio.
    """
    (h, w), multiple = pixels.shape[-2:], frame.multiple
    if (-(-h // multiple) * multiple, -(-w // multiple) * multiple) == frame.image:
        pixels = repeat_edges(pixels, multiple)
        h, w = frame.image
    if (h, w) == frame.hint:
        return pixels
    if abs((w * frame.image[0]) / (h * frame.image[1]) - 1) > ASPECT:
        raise ValueError(
            f"{where}: the hint has {w}×{h} pixels, expected the aspect ratio of the image to be made,"
            f" {frame.image[1]}×{frame.image[0]}: pass height= and width=, or crop the hint"
        )
    resized = F.interpolate(pixels, frame.hint, mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 1)  # (B, C, H', W')


def check_convention(where: str, card: ControlCard, pixels: Tensor) -> None:
    """Warn if a hint (B, 3, H, W) does not look as its card says."""
    if card.lines and float(pixels.mean()) > 0.5:
        warn_user(
            f"{where}: the hint looks inverted: it is bright (mean {float(pixels.mean()):.2f}), expected"
            f" {card.shows}",
            HintConvention,
        )
    if card.normals and float(pixels[:, 2].mean()) < float(pixels[:, 0].mean()):
        warn_user(
            f"{where}: the hint looks as if red and blue were exchanged, expected {card.shows}",
            HintConvention,
        )
