"""Build an IP-Adapter from a file, and the CLIP image tower that it reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from ldm.catalog.shapes import VISIONS
from ldm.models.clip.towers import CLIP, VisionTower
from ldm.models.control.ip_adapter import (
    HEAD,
    IPAdapter,
    IPAdapterConfig,
    cross_attentions,
    read_width,
)
from ldm.models.layers.attention import Attention
from ldm.weights.adapters.families import WIDTHS
from ldm.weights.controls.files import ControlFile
from ldm.weights.controls.shapes import count_of, shapes_in, size_of
from ldm.weights.formats.single_file import read_tensors
from ldm.weights.hugging_face_clip import load_hugging_face_clip
from ldm.weights.keymap import Shape, fit_table
from ldm.weights.parts import build_network, fill_network, shapes_of
from ldm.weights.rules.clip import clip_table

ATTENTIONS, PROJECTION = "ip_adapter.", "image_proj."
ATTENTION_KEY = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
IDENTITY_MARKS = {  # keys of kinds that read an embedding of a face's identity, which is not CLIP's
    "FaceID": f"{PROJECTION}norm.weight",
    "FaceID-Plus": f"{PROJECTION}perceiver_resampler.proj_in.weight",
}


def is_ip_adapter(shapes: Mapping[str, Shape]) -> bool:
    """Return whether keys are those of an IP-Adapter."""
    return any(key.startswith(ATTENTIONS) and key.endswith(".to_k_ip.weight") for key in shapes)


def ip_adapter_config(shapes: Mapping[str, Shape], *, source: str | Path) -> IPAdapterConfig:
    """Return the configuration of the IP-Adapter with these keys and shapes.

    Args:
        shapes: The shapes in the file, by key.
        source: The file, for messages.

    Raises:
        ValueError: If it is of a kind that reads the identity of a face, or of no known kind.
    """
    for name, mark in IDENTITY_MARKS.items():
        if mark in shapes and f"{PROJECTION}proj.weight" not in shapes:
            raise ValueError(
                f"{str(source)!r} is an IP-Adapter of the kind {name}, which reads a face's identity by"
                " another network; expected base, plus or full face"
            )
    matches = [match for key in shapes if (match := ATTENTION_KEY.fullmatch(key))]
    keys = [match[0] for match in sorted(matches, key=lambda match: int(match[1]))]
    widths = tuple(size_of(shapes, key, 0) for key in keys)
    context = size_of(shapes, keys[0], 1) if keys else 0
    own = {key.removeprefix(PROJECTION): shape for key, shape in shapes.items() if key.startswith(PROJECTION)}
    if "latents" in own and "proj_in.weight" in own and "layers.0.0.to_q.weight" in own:
        width = size_of(own, "latents", 2)
        return IPAdapterConfig(
            kind="plus",
            image_dim=size_of(own, "proj_in.weight", 1),
            context_dim=context,
            tokens=size_of(own, "latents", 1),
            widths=widths,
            resampler=(
                width,
                count_of(own, r"layers\.(\d+)\.", "blocks of the resampler"),
                size_of(own, "layers.0.0.to_q.weight", 0) // HEAD,
            ),
        )
    if "proj.3.weight" in own and "proj.0.weight" in own:
        return IPAdapterConfig(
            kind="full", image_dim=size_of(own, "proj.0.weight", 1), context_dim=context, widths=widths
        )
    if "proj.weight" in own and context:
        rows, width = (size_of(own, "proj.weight", axis) for axis in (0, 1))
        return IPAdapterConfig(image_dim=width, context_dim=context, tokens=rows // context, widths=widths)
    raise ValueError(f"{str(source)!r} is an IP-Adapter of no known kind: expected base, plus or full face")


def build_ip_adapter(
    file: ControlFile,
    widths: tuple[int, ...],
    context_dim: int | None,
    vision: VisionTower,
    *,
    model: str,
    dtype: torch.dtype,
) -> IPAdapter:
    """Return the IP-Adapter of a file, for a UNet and a CLIP image tower.

    Args:
        file: The file, for which `is_ip_adapter` is true.
        widths: Widths of the UNet's cross-attentions, in the order of `cross_attentions`.
        context_dim: Width of the UNet's context.
        vision: The tower.
        model: Name of the model, for messages.
        dtype: Floating-point type of the weights.

    Raises:
        ValueError: If it was made for another family or tower, keys are missing, unexpected or misshapen, or
            numbers are not finite.
    """
    shapes = shapes_in(file.tensors)
    config = ip_adapter_config(shapes, source=file.path)
    if config.context_dim != context_dim or config.widths != widths:
        family = WIDTHS.get(config.context_dim, f"a model with a context of {config.context_dim}")
        raise ValueError(
            f"{str(file.path)!r} was made for {family}: it has {len(config.widths)} attentions to a"
            f" context of {config.context_dim}, {model!r} has {len(widths)} to one of {context_dim}"
        )
    reads = read_width(config.kind, vision.config)
    if reads != config.image_dim:
        what = "an embedding" if config.kind == "base" else "hidden states"
        raise ValueError(
            f"{str(file.path)!r} reads {what} of width {config.image_dim}, those of the image tower have"
            f" {reads}: {advice(config)}"
        )
    network = build_network(config)
    return cast(IPAdapter, fill_network(network, file.tensors, "original", source=file.path, dtype=dtype))


def advice(config: IPAdapterConfig) -> str:
    """Return which tower an IP-Adapter of this configuration reads, in words."""
    names = {(1024, "base"): "ViT-H/14", (1280, "base"): "ViT-bigG/14", (1280, "plus"): "ViT-H/14"}
    found = names.get((config.image_dim, "base" if config.kind == "base" else "plus"))
    return f"pass vision= with CLIP's image tower{f' {found}' if found else ''}"


def load_vision(path: str | Path, dtype: torch.dtype) -> VisionTower:
    """Return CLIP's image tower, of a folder in Hugging Face layout, or of a file.

    Args:
        path: A folder with config.json and weights, or a file of ViT-L/14, ViT-H/14 or ViT-bigG/14 in
            open_clip's or Hugging Face's names, whole or the image tower alone.
        dtype: Floating-point type of the weights.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged or refused, or another network.
    """
    path = Path(path)
    if path.is_dir():
        model = load_hugging_face_clip(path, dtype=dtype)
        tower = model.visual if isinstance(model, CLIP) else model
        if not isinstance(tower, VisionTower):
            raise ValueError(f"{str(path)!r} is a text tower, expected CLIP's image tower")
        return tower.requires_grad_(False)
    tensors, _ = read_tensors(path)
    shapes = shapes_in(tensors)
    for config in VISIONS.values():
        network = build_network(config)
        if fit_table(clip_table(shapes_of(network), shapes), shapes, shapes_of(network)):
            return cast(VisionTower, fill_network(network, tensors, "original", source=path, dtype=dtype))
    raise ValueError(
        f"{str(path)!r} is no image tower of {', '.join(VISIONS)}; another one is read from a folder with its"
        " config.json"
    )


def attentions_of(network: nn.Module) -> dict[str, int]:
    """Return the widths of a network's attentions by name."""
    return {
        name: part.to_q.out_features for name, part in network.named_modules() if isinstance(part, Attention)
    }


def attention_widths(names: Mapping[str, int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the names and widths of a UNet's cross-attentions, in the order of the files.

    Args:
        names: Widths of its attentions by name, from `attentions_of`.
    """
    ordered = cross_attentions(list(names))
    return tuple(ordered), tuple(names[name] for name in ordered)
