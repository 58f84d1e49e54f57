"""Networks of ldm and of its peers with the same weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.shapes import UNETS, VAES
from ldm.diffusion.cond import Cond
from ldm.models.layers.embeddings import vector_condition
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import AutoencoderKL
from ldm.weights.formats.diffusers_config import unet_config, vae_config
from ldm.weights.parts import build_network, randomise, to_layout

MODELS = ("sd1", "sd2", "sdxl", "small")
SMALL = UNetConfig(channels=(320, 640), depth=(1, 1), blocks=1)


def our_unet(model: str, dtype: torch.dtype) -> UNet:
    """Return a UNet of ldm with random weights; "small" has two levels of Stable Diffusion 1's widths."""
    made = randomise(build_network(SMALL if model == "small" else UNETS[model]), dtype=dtype)
    assert isinstance(made, UNet)
    return made


def unets(model: str, dtype: torch.dtype) -> tuple[UNet, nn.Module]:
    """Return a UNet of ldm and of diffusers with the same random weights; models as in `our_unet`."""
    ours = our_unet(model, dtype)
    return ours, peer_unet(ours)


def peer_unet(ours: UNet) -> nn.Module:
    """Return the UNet of diffusers that shares the weights of one of ldm."""
    import diffusers

    name, about = unet_config(ours.config)
    return _peer(getattr(diffusers, name), about, ours)


def our_vae(model: str, dtype: torch.dtype) -> AutoencoderKL:
    """Return an autoencoder of ldm with random weights; "small" has a quarter of the channels."""
    base = VAES["kl-f8"]
    made = randomise(
        build_network(replace(base, channels=(32, 64, 128, 128)) if model == "small" else base), dtype=dtype
    )
    assert isinstance(made, AutoencoderKL)
    return made


def vaes(model: str, dtype: torch.dtype) -> tuple[AutoencoderKL, Any]:
    """Return an autoencoder of ldm and of diffusers with the same random weights; models as in `our_vae`."""
    import diffusers

    ours = our_vae(model, dtype)
    name, about = vae_config(ours.config, 0.18215)
    return ours, _peer(getattr(diffusers, name), about, ours)


def _peer(kind: Any, about: dict[str, Any], ours: nn.Module) -> nn.Module:
    with torch.device("meta"):
        theirs = kind(**{key: value for key, value in about.items() if not key.startswith("_")})
    theirs.load_state_dict(to_layout(ours, "diffusers"), assign=True)  # shares memory
    return theirs.eval().requires_grad_(False)


def unet_inputs(
    ours: nn.Module, batch: int, latent: int, tokens: int, dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same inputs as arguments of ldm's UNet and of the peer's."""
    g = torch.Generator().manual_seed(0)
    config = ours.config
    x = torch.randn(batch, config.in_channels, latent, latent, generator=g).to(dtype)
    t, context = (
        torch.full((batch,), 500.0),
        torch.randn(batch, tokens, config.context_dim, generator=g).to(dtype),
    )
    theirs: dict[str, Any] = {"sample": x, "timestep": t, "encoder_hidden_states": context}
    pooled: Tensor | None = None
    if config.pooled_dim:
        text, numbers = (
            torch.randn(batch, 1280, generator=g).to(dtype),
            torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * batch),
        )
        theirs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": numbers}
        pooled = vector_condition(text, numbers)
    return (x, t, Cond(context=context, pooled=pooled)), theirs


def openvino_module(module: nn.Module, example: dict[str, Any], dtype: torch.dtype, threads: int) -> Any:
    """Return the peer's network compiled by OpenVINO with its inputs; None if OpenVINO is not installed."""
    try:
        import openvino as ov
    except ImportError:
        return None
    wide = {
        key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in example.items()
    }
    model = ov.convert_model(copy.deepcopy(module).float(), example_input=wide)
    hint = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
    options = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(model, "CPU", options)
    given = [value.numpy() for value in wide.values()]
    return lambda: torch.from_numpy(next(iter(compiled(given).values())))
