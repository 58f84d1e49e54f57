"""Conventions of other programs as data: with the same noise, a result of theirs can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ldm.config import nearest
from ldm.grid import TimeGrid
from ldm.samplers import SAMPLERS
from ldm.schedule import NoiseSchedule

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a program lays its grids: options of ``TimeGrid.make`` by sampler, ``*`` for every other one.

    ``start``: its first state is noise of deviation 1 (``unit``), or noise·sigma_max in the units of x/alpha (``sigma``), which is
    sigma_T here.
    ``quantize``: its network sees t rounded to table entries (``Denoiser(…, quantize=True)``).
    ``options``: options of the samplers themselves, which the program sets.
    """

    grids: Mapping[str, Options]
    start: Literal["unit", "sigma"] = "unit"
    quantize: bool = False
    options: Mapping[str, Options] = field(default_factory=dict)

    def grid(self, schedule: NoiseSchedule, steps: int, sampler: str, **changes: Any) -> TimeGrid:
        """The program's grid for a sampler; ``changes`` override single options, e.g. spacing="karras"."""
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; {nearest(sampler, SAMPLERS)}")
        options = dict(self.grids.get(sampler, self.grids["*"]))
        if "spacing" in changes and changes["spacing"] != options.get("spacing"):
            # an offset, a last node left out, a step to the table's first entry belong to the spacing that they were written for
            options = {"final": "data"}
        return TimeGrid.make(schedule, steps, **{**options, **changes})

    def start_scale(self, grid: TimeGrid) -> float:
        """What the initial standard normal noise is multiplied by."""
        return 1.0 if self.start == "unit" else float(grid.sigma[0])


_LEADING = {"spacing": "leading", "offset": 1}
CONVENTIONS: dict[str, Convention] = {
    # the schedulers under the configuration of Stable Diffusion 1 and 2: leading, steps_offset 1, set_alpha_to_one False
    "diffusers": Convention(
        grids={
            "ddim": {**_LEADING, "final": "first"},
            "plms": {**_LEADING, "final": "first"},
            "tcd": {**_LEADING, "final": "first"},
            "dpmpp_2m": {**_LEADING, "drop_last": True},
            "dpmpp_2m_sde": {**_LEADING, "drop_last": True},
            "dpmpp_3m_sde": {**_LEADING, "drop_last": True},
            "unipc": {**_LEADING, "drop_last": True},
            "deis": {**_LEADING, "drop_last": True, "final": "first"},
            "*": _LEADING,
        },
        quantize=True,
        options={"dpmpp_3m_sde": {"curvature": "published"}},
    ),
    # ldm/models/diffusion: ddim and plms with ddim_discretize "uniform"; dpm_solver from T to the table's first entry, in continuous time
    "compvis": Convention(
        grids={
            "dpmpp_2m": {"spacing": "linspace", "integer": False, "final": "none"},
            "unipc": {"spacing": "linspace", "integer": False, "final": "none"},
            "*": {**_LEADING, "final": "first"},
        },
        options={"dpmpp_2m": {"lower_order_final": True}},
    ),
    # generative-models: LegacyDDPMDiscretization with do_append_zero, DiscreteDenoiser with quantize_c_noise
    "sgm": Convention(grids={"*": {"spacing": "sgm"}}, quantize=True),
    # external.DiscreteSchedule.get_sigmas; the first state is noise·sigma_max
    "k": Convention(
        grids={"*": {"spacing": "linspace", "integer": False}}, start="sigma", options={"dpmpp_3m_sde": {"curvature": "published"}}
    ),
}


def get_convention(name: str) -> Convention:
    """The convention of a name; ValueError with the nearest one if there is none."""
    if name not in CONVENTIONS:
        raise ValueError(f"unknown convention {name!r}; {nearest(name, CONVENTIONS)}")
    return CONVENTIONS[name]
