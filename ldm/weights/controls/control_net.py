"""Build a ControlNet from a file: its layout and shape follow from the keys, its heads from the UNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ldm.models.control.control_net import ControlNet, ControlNetConfig
from ldm.models.control.union import UnionConfig
from ldm.models.unet_config import UNetConfig
from ldm.support.warn import warn_user
from ldm.weights.adapters.families import WIDTHS
from ldm.weights.controls.control_lora import completed, is_change
from ldm.weights.controls.files import ControlFile
from ldm.weights.controls.shapes import count_of, shapes_in, size_of
from ldm.weights.formats.diffusers_check import check_component
from ldm.weights.keymap import Shape
from ldm.weights.parts import Layout, build_network, fill_network

# keys that mark a ControlNet in each layout
LAYOUT_MARKS: Mapping[Layout, str] = {
    "diffusers": "controlnet_cond_embedding.conv_in.weight",
    "original": "input_hint_block.0.weight",
}
UNION_MARK = "task_embedding"  # key that marks a ControlNet Union
HINT_CONVOLUTIONS: Mapping[Layout, tuple[str, int]] = {  # keys of the convolutions, and their numbers' step
    "diffusers": (r"controlnet_cond_embedding\.blocks\.(\d+)\.weight", 1),
    "original": (r"input_hint_block\.(\d+)\.weight", 2),
}
BLOCK: Mapping[
    Layout, tuple[str, str]
] = {  # the name of the attention of a level, or of the middle (None), in each layout
    "diffusers": ("down_blocks.{level}.attentions.0", "mid_block.attentions.0"),
    "original": ("input_blocks.{first}.1", "middle_block.1"),
}


def control_net_layout(keys: Mapping[str, Shape]) -> Layout | None:
    """Return the layout of a ControlNet's file; None if it is no ControlNet."""
    return next((layout for layout, mark in LAYOUT_MARKS.items() if mark in keys), None)


def control_net_config(
    shapes: Mapping[str, Shape], layout: Layout, unet: UNetConfig, *, global_pool: bool = False
) -> ControlNetConfig:
    """Return the configuration of the ControlNet with these keys and shapes.

    Args:
        shapes: The shapes in the file, by key.
        layout: Its layout.
        unet: The UNet that it is for, from which what shapes do not show is taken.
        global_pool: Whether each residual is averaged over its positions. Default: False.

    Raises:
        ValueError: If a tensor is missing, or the shapes are those of no network.
    """
    depths = []
    for level in range(len(unet.channels)):
        names = {"level": level, "first": 1 + level * (unet.blocks + 1)}
        depths.append(_depth(shapes, BLOCK[layout][0].format(**names)))
    hint_channels = size_of(shapes, LAYOUT_MARKS[layout], 1)
    conv_in = "conv_in.weight" if layout == "diffusers" else "input_blocks.0.0.weight"
    own = replace(
        unet,
        in_channels=size_of(shapes, conv_in, 1) if conv_in in shapes else unet.out_channels,
        depth=tuple(depths),
        mid_depth=_depth(shapes, BLOCK[layout][1]),
        guidance_dim=None,
    )
    widths = _hint_widths(shapes, layout)
    if is_union(shapes):
        return UnionConfig(
            unet=own,
            hint_channels=hint_channels,
            hint_widths=widths,
            global_pool=global_pool,
            types=size_of(shapes, UNION_MARK, 0),
            layers=count_of(shapes, r"transformer_layes\.(\d+)\.", "layers"),
        )
    return ControlNetConfig(
        unet=own, hint_channels=hint_channels, hint_widths=widths, global_pool=global_pool
    )


def is_union(keys: Mapping[str, Shape]) -> bool:
    """Return whether a file with these keys is a ControlNet Union."""
    return UNION_MARK in keys


def _hint_widths(shapes: Mapping[str, Shape], layout: Layout) -> tuple[int, ...]:
    """Return the channels of the hint encoder's maps: of every second convolution but the last."""
    pattern, step = HINT_CONVOLUTIONS[layout]
    rows = {int(match[1]): size_of(shapes, key, 0) for key in shapes if (match := re.fullmatch(pattern, key))}
    if layout == "original":
        rows.pop(max(rows), None)  # the last convolution
    found = [size_of(shapes, LAYOUT_MARKS[layout], 0)]
    while (width := rows.get(step * (2 * len(found) - (layout == "diffusers")))) is not None:
        found.append(width)
    return tuple(found)


def _depth(shapes: Mapping[str, Shape], attention: str) -> int:
    """Return the number of transformer blocks of an attention."""
    pattern = rf"{re.escape(attention)}\.transformer_blocks\.(\d+)\."
    return count_of(shapes, pattern, f"blocks of {attention}")


def context_widths(shapes: Mapping[str, Shape]) -> set[int]:
    """Return the widths of the context that a control's attention reads."""
    ends = ("attn2.to_k.weight", "attn2.to_k.down")
    return {shape[1] for key, shape in shapes.items() if key.endswith(ends) and len(shape) > 1}


def made_for(shapes: Mapping[str, Shape]) -> str:
    """Return the family that a control was made for, in words; "" if no key shows it."""
    width = min(context_widths(shapes), default=None)
    return "" if width is None else WIDTHS.get(width, f"a model with a context of {width}")


def check_control_family(file: ControlFile, unet: UNetConfig, model: str) -> None:
    """Raise ValueError if a control's cross-attention reads another width than the UNet's."""
    shapes = shapes_in(file.tensors)
    family = made_for(shapes)
    widths = context_widths(shapes)
    if family and unet.context_dim not in widths:
        raise ValueError(
            f"{str(file.path)!r} was made for {family}: its attention reads a context of {min(widths)}, that"
            f" of {model!r} has {unet.context_dim}"
        )


def build_control_net(
    file: ControlFile,
    unet: UNetConfig,
    *,
    model: str,
    dtype: torch.dtype,
    base: Mapping[str, Tensor],
    global_pool: bool = False,
) -> ControlNet:
    """Return the ControlNet of a file, for a UNet.

    Args:
        file: The file or folder, of which `control_net_layout` is not None.
        unet: The UNet's configuration.
        model: Name of the model, for messages.
        dtype: Floating-point type of the weights.
        base: The UNet's tensors, to which a Control-LoRA or a difference is added.
        global_pool: Whether the file's kind averages residuals over positions; a folder's config.json may
            state it too. Default: False.

    Raises:
        ValueError: If it was made for another family, keys are missing, unexpected or misshapen, numbers are
            not finite, or its config.json states another network.
    """
    shapes = shapes_in(file.tensors)
    layout = control_net_layout(shapes)
    assert layout is not None
    check_control_family(file, unet, model)
    pool = global_pool or bool(file.config.get("global_pool_conditions"))
    config = control_net_config(shapes, layout, unet, global_pool=pool)
    if file.component is not None:
        for note in check_component("ControlNet", config, file.component):
            warn_user(note)
    network = cast(ControlNet, build_network(config))
    tensors = file.tensors
    if is_change(tensors):
        try:
            tensors = completed(file, network, layout, base)
        except ValueError as error:
            raise ValueError(f"{str(file.path)!r}: {error}") from None
    return cast(ControlNet, fill_network(network, tensors, layout, source=file.path, dtype=dtype))
