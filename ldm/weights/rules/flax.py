"""Names of flax's parameters as PyTorch's, for the models of DALL·E Mini.

Kernels of dense layers are transposed, those of convolutions are (height, width, inputs, outputs); layers
that flax scans are stacked along a leading axis; a norm's scale is PyTorch's weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ldm.support.text import shown

# modules that flax numbers by their order, in an encoder's layer and in a decoder's
ENCODER_MODULES = {
    "FlaxBartAttention_0": "self_attn",
    "LayerNorm_0": "pre_self_attn_layer_norm",
    "LayerNorm_1": "self_attn_layer_norm",
}
DECODER_MODULES = {
    **ENCODER_MODULES,
    "FlaxBartAttention_1": "encoder_attn",
    "LayerNorm_2": "pre_encoder_attn_layer_norm",
    "LayerNorm_3": "encoder_attn_layer_norm",
}
GLU_MODULES = {
    "LayerNorm_0": "ln0",
    "LayerNorm_1": "ln1",
    "Dense_0": "fc0",
    "Dense_1": "fc1",
    "Dense_2": "fc2",
}
FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
SCANNED = re.compile(r"layers/FlaxBart(?:En|De)coderLayers/")
ONE_LAYER = re.compile(r"layers/FlaxBart(?:En|De)coderLayer_(\d+)/")
MAX_LAYERS = 1000  # that a scanned tensor holds
NUMBERED = re.compile(r"(?<=/)(up|down|block|attn)_(\d+)(?=/)")


def torch_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a flax file under PyTorch's names and in its orders, as views.

    Args:
        state: Tensors by names whose pieces are joined by "/", with or without "params/" before them.

    Raises:
        ValueError: If two tensors get one name, or a stack of layers is none.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("params/")
        scanned = bool(SCANNED.search(name))
        name = ONE_LAYER.sub(r"layers/\1/", SCANNED.sub("layers/*/", name))
        *modules, leaf = _renamed(name).split("/")
        if scanned and not (tensor.ndim and len(tensor) <= MAX_LAYERS):
            raise ValueError(
                f"{shown(name)}: expected a stack of at most {MAX_LAYERS} layers, got {tuple(tensor.shape)}"
            )
        layers = tensor.unbind(0) if scanned else (tensor,)
        for i, layer in enumerate(layers):
            key = ".".join(
                [str(i) if piece == "*" else piece for piece in modules] + [FLAX_LEAVES.get(leaf, leaf)]
            )
            if key in found:
                raise ValueError(f"two tensors of the flax file are called {key!r} in PyTorch")
            found[key] = _turned(layer) if leaf == "kernel" else layer
    return found


def _renamed(name: str) -> str:
    """Return a name with the modules of a layer called as in PyTorch, and the lists of a VQGAN as lists.

    In an autoencoder "block_1" is the first of two blocks at the smallest size; elsewhere it is an element of
    a list.
    """
    pieces = name.split("/")
    if "layers" in pieces:
        at = pieces.index("layers") + 2  # behind the number of the layer
        if pieces[at : at + 1] == ["GLU_0"] and len(pieces) > at + 1:
            pieces[at : at + 2] = ["glu", GLU_MODULES.get(pieces[at + 1], pieces[at + 1])]
        elif len(pieces) > at:
            modules = DECODER_MODULES if "decoder" in pieces[: at - 2] else ENCODER_MODULES
            pieces[at] = modules.get(pieces[at], pieces[at])
        return "/".join(pieces)
    return name if "/mid/" in name else NUMBERED.sub(r"\1/\2", name)


def _turned(kernel: Tensor) -> Tensor:
    """Return the kernel of a dense layer (in, out) or a convolution (h, w, in, out) as PyTorch's weight."""
    return kernel.t() if kernel.ndim == 2 else kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel
