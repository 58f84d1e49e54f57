"""Build a ControlNet-LLLite from a file: its networks follow from the keys, their places from the UNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from ldm.models.control.lllite import DEPTHS, LLLite, LLLiteConfig, LLLiteLayer
from ldm.models.unet_config import UNetConfig
from ldm.support.text import shown
from ldm.weights.adapters.places import ModulePlace, Places
from ldm.weights.controls.files import ControlFile
from ldm.weights.controls.shapes import shapes_in, size_of
from ldm.weights.keymap import Shape
from ldm.weights.parts import build_network, fill_network

PREFIX = "lllite_unet_"  # of every key
PROJECTIONS = ("to_q", "to_k", "to_v")
DEPTH_OF_BLOCK = {"IN": (1, 2, 3), "M": (3, 3, 3), "OUT": (3, 2, 1)}
"""The depths of the blocks 0 to 2, 3 to 5 and from 6 on; see `ldm.models.control.lllite.DEPTHS`."""


def is_lllite(shapes: Mapping[str, Shape]) -> bool:
    """Return whether keys are those of a ControlNet-LLLite."""
    return any(key.startswith(PREFIX) and ".conditioning1." in key for key in shapes)


def lllite_config(shapes: Mapping[str, Shape], *, source: str | Path) -> LLLiteConfig:
    """Return the configuration of the ControlNet-LLLite with these keys and shapes.

    Args:
        shapes: The shapes in the file, by key.
        source: The file, for messages.

    Raises:
        ValueError: If a network is not whole, or stands before a convolution.
    """
    networks: dict[str, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        name, _, inner = key.partition(".")
        if name.startswith(PREFIX):
            networks.setdefault(name, {})[inner] = shape
    return LLLiteConfig(layers=tuple(_layer(name, networks[name], source) for name in sorted(networks)))


def _layer(name: str, own: Mapping[str, Shape], source: str | Path) -> LLLiteLayer:
    """Return the shape of one network of a file, of its keys and shapes; see `lllite_config`."""
    if len(own.get("down.0.weight", ())) == 4:
        raise ValueError(
            f"{str(source)!r}: {name} stands before a convolution; expected projections of attentions, which"
            " the trainer changes by default"
        )
    numbers = sorted(int(m[1]) for key in own if (m := re.fullmatch(r"conditioning1\.(\d+)\.weight", key)))
    convolutions = [f"conditioning1.{i}.weight" for i in numbers]
    strides = tuple(size_of(own, key, 3) for key in convolutions)
    depth = next((depth for depth, own_strides in DEPTHS.items() if own_strides == strides), None)
    if depth is None or any(len(own.get(f"{part}.0.weight", ())) != 2 for part in ("down", "mid", "up")):
        raise ValueError(
            f"{str(source)!r}: {name} has the keys and shapes {shown(own)}: expected down, mid, up, and"
            f" convolutions with kernels of {' or '.join(map(str, DEPTHS.values()))}"
        )
    hidden, width = own["down.0.weight"]
    return LLLiteLayer(
        name=name, width=width, embed=size_of(own, convolutions[-1], 0), hidden=hidden, depth=depth
    )


def lllite_family(shapes: Mapping[str, Shape]) -> str:
    """Return the family that a ControlNet-LLLite was made for, in words; "" if no key shows it."""
    if any(re.search(r"_transformer_blocks_[1-9]", key) for key in shapes):
        return "Stable Diffusion XL"  # the only one with several blocks in a transformer
    return "Stable Diffusion 1 or 2" if any(f"{PREFIX}input_blocks_1_" in key for key in shapes) else ""


def lllite_places(config: LLLiteConfig, unet: nn.Module, *, source: str | Path) -> dict[str, tuple[str, str]]:
    """Return for each network the attention of a UNet and the projection before which it stands.

    Args:
        config: The networks.
        unet: The UNet, which may be on the meta device.
        source: The file, for messages.

    Raises:
        ValueError: If the UNet has no such projection, or one of another width or at another depth.
    """
    places, found = Places("unet", unet), dict[str, tuple[str, str]]()
    for layer in config.layers:
        place = places.find(layer.name.removeprefix(PREFIX), flat=True)
        fits = place is not None and "weight" in place.sites and len(place.sites["weight"].shape) >= 2
        if place is None or not fits or place.sites["weight"].shape[1] != layer.width:
            family = lllite_family({each.name: () for each in config.layers})
            has = "none" if not fits or place is None else f"one of {place.sites['weight'].shape[1]}"
            raise ValueError(
                f"{str(source)!r} was made for {family or 'another UNet'}: {layer.name} stands before a"
                f" projection of {layer.width} channels, the UNet has {has}"
            )
        attention, _, projection = place.sites["weight"].ours[0].removesuffix(".weight").rpartition(".")
        if projection not in PROJECTIONS:
            raise ValueError(
                f"{str(source)!r}: {layer.name} stands before {projection!r} of {attention!r}: expected"
                f" {', '.join(PROJECTIONS)} of attentions"
            )
        if layer.depth != (depth := _depth(place)):
            raise ValueError(
                f"{str(source)!r}: {layer.name} reduces the hint at depth {layer.depth}, expected {depth} in"
                f" block {place.block}"
            )
        found[layer.name] = attention, projection
    return found


def _depth(place: ModulePlace) -> int:
    """Return the depth at which a projection lies."""
    match = re.match(r"(IN|M|OUT)(\d+)", place.block)
    assert match is not None
    return DEPTH_OF_BLOCK[match[1]][min(int(match[2]) // 3, 2)]


def build_lllite(
    file: ControlFile, unet: UNetConfig, *, dtype: torch.dtype
) -> tuple[LLLite, dict[str, tuple[str, str]]]:
    """Return the ControlNet-LLLite of a file and the places of its networks in a UNet.

    Args:
        file: The file, for which `is_lllite` is true.
        unet: The UNet's configuration.
        dtype: Floating-point type of the weights.

    Raises:
        ValueError: If it was made for another family, keys are missing, unexpected or misshapen, or numbers
            are not finite.
    """
    config = lllite_config(shapes_in(file.tensors), source=file.path)
    places = lllite_places(config, build_network(unet), source=file.path)
    network = build_network(config)
    filled = fill_network(network, file.tensors, "original", source=file.path, dtype=dtype)
    return cast(LLLite, filled), places
