"""Samplers: one method a file; each solves the reverse process over a TimeGrid."""

from __future__ import annotations

from ldm.config import nearest
from ldm.samplers.ddim import ddim
from ldm.samplers.ddpm import ddpm
from ldm.samplers.dpmpp_2m import dpmpp_2m
from ldm.types import Sampler

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
}


def get_sampler(name: str) -> Sampler:
    """The sampler of a name; ValueError with the nearest one if there is none."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; {nearest(name, SAMPLERS)}")
    return SAMPLERS[name]
