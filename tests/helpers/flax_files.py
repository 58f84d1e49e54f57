"""Flax's files: MessagePack as flax writes it, and the parameters of DALL·E Mini as flax names them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tiny_dalle import without_scales
from torch import Tensor, nn

from ldm.pipelines.dalle.pipeline import DalleMini
from ldm.weights.parts import to_layout

FLAX_MODULES = {  # PyTorch's name: flax's
    "pre_self_attn_layer_norm": "LayerNorm_0",
    "self_attn_layer_norm": "LayerNorm_1",
    "pre_encoder_attn_layer_norm": "LayerNorm_2",
    "encoder_attn_layer_norm": "LayerNorm_3",
    "self_attn": "FlaxBartAttention_0",
    "encoder_attn": "FlaxBartAttention_1",
    "glu": "GLU_0",
}
GLU = {"ln0": "LayerNorm_0", "ln1": "LayerNorm_1", "fc0": "Dense_0", "fc1": "Dense_1", "fc2": "Dense_2"}


def packed(value: Any) -> bytes:
    """Return a value as MessagePack, as flax writes it."""
    if isinstance(value, Mapping):
        head = bytes([0x80 | len(value)]) if len(value) < 16 else b"\xde" + struct.pack(">H", len(value))
        return head + b"".join(packed(key) + packed(item) for key, item in value.items())
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0xA0 | len(text)]) if len(text) < 32 else b"\xd9" + bytes([len(text)])) + text
    if isinstance(value, np.ndarray):
        data = value.tobytes()
        shape = bytes([0x90 | value.ndim]) + b"".join(packed(n) for n in value.shape)
        inner = b"\x93" + shape + packed(value.dtype.name) + b"\xc6" + struct.pack(">I", len(data)) + data
        return b"\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    return bytes([value]) if value < 128 else b"\xce" + struct.pack(">I", value)


def whole_state(pipe: DalleMini) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that was converted from flax to PyTorch."""
    parts = {"encoder": pipe.encoder, "decoder": pipe.decoder}
    state = {
        f"model.{part}.{key}": value
        for part, network in parts.items()
        for key, value in without_scales(to_layout(network, "original")).items()
    }
    return {
        ("lm_head.weight" if key.endswith("lm_head.weight") else key): value for key, value in state.items()
    }


def flax_tree(pipe: DalleMini, *, scanned: bool) -> dict[str, Any]:
    """Return the tree of flax's parameters, with the layers stacked or not."""
    tree: dict[str, Any] = {}
    stacks: dict[str, list[Any]] = {}
    for name, value in whole_state(pipe).items():
        pieces = name.split(".")
        leaf = {"weight": "kernel", "bias": "bias"}[pieces[-1]]
        if "embed" in pieces[-2] and "layernorm" not in pieces[-2]:
            leaf = "embedding"
        elif leaf == "kernel" and value.ndim == 1:
            leaf = "scale"
        array = (value.T if leaf == "kernel" else value).contiguous().numpy()
        inner = [FLAX_MODULES.get(piece, piece) for piece in pieces[:-1]]
        if "layers" in inner:
            at = inner.index("layers") + 1
            if "GLU_0" in inner:
                inner[-1] = GLU[inner[-1]]
            kind = "FlaxBart" + pieces[1].title() + "Layer"
            i, inner[at] = inner[at], f"{kind}s" if scanned else f"{kind}_{inner[at]}"
            if scanned:
                stacks.setdefault("/".join([*inner, leaf]), []).append((int(i), array))
                continue
        put(tree, [*inner, leaf], array)
    for path, arrays in stacks.items():
        layers = [torch.from_numpy(array) for _, array in sorted(arrays, key=lambda pair: pair[0])]
        put(tree, path.split("/"), torch.stack(layers).numpy())
    return tree


def put(tree: dict[str, Any], pieces: list[str], value: Any) -> None:
    for piece in pieces[:-1]:
        tree = tree.setdefault(piece, {})
    tree[pieces[-1]] = value


def flax_autoencoder(vae: nn.Module) -> dict[str, Any]:
    """Return the tree of a VQGAN's parameters in flax."""
    tree: dict[str, Any] = {}
    for name, value in to_layout(vae, "original").items():
        pieces, leaf = name.split(".")[:-1], name.split(".")[-1]
        for i, piece in enumerate(pieces):
            if piece.isdecimal():
                pieces[i - 1] += f"_{piece}"
        pieces = [piece for piece in pieces if not piece.isdecimal()]
        if leaf == "weight":
            leaf = "embedding" if "embedding" in pieces else "kernel" if value.ndim == 4 else "scale"
        array = value.permute(2, 3, 1, 0) if leaf == "kernel" else value
        put(tree, [*pieces, leaf], array.contiguous().numpy())
    return tree
