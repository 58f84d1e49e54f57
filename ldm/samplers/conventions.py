"""Conventions of other programs as data: with the same noise, a result of theirs can be made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import NoiseFn
from ldm.diffusion.noise import brownian_noise, keyed_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import get_sampler
from ldm.support.config import build, nearest

GridOptions = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a program lays its grids: options of ``TimeGrid.make`` by sampler, ``*`` for every other one.

    ``start``: its first state is noise of deviation 1 (``unit``), or noise·sigma_max in the units of x/alpha
    (``sigma``), which is sigma_T here. ``quantize``: its network sees t rounded to table entries
    (``Denoiser(…, quantize=True)``). ``options``: options of the samplers themselves, which the program sets.
    ``brownian``: samplers whose noise is the increments of one Brownian path, so that one seed gives nearby
    images at different numbers of steps.
    """

    grids: Mapping[str, GridOptions]
    start: Literal["unit", "sigma"] = "unit"
    quantize: bool = False
    options: Mapping[str, GridOptions] = field(default_factory=dict)
    brownian: tuple[str, ...] = ()

    def grid(self, schedule: NoiseSchedule, steps: int, sampler: str, **changes: Any) -> TimeGrid:
        """The program's grid for a sampler; ``changes`` override single options of ``TimeGrid.make``, e.g.
        spacing="karras"."""
        get_sampler(sampler)
        options = dict(self.grids.get(sampler, self.grids["*"]))
        if "spacing" in changes and changes["spacing"] != options.get("spacing"):
            # an offset, a last node left out, a step to the table's first entry belong to the spacing that
            # they were written for
            options = {"final": "data"}
        return TimeGrid.make(schedule, steps, **{**options, **changes})

    def start_scale(self, grid: TimeGrid) -> float:
        """What the initial standard normal noise is multiplied by."""
        return 1.0 if self.start == "unit" else float(grid.sigma[0])

    def begin(
        self, grid: TimeGrid, eps: Tensor, image: Tensor | None = None, strength: float = 1.0
    ) -> tuple[TimeGrid, Tensor]:
        """The steps to take, and the state (B, *S) before them, from standard normal noise eps (B, *S).

        With an ``image`` (B, *S) the last round(N·strength) steps, at least one, from the image noised to
        where they begin. Strength 1 is pure noise whatever the image, the same as without one; strength lies
        in [0, 1].
        """
        if image is None and strength != 1:
            raise ValueError(f"strength {strength} needs an image to start from")
        rest = grid.tail(strength)
        if image is None or strength == 1:
            return grid, self.start_scale(grid) * eps
        if image.shape != eps.shape:
            raise ValueError(
                f"the image {tuple(image.shape)} and the noise {tuple(eps.shape)} must have one shape"
            )
        return rest, float(rest.alpha[0]) * image + float(rest.sigma[0]) * eps

    def noise(self, seeds: Sequence[int], grid: TimeGrid, sampler: str, **options: Any) -> NoiseFn:
        """The sampler's noise for these seeds: keyed by seed and step, or along a Brownian path; ``options``
        are the sampler's."""
        if sampler not in self.brownian:
            return keyed_noise(seeds)
        return brownian_noise(seeds, grid, inner=options.get("r", 0.5) if sampler == "dpmpp_sde" else None)


_LEADING = {"spacing": "leading", "offset": 1}
CONVENTIONS: dict[str, Convention] = {
    # the schedulers under the configuration of Stable Diffusion 1 and 2: leading, steps_offset 1,
    # set_alpha_to_one False
    "diffusers": Convention(
        grids={
            "ddim": {**_LEADING, "final": "first"},
            "plms": {**_LEADING, "final": "first"},
            "tcd": {"spacing": "lcm", "final": "first"},
            "lcm": {"spacing": "lcm"},
            "dpmpp_2m": {**_LEADING, "drop_last": True},
            "dpmpp_2m_sde": {**_LEADING, "drop_last": True},
            "dpmpp_3m_sde": {**_LEADING, "drop_last": True},
            "unipc": {**_LEADING, "drop_last": True},
            "deis": {**_LEADING, "drop_last": True, "final": "first"},
            "*": _LEADING,
        },
        quantize=True,
        options={"dpmpp_3m_sde": {"curvature": "published"}},
        brownian=("dpmpp_sde",),  # DPMSolverSDEScheduler; the multistep ones draw anew at every step
    ),
    # ldm/models/diffusion: ddim and plms with ddim_discretize "uniform"; dpm_solver from T to the table's
    # first entry, in continuous time
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
        grids={"*": {"spacing": "linspace", "integer": False}},
        start="sigma",
        options={"dpmpp_3m_sde": {"curvature": "published"}},
        brownian=("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"),
    ),
}


def get_convention(name: str | Convention | Mapping[str, Any]) -> Convention:
    """The convention of a name, or one's own, or the fields of one as a recipe holds them; ValueError with
    the nearest name if there is none."""
    if isinstance(name, Convention):
        return name
    if isinstance(name, Mapping):
        return build(Convention, name)
    if name not in CONVENTIONS:
        raise ValueError(f"unknown convention {name!r}; {nearest(name, CONVENTIONS)}")
    return CONVENTIONS[name]
