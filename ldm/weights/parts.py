"""One network, one part of a published file: which rule table lies between them, in either layout, and the
way in and out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.models.clip.towers import TextConfig, TextTower, VisionConfig, VisionTower
from ldm.models.draft import Draft, DraftConfig
from ldm.models.labels import LabelConditioner, LabelConfig
from ldm.models.meta import on_meta
from ldm.models.movq import MoVQ, MoVQConfig
from ldm.models.text.bert import BertConfig, LDMBert
from ldm.models.text.xlmr import XLMR, XLMRConfig
from ldm.models.tiny import AutoencoderTiny, TinyConfig
from ldm.models.unclip.autoregressive import AutoregressiveConfig, AutoregressivePrior
from ldm.models.unclip.decoder import Decoder, DecoderConfig
from ldm.models.unclip.noise_augmentation import AugmentationConfig, NoiseAugmentation
from ldm.models.unclip.prior import Prior, PriorConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.models.vq import VQConfig, VQModel
from ldm.weights.keymap import IDENTITY, Section, Shape, Table, from_file, to_file
from ldm.weights.rules.bert import bert_table
from ldm.weights.rules.clip import clip_table
from ldm.weights.rules.decoder import decoder_table
from ldm.weights.rules.prior import prior_table
from ldm.weights.rules.unet import unet_table
from ldm.weights.rules.vae import DIFFUSERS, vae_table
from ldm.weights.rules.xlmr import XLMR_TABLE
from ldm.weights.strict import load_strict

Layout = Literal["original", "diffusers"]
NETWORKS: dict[type, type[nn.Module]] = {
    UNetConfig: UNet,
    VAEConfig: AutoencoderKL,
    VQConfig: VQModel,
    TinyConfig: AutoencoderTiny,
    TextConfig: TextTower,
    VisionConfig: VisionTower,
    BertConfig: LDMBert,
    LabelConfig: LabelConditioner,
    DraftConfig: Draft,
    PriorConfig: Prior,
    AutoregressiveConfig: AutoregressivePrior,
    DecoderConfig: Decoder,
    MoVQConfig: MoVQ,
    AugmentationConfig: NoiseAugmentation,
    XLMRConfig: XLMR,
}
SAME_NAMES = Table((Section("", "", IDENTITY),))


def build_network(config: Any) -> nn.Module:
    """The network of a configuration, on the meta device: shapes without data."""
    with on_meta():
        return NETWORKS[type(config)](config)


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """The names and shapes of a network's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def part_table(module: nn.Module, layout: Layout, keys: Iterable[str]) -> Table:
    """The table between a network and its part of a file; ``keys``, those of the part, tell how a CLIP tower
    is spelled.

    ValueError for a network that the layout cannot hold.
    """
    names = shapes_of(module)
    if isinstance(module, TextTower):
        table = clip_table(names, keys)  # in SD 2's files stands one block more than the model runs
        return replace(table, ignore=(*table.ignore, f"transformer.resblocks.{module.config.layers}.*"))
    if isinstance(module, VisionTower):
        return clip_table(names, keys)
    if isinstance(module, Prior):
        return prior_table(module.config, layout)
    if isinstance(module, Decoder):
        return decoder_table(module.config, names, layout)
    if isinstance(module, XLMR):
        return XLMR_TABLE
    if layout == "diffusers":
        return replace(SAME_NAMES, ignore=("to_logits.*",)) if isinstance(module, LDMBert) else DIFFUSERS
    if isinstance(module, UNet):
        config = module.config
        if config.attention != "block":
            return unet_table(names)
        if isinstance(config.heads, tuple):
            raise ValueError(
                "a UNet with AttentionBlocks of different numbers of heads has no original layout"
            )
        return unet_table(names, heads=config.heads, head_dim=config.head_dim)
    if isinstance(module, AutoencoderKL | VQModel):
        return vae_table(names)
    return bert_table(names) if isinstance(module, LDMBert) else SAME_NAMES


def fill_network(
    module: nn.Module,
    state: Mapping[str, Tensor],
    layout: Layout,
    *,
    source: str | Path,
    dtype: torch.dtype | None,
) -> nn.Module:
    """A network on the meta device, given the tensors of its part of a file, in a dtype; ValueError lists the
    keys that do not fit."""
    ours = from_file(part_table(module, layout, state), state, shapes_of(module), source=source)
    load_strict(module, ours, source=source, dtype=dtype)
    return module.eval().requires_grad_(False)


def to_layout(module: nn.Module, layout: Layout, *, hugging_face: bool = True) -> dict[str, Tensor]:
    """A network's tensors under the names of a layout, contiguous; ``hugging_face``: how a CLIP tower is
    spelled, else as open_clip does."""
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    spelled = ("text_model.", "vision_model.") if hugging_face else ()
    return {
        key: tensor.contiguous()
        for key, tensor in to_file(part_table(module, layout, spelled), state).items()
    }


def randomise(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network on the meta device, given random weights that keep the size of signals: nothing is left at
    zero or one.

    Matrices and filters are uniform with deviation 1/sqrt(inputs), norms about 1, biases about 0, embeddings
    within ±1.
    """
    module.to(dtype).to_empty(device="cpu")  # on meta the change of dtype costs nothing
    for part in module.modules():
        if hasattr(part, "reset_buffers"):
            part.reset_buffers()
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                p.uniform_(-0.1, 0.1, generator=generator).add_(1.0 if name.endswith("weight") else 0.0)
            else:
                p.uniform_(-1.0, 1.0, generator=generator).mul_(
                    1.0 if id(p) in embeddings else (3.0 / p[0].numel()) ** 0.5
                )
    return module.eval().requires_grad_(False)
