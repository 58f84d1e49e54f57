"""Samplers: one method per file, each a plain function that solves the reverse process over a `TimeGrid`.

`ode/` holds the solvers of the probability-flow ODE, `sde/` those that add noise at their steps. `SAMPLERS`
lists them by name; `common.py` explains the notation.
"""

from __future__ import annotations

from ldm.diffusion.interfaces import Sampler
from ldm.samplers.ode.ddim import ddim
from ldm.samplers.ode.deis import deis
from ldm.samplers.ode.dpm2 import dpm2
from ldm.samplers.ode.dpm_adaptive import dpm_adaptive
from ldm.samplers.ode.dpmpp_2m import dpmpp_2m
from ldm.samplers.ode.euler import euler
from ldm.samplers.ode.heun import heun
from ldm.samplers.ode.lms import lms
from ldm.samplers.ode.plms import plms
from ldm.samplers.ode.unipc import unipc
from ldm.samplers.sde.ddpm import ddpm
from ldm.samplers.sde.dpm2_a import dpm2_a
from ldm.samplers.sde.dpmpp_2m_sde import dpmpp_2m_sde
from ldm.samplers.sde.dpmpp_2s_a import dpmpp_2s_a
from ldm.samplers.sde.dpmpp_3m_sde import dpmpp_3m_sde
from ldm.samplers.sde.dpmpp_sde import dpmpp_sde
from ldm.samplers.sde.euler_a import euler_a
from ldm.samplers.sde.lcm import lcm
from ldm.samplers.sde.restart import restart
from ldm.samplers.sde.tcd import tcd
from ldm.support.config import nearest
from ldm.support.text import shown

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
    """Return the sampler called `name`.

    Raises:
        ValueError: If there is none, with the nearest name and all choices.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {shown(name)}; {nearest(name, SAMPLERS)}")
    return SAMPLERS[name]
