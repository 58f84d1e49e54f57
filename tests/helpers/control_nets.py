"""ControlNets with random weights: ours, and those of diffusers over the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ldm.models.control.control_net import ControlNet, ControlNetConfig
from ldm.models.control.t2i_adapter import T2IAdapter
from ldm.models.unet_config import UNetConfig
from ldm.weights.formats.diffusers_config import unet_config
from ldm.weights.parts import build_network, randomise, to_layout

UNET_ONLY = ("out_channels", "sample_size", "up_block_types", "time_cond_proj_dim", "dropout")


def reduced_config(unet: UNetConfig, **changes: Any) -> ControlNetConfig:
    """Return the shape of a small ControlNet, whose hints have twice the size of the latent."""
    own = ControlNetConfig.of_unet(unet)
    return ControlNetConfig(unet=own.unet, hint_widths=(8, 16), **changes)


def random_control_net(config: ControlNetConfig, seed: int = 5) -> ControlNet:
    """Return a ControlNet whose weights are random; the convolutions that begin as zero are, too."""
    made: Any = randomise(build_network(config), seed)
    return made


def peer_config(config: ControlNetConfig) -> dict[str, Any]:
    """Return the configuration of diffusers' ControlNet."""
    _, own = unet_config(config.unet)
    kept = {name: value for name, value in own.items() if name not in UNET_ONLY and not name.startswith("_")}
    return {
        **kept,
        "conditioning_channels": config.hint_channels,
        "conditioning_embedding_out_channels": list(config.hint_widths),
        "global_pool_conditions": config.global_pool,
    }


def peer_of(network: ControlNet) -> Any:
    """Return diffusers' ControlNet over the same tensors."""
    with torch.device("meta"):
        theirs = diffusers.ControlNetModel.from_config(peer_config(network.control))
    theirs.load_state_dict(to_layout(network, "diffusers"), assign=True, strict=True)
    return theirs.eval().requires_grad_(False)


def lines(side: int, seed: int = 0) -> Tensor:
    """Return a hint of white lines on black, (1, 3, side, side)."""
    places = torch.randperm(side, generator=torch.Generator().manual_seed(seed))
    hint = torch.zeros(1, 3, side, side)
    hint[..., places[0], :] = 1
    hint[..., places[1]] = 1
    return hint


def write_png(path: Path, image: Tensor) -> Path:
    """Write an image (1, 3, H, W) in [0, 1] as a PNG, and return its path."""
    from PIL import Image

    pixels = (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(path)
    return path


def adapter_peer(network: T2IAdapter) -> Any:
    """Return diffusers' T2I-Adapter over the same tensors."""
    config = network.config
    kind = "light_adapter" if config.light else "full_adapter" + ("" if config.halved[1] else "_xl")
    channels = config.channels[:-1] if config.light else config.channels
    theirs = diffusers.T2IAdapter(
        in_channels=config.hint_channels,
        channels=list(channels),
        num_res_blocks=config.blocks,
        downscale_factor=config.unshuffle,
        adapter_type=kind,
    )
    state = {f"adapter.{name}": value for name, value in to_layout(network, "diffusers").items()}
    theirs.load_state_dict(state, assign=True, strict=True)
    return theirs.eval().requires_grad_(False)
