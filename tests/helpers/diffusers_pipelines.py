"""Build diffusers pipelines that share their weights with `LatentDiffusion` pipelines.

Only weights that the two layouts store in a different order are copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import reduced_families
import torch
import transformers
from torch import Tensor, nn

from ldm.pipelines.latent import LatentDiffusion
from ldm.registry.latent.writing import diffusers_description, write_clip_tokenizer
from ldm.weights.formats.diffusers_config import scheduler_config, training_facts
from ldm.weights.parts import to_layout

STEP = 1 / 255


def diffusers_network(network: nn.Module, latent_scale: float = 1.0) -> nn.Module:
    """Return the diffusers or transformers network that corresponds to `network`, over the same tensors."""
    name, config = diffusers_description(network, latent_scale)
    with torch.device("meta"):
        if hasattr(diffusers, name):
            theirs = getattr(diffusers, name).from_config(config)
        else:
            theirs = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
    state = to_layout(network, "diffusers")
    wanted = set(theirs.state_dict())
    if not wanted & set(state):  # newer versions of transformers have no prefix in memory
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    lost = theirs.load_state_dict(state, assign=True, strict=False)
    assert not lost.unexpected_keys and not [
        key for key in lost.missing_keys if not key.endswith("position_ids")
    ], lost
    for part in theirs.modules():
        for key, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                assert key == "position_ids"
                setattr(part, key, torch.arange(buffer.shape[-1])[None])
    return theirs.eval().requires_grad_(False)


def diffusers_scheduler(pipe: LatentDiffusion, sampler: str) -> Any:
    """Return the diffusers scheduler that a folder written by `ldm.save` names for a sampler."""
    grids = pipe.card.grids().grids
    facts = training_facts(pipe.card)
    name, config = scheduler_config(
        facts, sampler, trailing=grids.get(sampler, grids["*"]).get("spacing") == "trailing"
    )
    return getattr(diffusers, name).from_config(config)


def diffusers_pipeline(pipe: LatentDiffusion, kind: str, folder: Path) -> Any:
    """Return the diffusers pipeline of class `kind` over the weights of `pipe`; tokenizers go to `folder`."""
    networks = pipe.networks()
    parts: dict[str, Any] = {
        "unet": diffusers_network(networks["unet"]),
        "vae": diffusers_network(networks["vae"], pipe.latent_scale),
    }
    for part, suffix in (("text", ""), ("text2", "_2")):
        network: Any = networks.get(part)
        if network is not None:
            convention = pipe.card.text2 if part == "text2" else pipe.card.text
            assert convention is not None
            write_clip_tokenizer(folder / part, convention.pad, network.config.context_length)
            parts |= {
                f"text_encoder{suffix}": diffusers_network(network),
                f"tokenizer{suffix}": transformers.CLIPTokenizer.from_pretrained(folder / part),
            }
    parts["scheduler"] = diffusers_scheduler(pipe, pipe.card.defaults.sampler)
    if kind == "StableDiffusionUpscalePipeline":
        parts["low_res_scheduler"] = diffusers_scheduler(pipe, "ddpm")
    elif "XL" not in kind:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        parts["force_zeros_for_empty_prompt"] = pipe.card.zero_negative
        if "text" not in networks:
            parts |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    theirs = getattr(diffusers, kind)(**parts)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def random_pipeline(base: str, size: str, folder: Path) -> tuple[Any, int]:
    """Return a pipeline with random weights and the side of its images in pixels.

    The encoder's posterior has almost no variance, because diffusers samples from it and ldm takes its mean.

    Args:
        base: Name of a published model.
        size: "reduced" for a small copy of it, "full" for its own size.
        folder: Where the card of the reduced model is written.
    """
    name = base if size == "full" else reduced_families.register(base, folder).name
    pipe = reduced_families.load(name)
    quant, half = pipe.vae.quant_conv, pipe.vae.config.latent_channels
    quant.weight[half:] = 0.0
    quant.bias[half:] = -60.0  # clamped to −30: a standard deviation of 3e-7
    return pipe, 64 if size == "full" else 32


def seeded_noise(pipe: Any, side: int, seed: int = 3) -> Tensor:
    factor = pipe.vae.config.factor
    return torch.randn(1, 4, side // factor, side // factor, generator=torch.Generator().manual_seed(seed))


def gradient_image(side: int) -> Tensor:
    """Return an image of smooth colours, (1, 3, side, side) in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    return torch.stack([x, y, (1 - x) * y])[None]


def rectangle_mask(side: int) -> Tensor:
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 4 : side // 2, side // 4 :] = 1
    return mask


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    inside = ((theirs > 0.02) & (theirs < 0.98)).float().mean()
    assert inside > 0.2 and theirs.std() > 0.05, "a saturated or flat image would prove nothing"
    assert (ours - theirs).abs().max() <= STEP, (
        f"largest difference {float((ours - theirs).abs().max()) * 255:.3f} of 255"
    )


def assert_filled(ours: Tensor, theirs: Tensor, given: Tensor, mask: Tensor) -> None:
    """Assert equality below the mask; outside it ldm keeps the given pixels, diffusers the decoded ones."""
    known = (mask < 0.5).expand_as(ours)
    assert torch.equal(ours[known], given.expand_as(ours)[known])
    assert_equal(torch.where(known, theirs, ours), theirs)


def differ(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() > 10 * STEP)
