"""Build a T2I-Adapter from a file: its kind and shape follow from the keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch

from ldm.models.control.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.unet_config import UNetConfig
from ldm.support.warn import warn_user
from ldm.weights.controls.files import ControlFile
from ldm.weights.controls.shapes import count_of, shapes_in, size_of
from ldm.weights.formats.diffusers_check import check_component
from ldm.weights.keymap import Shape
from ldm.weights.parts import Layout, build_network, fill_network

XL_SQUARE = 16  # side of the squares that adapters of Stable Diffusion XL read


def t2i_adapter_layout(shapes: Mapping[str, Shape]) -> Layout | None:
    """Return the layout of a T2I-Adapter's file; None if it is no T2I-Adapter."""
    if "body.0.resnets.0.block1.weight" in shapes:
        return "diffusers"
    names = ("body.0.block1.weight", "body.0.body.0.block1.weight")
    return "original" if any(name in shapes for name in names) else None


def t2i_adapter_config(shapes: Mapping[str, Shape], layout: Layout, unet: UNetConfig) -> T2IAdapterConfig:
    """Return the configuration of the T2I-Adapter with these keys and shapes.

    Args:
        shapes: The shapes in the file, by key.
        layout: Its layout.
        unet: The UNet that it is for: one whose largest level has no attention is that of an XL.

    Raises:
        ValueError: If a tensor is missing, or the first convolution reads no squares of gray or colour.
    """
    light = "body.0.out_conv.weight" in shapes
    count = count_of(shapes, r"body\.(\d+)\.", "levels or blocks")
    if layout == "diffusers" or light:
        levels, word = count, "resnets" if layout == "diffusers" else "body"
        blocks = count_of(shapes, rf"body\.0\.{word}\.(\d+)\.block1\.weight", "blocks of a level")
    else:
        levels = len(unet.channels) + is_like_xl(unet)
        blocks = max(count // levels, 1)
    width = size_of(shapes, "body.0.in_conv.weight" if light else "conv_in.weight", 1)
    hint_channels, unshuffle = _squares(width)
    step = 1 if layout == "diffusers" or light else blocks
    leaf = {"diffusers": ".resnets.0.block1.weight", "original": ".block1.weight"}[layout]
    leaf = ".out_conv.weight" if light else leaf
    channels = tuple(size_of(shapes, f"body.{level * step}{leaf}", 0) for level in range(levels))
    if is_like_xl(unet):
        halved = tuple(level == 2 for level in range(levels))
    else:
        halved = tuple(level > 0 for level in range(levels))
    return T2IAdapterConfig(
        hint_channels=hint_channels,
        unshuffle=unshuffle,
        channels=channels,
        halved=halved,
        blocks=blocks,
        light=light,
    )


def is_like_xl(unet: UNetConfig) -> bool:
    """Return whether a UNet is like that of Stable Diffusion XL, whose largest level has no attention."""
    return not unet.depth[0]


def t2i_family(shapes: Mapping[str, Shape]) -> str:
    """Return the family that a T2I-Adapter was made for, in words; SD 1 and 2 have the same shapes."""
    key = "conv_in.weight" if "conv_in.weight" in shapes else "body.0.in_conv.weight"
    try:
        xl = _squares(size_of(shapes, key, 1))[1] == XL_SQUARE
    except ValueError:
        return ""
    return "Stable Diffusion XL" if xl else "Stable Diffusion 1 or 2"


def _squares(width: int) -> tuple[int, int]:
    """Return channels and side of the squares that a number of channels holds: of colour, else of gray."""
    for channels in (3, 1):
        side = math.isqrt(width // channels)
        if channels * side**2 == width:
            return channels, side
    raise ValueError(f"its first convolution reads {width} channels, which are no squares of gray or colour")


def build_t2i_adapter(
    file: ControlFile, unet: UNetConfig, *, factor: int, model: str, dtype: torch.dtype
) -> T2IAdapter:
    """Return the T2I-Adapter of a file, for a UNet.

    Args:
        file: The file or folder, of which `t2i_adapter_layout` is not None.
        unet: The UNet's configuration.
        factor: Size of an image divided by that of the latent.
        model: Name of the model, for messages.
        dtype: Floating-point type of the weights.

    Raises:
        ValueError: If it was made for another family, keys are missing, unexpected or misshapen, numbers are
            not finite, or its config.json states another network.
    """
    shapes = shapes_in(file.tensors)
    layout = t2i_adapter_layout(shapes)
    assert layout is not None
    try:
        config = t2i_adapter_config(shapes, layout, unet)
    except ValueError as error:
        raise ValueError(f"{str(file.path)!r} is no whole T2I-Adapter: {error}") from None
    wanted = factor * (2 if is_like_xl(unet) else 1)
    widths = (unet.channels[0], *unet.channels[1:], *([unet.channels[-1]] if is_like_xl(unet) else []))
    family = t2i_family(shapes)
    if config.unshuffle != wanted or config.channels != widths:
        raise ValueError(
            f"{str(file.path)!r} was made for {family}: it reads squares of {config.unshuffle} pixels and"
            f" gives maps of {config.channels} channels; for {model!r} these are {wanted} and {widths}"
        )
    if file.component is not None:
        for note in check_component("T2I-Adapter", config, file.component):
            warn_user(note)
    network = build_network(config)
    return cast(T2IAdapter, fill_network(network, file.tensors, layout, source=file.path, dtype=dtype))
