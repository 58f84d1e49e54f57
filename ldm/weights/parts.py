"""Build the network of a configuration, and map its tensors to and from the layouts of published files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.models.clip.towers import TextConfig, TextTower, VisionConfig, VisionTower
from ldm.models.control.control_net import ControlNet, ControlNetConfig
from ldm.models.control.dit_control import DiTControl, DiTControlConfig
from ldm.models.control.ip_adapter import IPAdapter, IPAdapterConfig
from ldm.models.control.lllite import LLLite, LLLiteConfig
from ldm.models.control.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.control.union import UnionConfig, UnionControlNet
from ldm.models.dalle.decoder import DalleDecoder, DalleDecoderConfig
from ldm.models.dalle.detokenizer import Detokenizer, DetokenizerConfig
from ldm.models.dalle.dvae import DVAE, DVAEConfig
from ldm.models.dalle.encoder import DalleEncoder, DalleEncoderConfig, StateEncoder, StateEncoderConfig
from ldm.models.dit import DiT, DiTConfig
from ldm.models.draft import Draft, DraftConfig
from ldm.models.labels import LabelConditioner, LabelConfig
from ldm.models.meta import on_meta
from ldm.models.movq import MoVQ, MoVQConfig
from ldm.models.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from ldm.models.patch_vq import PatchVQ, PatchVQConfig
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
from ldm.support.config import check_sizes
from ldm.support.text import escaped
from ldm.weights.keymap import IDENTITY, Section, Shape, Table, from_file, to_file
from ldm.weights.rules.bert import bert_table
from ldm.weights.rules.clip import clip_table
from ldm.weights.rules.control import control_net_table, t2i_adapter_table
from ldm.weights.rules.dalle import DALLE_TABLE, detokenizer_table
from ldm.weights.rules.decoder import decoder_table
from ldm.weights.rules.prior import prior_table
from ldm.weights.rules.unet import unet_table
from ldm.weights.rules.vae import DIFFUSERS, vae_table
from ldm.weights.rules.xlmr import XLMR_TABLE
from ldm.weights.strict import ResetsBuffers, load_strict

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
    DiTConfig: DiT,
    PatchAutoencoderConfig: PatchAutoencoder,
    PatchVQConfig: PatchVQ,
    PriorConfig: Prior,
    AutoregressiveConfig: AutoregressivePrior,
    DecoderConfig: Decoder,
    MoVQConfig: MoVQ,
    AugmentationConfig: NoiseAugmentation,
    XLMRConfig: XLMR,
    ControlNetConfig: ControlNet,
    DiTControlConfig: DiTControl,
    UnionConfig: UnionControlNet,
    T2IAdapterConfig: T2IAdapter,
    IPAdapterConfig: IPAdapter,
    LLLiteConfig: LLLite,
    DalleEncoderConfig: DalleEncoder,
    StateEncoderConfig: StateEncoder,
    DalleDecoderConfig: DalleDecoder,
    DetokenizerConfig: Detokenizer,
    DVAEConfig: DVAE,
}
SAME_NAMES = Table((Section("", "", IDENTITY),))


def build_network(config: object) -> nn.Module:
    """Return the network of a configuration on the meta device: shapes without data.

    Raises:
        ValueError: If no network has this configuration, or it would be implausibly large.
    """
    build: Callable[[object], nn.Module] = NETWORKS[type(config)]
    check_sizes(config, type(config).__name__)
    try:
        with on_meta():
            return build(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AssertionError) as error:
        raise ValueError(f"{type(config).__name__}: {escaped(error, 300)}") from error


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Return the names and shapes of a network's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def part_table(module: nn.Module, layout: Layout, keys: Iterable[str]) -> Table:
    """Return the table between a network and its part of a file.

    Args:
        module: The network.
        layout: Layout of the file.
        keys: Names in the file, which determine the spelling of a CLIP tower.

    Raises:
        ValueError: If the layout cannot hold the network.
    """
    names = shapes_of(module)
    if isinstance(module, TextTower):
        table = clip_table(names, keys)  # SD 2's files have one block more than the model
        return replace(table, ignore=(*table.ignore, f"transformer.resblocks.{module.config.layers}.*"))
    if isinstance(module, VisionTower):
        return clip_table(names, keys)
    if isinstance(module, Prior):
        return prior_table(module.config, layout)
    if isinstance(module, Decoder):
        return decoder_table(module.config, names, layout)
    if isinstance(module, XLMR):
        return XLMR_TABLE
    if isinstance(module, DalleEncoder | DalleDecoder):
        return DALLE_TABLE
    if isinstance(module, Detokenizer) and layout == "original":
        return detokenizer_table(names)
    if layout == "diffusers":
        return replace(SAME_NAMES, ignore=("to_logits.*",)) if isinstance(module, LDMBert) else DIFFUSERS
    if isinstance(module, UNet):
        config = module.config
        if config.attention != "block":
            return unet_table(names)
        if isinstance(config.heads, tuple):
            raise ValueError(
                f"heads: expected one number for all AttentionBlocks in the original layout, got"
                f" {config.heads}"
            )
        return unet_table(names, heads=config.heads, head_dim=config.head_dim)
    if isinstance(module, ControlNet):
        return control_net_table(names)
    if isinstance(module, T2IAdapter):
        return t2i_adapter_table(module.config)
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
    """Load its part of a file into a network on the meta device, and return it in evaluation mode.

    Args:
        module: The network.
        state: The tensors of the part.
        layout: Layout of the file.
        source: The file, for messages.
        dtype: Floating-point type to which the weights are converted; None leaves them as they are.

    Raises:
        ValueError: If names are missing, unexpected or misshapen, or weights are not finite.
    """
    ours = from_file(part_table(module, layout, state), state, shapes_of(module), source=source)
    load_strict(module, ours, source=source, dtype=dtype)
    return module.eval().requires_grad_(False)


def to_layout(module: nn.Module, layout: Layout, *, hugging_face: bool = True) -> dict[str, Tensor]:
    """Return a network's tensors under the names of a layout, contiguous.

    Args:
        module: The network.
        layout: The layout.
        hugging_face: Whether a CLIP tower has Hugging Face's names; otherwise it has open_clip's.
    """
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    spelled = ("text_model.", "vision_model.") if hugging_face else ()
    return {
        key: tensor.contiguous()
        for key, tensor in to_file(part_table(module, layout, spelled), state).items()
    }


def randomise(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fill a network on the meta device with random weights that preserve the scale of signals; return it.

    Matrices and filters are uniform with standard deviation 1/sqrt(inputs), norms close to 1, biases close to
    0, embeddings uniform in [−1, 1]. No weight is exactly zero or one.

    Args:
        module: The network.
        seed: Seed of the generator. Default: 0.
        dtype: Floating-point type of the weights. Default: float32.
    """
    module.to(dtype).to_empty(device="cpu")  # on the meta device a change of dtype is free
    for part in module.modules():
        if isinstance(part, ResetsBuffers):
            part.reset_buffers()
    generator = torch.Generator("cpu").manual_seed(seed)
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
