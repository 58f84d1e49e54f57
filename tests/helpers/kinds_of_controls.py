"""Controls of every kind with random weights, for a small UNet, and the shapes of their files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from control_nets import reduced_config
from kinds_of_adapters import CONTEXT, UNET
from torch import Tensor

from ldm.models.clip.towers import VisionConfig, VisionTower
from ldm.models.control.control_net import ControlNet, ControlNetConfig
from ldm.models.control.ip_adapter import IPAdapterConfig, TokenKind
from ldm.models.control.lllite import LLLiteConfig, LLLiteLayer
from ldm.models.control.t2i_adapter import T2IAdapterConfig
from ldm.models.control.union import UnionConfig
from ldm.weights.controls.building import Target
from ldm.weights.controls.ip_adapter import attention_widths, attentions_of
from ldm.weights.parts import Layout, build_network, randomise, to_layout

FACTOR = 2  # size of a hint divided by that of the latent
ATTENTION = "lllite_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
IMAGE_DIM, STATES = 24, 32  # widths of the image tower's embedding and of its states


def target(*, vision: bool = False) -> Target:
    """Return the model that the controls are for."""
    unet = base_model()
    return Target(
        model="small",
        network=UNET,
        factor=FACTOR,
        dtype=torch.float32,
        attentions=attentions_of(unet),
        vision=image_tower() if vision else None,
        base=unet.state_dict(),
    )


@cache
def base_model() -> Any:
    """Return the UNet, with random weights."""
    return randomise(build_network(UNET))


@cache
def image_tower() -> VisionTower:
    """Return an image tower for IP-Adapters."""
    config = VisionConfig(image_size=8, patch_size=4, width=STATES, layers=2, heads=2, embed_dim=IMAGE_DIM)
    tower = randomise(build_network(config))
    assert isinstance(tower, VisionTower)
    return tower


def _ip_adapter(kind: TokenKind) -> IPAdapterConfig:
    widths = attention_widths(attentions_of(base_model()))[1]
    read = IMAGE_DIM if kind == "base" else STATES
    return IPAdapterConfig(
        kind=kind, image_dim=read, context_dim=CONTEXT, widths=widths, resampler=(32, 1, 1)
    )


def _configs() -> dict[str, tuple[Any, Layout]]:
    """Return the configuration and the layout of each kind."""
    own = ControlNetConfig.of_unet(UNET).unet
    adapter = {"unshuffle": FACTOR, "channels": (32, 64), "halved": (False, True)}
    layer = LLLiteLayer(name=ATTENTION, width=32, embed=8, hidden=4, depth=1)
    return {
        "ControlNet": (reduced_config(UNET), "original"),
        "ControlNet of diffusers": (reduced_config(UNET), "diffusers"),
        "ControlNet Union": (UnionConfig(unet=own, hint_widths=(8, 16), types=6), "diffusers"),
        "T2I-Adapter": (T2IAdapterConfig(**adapter), "original"),
        "T2I-Adapter of diffusers": (T2IAdapterConfig(**adapter), "diffusers"),
        "light T2I-Adapter": (T2IAdapterConfig(**adapter, light=True, blocks=3), "original"),
        "IP-Adapter": (_ip_adapter("base"), "original"),
        "IP-Adapter Plus": (_ip_adapter("plus"), "original"),
        "IP-Adapter full face": (_ip_adapter("full"), "original"),
        "ControlNet-LLLite": (LLLiteConfig(layers=(layer,)), "original"),
    }


@cache
def control_states() -> dict[str, Mapping[str, Tensor]]:
    """Return the tensors of a file of each kind."""
    found: dict[str, Mapping[str, Tensor]] = {
        kind: to_layout(randomise(build_network(config)), layout)
        for kind, (config, layout) in _configs().items()
    }
    return {
        **found,
        "Control-LoRA": control_lora(),
        "difference": {**found["ControlNet"], "difference": torch.ones(1)},
    }


def control_lora() -> dict[str, Tensor]:
    """Return a Control-LoRA: factors in place of the UNet's matrices."""
    network = randomise(build_network(reduced_config(UNET)))
    assert isinstance(network, ControlNet)
    kept = ("zero_convs", "input_hint_block", "middle_block_out")
    state: dict[str, Tensor] = {"lora_controlnet": torch.zeros(0)}
    for key, value in to_layout(network, "original").items():
        if key.startswith(kept) or value.ndim == 1:
            state[key] = value
        else:
            stem = key.removesuffix(".weight")
            state[f"{stem}.up"] = torch.ones(len(value), 2, *[1] * (value.ndim - 2))
            state[f"{stem}.down"] = torch.ones(2, *value.shape[1:])
    return state
