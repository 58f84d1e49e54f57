"""Small UNets and autoencoders with random weights, and their inputs, for the tests of `ldm.speed`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.speed.kept_forms import derived
from ldm.speed.kernels.build import NoKernels, library
from ldm.weights.parts import randomise

BARS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # permitted relative RMS error of exact optimizations
UNETS = {
    "sd": UNetConfig(channels=(32, 64), depth=(1, 1), blocks=1, heads=4, context_dim=24),
    "linear": UNetConfig(
        channels=(32, 64),
        depth=(0, 2),
        blocks=1,
        heads=None,
        head_dim=8,
        context_dim=24,
        linear_projection=True,
        pooled_dim=12,
    ),
    "decoder": UNetConfig(
        channels=(32, 64),
        depth=(0, 1),
        blocks=1,
        heads=None,
        head_dim=8,
        context_dim=24,
        attention="block",
        scale_shift=True,
        resample="resblock",
    ),
}


def rms(a: Tensor, b: Tensor) -> float:
    """Return the RMS of a − b, divided by the standard deviation of b."""
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().std())


def has_kernels() -> bool:
    """Return whether the compiled kernels are available."""
    try:
        return bool(library())
    except NoKernels:
        return False


def kept(part: nn.Module, name: str) -> bool:
    """Return whether a layer keeps something derived from its weight."""
    return derived(part, name).value is not None


def make(config: UNetConfig | VAEConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a network with random weights."""
    with torch.device("meta"):
        net = UNet(config) if isinstance(config, UNetConfig) else AutoencoderKL(config)
    return randomise(net, dtype=dtype)


def inputs(config: UNetConfig, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor, Cond]:
    """Return x_t (B, 4, 12, 10), t (B,) and the condition of a UNet."""
    g = torch.Generator().manual_seed(5)
    pooled = torch.randn(batch, config.pooled_dim, generator=g).to(dtype) if config.pooled_dim else None
    cond = Cond(
        context=torch.randn(batch, 7, 24, generator=g).to(dtype),
        context_mask=torch.arange(7).expand(batch, 7) < 5,
        pooled=pooled,
    )
    return torch.randn(batch, 4, 12, 10, generator=g).to(dtype), torch.tensor([10.0, 700.0])[:batch], cond
