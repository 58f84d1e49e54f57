"""Samplers: one method a file; each solves the reverse process over a TimeGrid."""

from __future__ import annotations

from ldm.diffusion.interfaces import Sampler
from ldm.samplers.ddim import ddim
from ldm.samplers.ddpm import ddpm
from ldm.samplers.deis import deis
from ldm.samplers.dpm2 import dpm2
from ldm.samplers.dpm2_a import dpm2_a
from ldm.samplers.dpm_adaptive import dpm_adaptive
from ldm.samplers.dpmpp_2m import dpmpp_2m
from ldm.samplers.dpmpp_2m_sde import dpmpp_2m_sde
from ldm.samplers.dpmpp_2s_a import dpmpp_2s_a
from ldm.samplers.dpmpp_3m_sde import dpmpp_3m_sde
from ldm.samplers.dpmpp_sde import dpmpp_sde
from ldm.samplers.euler import euler
from ldm.samplers.euler_a import euler_a
from ldm.samplers.heun import heun
from ldm.samplers.lcm import lcm
from ldm.samplers.lms import lms
from ldm.samplers.plms import plms
from ldm.samplers.restart import restart
from ldm.samplers.tcd import tcd
from ldm.samplers.unipc import unipc
from ldm.support.config import nearest

SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "plms": plms,
    "euler": euler,
    "euler_a": euler_a,
    "heun": heun,
    "dpm2": dpm2,
    "dpm2_a": dpm2_a,
    "lms": lms,
    "dpmpp_2s_a": dpmpp_2s_a,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "deis": deis,
    "lcm": lcm,
    "tcd": tcd,
    "restart": restart,
    "dpm_adaptive": dpm_adaptive,
}


def get_sampler(name: str) -> Sampler:
    """The sampler of a name; ValueError with the nearest one if there is none."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; {nearest(name, SAMPLERS)}")
    return SAMPLERS[name]
