"""From a configuration file to a run: `python -m ldm train configs/NAME.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.support.config import build, nearest, read_yaml
from ldm.training.loop import Run


def parts() -> dict[str, tuple[type, type]]:
    """The parts that can be trained: name → (configuration, part)."""
    from ldm.training.parts.clip import CLIPPart, CLIPTraining
    from ldm.training.parts.clip_text import CLIPTextPart, CLIPTextTraining
    from ldm.training.parts.decoder import DecoderPart, DecoderTraining
    from ldm.training.parts.draft import DraftPart, DraftTraining
    from ldm.training.parts.image_draft import ImageDraftPart, ImageDraftTraining
    from ldm.training.parts.latent_diffusion import LDMPart, LDMTraining
    from ldm.training.parts.prior import PriorPart, PriorTraining
    from ldm.training.parts.upsampler import UpsamplerPart, UpsamplerTraining
    from ldm.training.parts.vae import VAEPart, VAETraining

    return {
        "vae": (VAETraining, VAEPart),
        "clip": (CLIPTraining, CLIPPart),
        "draft": (DraftTraining, DraftPart),
        "ldm": (LDMTraining, LDMPart),
        "clip-text": (CLIPTextTraining, CLIPTextPart),
        "image-draft": (ImageDraftTraining, ImageDraftPart),
        "prior": (PriorTraining, PriorPart),
        "decoder": (DecoderTraining, DecoderPart),
        "upsampler": (UpsamplerTraining, UpsamplerPart),
    }


def read_training_config(path: str | Path) -> tuple[str, Any]:
    """The part's name and the configuration in a YAML file, checked whole before any work; ValueError names
    what is wrong."""
    mapping = read_yaml(path)
    known = parts()
    name = mapping.pop("part", None)
    if name not in known:
        raise ValueError(f"{str(path)!r}: part {name!r}; {nearest(name, known)}")
    try:
        return name, build(known[name][0], mapping)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None


def open_run(path: str | Path, *, runs: str | Path = "runs", device: torch.device | str = "cpu") -> Run:
    """The run of a configuration file, at its last checkpoint if it has one."""
    name, config = read_training_config(path)
    device = torch.device(device)
    part = parts()[name][1](config, device)
    return Run(part, config.run, config, Path(runs) / config.run.name, device)
