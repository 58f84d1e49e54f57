"""Adapters with random values, in the spellings of different trainers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers_pipelines import diffusers_network
from torch import Tensor, nn

from ldm.weights.formats.safetensors import write_safetensors

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
RESIDUAL = ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
KOHYA = {"unet": "lora_unet_", "text": "lora_te_"}
KOHYA_XL = {"unet": "lora_unet_", "text": "lora_te1_", "text2": "lora_te2_"}
COMPONENTS = {"unet": "unet", "text": "text_encoder", "text2": "text_encoder_2"}


def peers(pipe: Any) -> dict[str, nn.Module]:
    """Return copies of a pipeline's UNet and text towers as networks of diffusers and transformers."""
    networks = pipe.networks()
    return {part: diffusers_network(copy.deepcopy(networks[part])) for part in COMPONENTS if part in networks}


def targets(network: nn.Module, endings: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions of a network whose names end with one of the endings."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and any(name == end or name.endswith(f".{end}") for end in endings)
    }


def hugging_face(name: str) -> str:
    """Return the name of a text tower's module with the prefix that files have."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def lora_tensors(module: nn.Module, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random down and up matrices of a layer, as large as its weight is."""
    out, inner = module.weight.shape[:2]
    kernel = tuple(module.weight.shape[2:])
    down = torch.randn(rank, inner, *kernel, generator=generator) * module.weight[0].numel() ** -0.5
    up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * rank**-0.5
    return down, up


def kohya_lora(
    networks: dict[str, nn.Module], prefixes: dict[str, str], *, rank: int = 4, alpha: float = 3.0
) -> dict[str, Tensor]:
    """Return a LoRA of the attentions, convolutions and text towers in kohya's names and diffusers' stems."""
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}
    for part, network in networks.items():
        for name, module in targets(network, TEXT if part != "unet" else (*ATTENTION, *RESIDUAL)).items():
            name = name if part == "unet" else hugging_face(name)
            stem = prefixes[part] + name.replace(".", "_")
            state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"] = lora_tensors(
                module, rank, generator
            )
            state[f"{stem}.alpha"] = torch.tensor(alpha)
    return state


def written(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write an adapter file and return its path."""
    write_safetensors(path, {name: value.contiguous() for name, value in state.items()}, metadata)
    return path


@torch.no_grad()
def add_lora(networks: dict[str, nn.Module], state: dict[str, Tensor], prefixes: dict[str, str]) -> None:
    """Add a LoRA in kohya's names to networks, by its definition: W + alpha / r · up · down."""
    for part, network in networks.items():
        for name, module in network.named_modules():
            name = name if part == "unet" else hugging_face(name)
            stem = prefixes[part] + name.replace(".", "_")
            if f"{stem}.alpha" in state:
                down, up = state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"]
                product = (up.flatten(1) @ down.flatten(1)).view(module.weight.shape)
                module.weight += state[f"{stem}.alpha"] / len(down) * product


def weights_of(pipe: Any) -> dict[str, Tensor]:
    """Return copies of all weights of a pipeline."""
    return {name: value.clone() for name, value in pipe.state_dict().items()}


def same_bits(pipe: Any, before: dict[str, Tensor]) -> bool:
    """Return whether all weights of a pipeline have the same bits as before."""
    now = pipe.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)
