"""Conventions of other programs as data: with the same noise, they reproduce those programs' results.

A convention says how a program chooses its timesteps for each sampler, what its first state is, and which
noise its stochastic samplers draw. The samplers themselves are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import NoiseFn
from ldm.diffusion.noise import brownian_noise, keyed_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import get_sampler
from ldm.support.config import annotations_of, build, convert, nearest
from ldm.support.text import shown

Options = Mapping[str, Any]  # Any: options of different types, checked by the function that takes them


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a program runs the samplers.

    Args:
        grids: Options of `TimeGrid.make` by sampler; "*" stands for every sampler that is not listed.
        start: The first state: "unit" for noise of standard deviation 1, "sigma" for noise·sigma_max in the
            units of x/alpha, which is noise·sigma_T in those of x. Default: "unit".
        quantize: Whether the network gets t rounded to a table entry (`Denoiser(…, quantize=True)`). Default:
            False.
        options: Options of the samplers that the program sets, by sampler. Default: none.
        brownian: Samplers whose noise is the increments of one Brownian path, so that one seed gives similar
            images at different numbers of steps. Default: none.
    """

    grids: Mapping[str, Options]
    start: Literal["unit", "sigma"] = "unit"
    quantize: bool = False
    options: Mapping[str, Options] = field(default_factory=dict)
    brownian: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "*" not in self.grids:
            raise ValueError('grids: expected an entry "*", for the samplers that are not listed')
        for sampler in (*self.grids, *self.options, *self.brownian):
            if sampler != "*":
                get_sampler(sampler)
        for sampler, options in self.grids.items():
            check_options_of(TimeGrid.make, options, f"grids.{sampler}")
        for sampler, options in self.options.items():
            check_options_of(get_sampler(sampler), options, f"options.{sampler}")

    def grid(self, schedule: NoiseSchedule, steps: int, sampler: str, **changes: Any) -> TimeGrid:
        """Return the program's time grid for a sampler.

        Args:
            schedule: The noise schedule of T timesteps.
            steps: N, from 1 to T.
            sampler: Name of the sampler.
            **changes: Options of `TimeGrid.make` that override the program's, e.g. spacing="karras". Another
                spacing drops the program's other options, which belong to its own spacing.

        Raises:
            ValueError: For an unknown sampler, or what `TimeGrid.make` refuses.
        """
        get_sampler(sampler)
        options = dict(self.grids.get(sampler, self.grids["*"]))
        if "spacing" in changes and changes["spacing"] != options.get("spacing"):
            options = {"final": "data"}
        return TimeGrid.make(schedule, steps, **{**options, **changes})

    def start_scale(self, grid: TimeGrid) -> float:
        """Return the factor of the initial standard normal noise."""
        return 1.0 if self.start == "unit" else float(grid.sigma[0])

    def begin(
        self, grid: TimeGrid, eps: Tensor, image: Tensor | None = None, strength: float = 1.0
    ) -> tuple[TimeGrid, Tensor]:
        """Return the steps to take and the state before them.

        Without an image, or at strength 1, these are all steps, from pure noise. Otherwise they are the last
        round(N·strength) steps, at least one, from the image noised to the level where they start.

        Args:
            grid: The time grid of N steps.
            eps: Standard normal noise, shape (B, *S).
            image: The image to start from, shape (B, *S). Default: None.
            strength: In [0, 1]; must be 1 without an image. Default: 1.

        Returns:
            The grid of the steps to take, and the state at its entry 0, shape (B, *S).

        Raises:
            ValueError: If the strength is out of range or needs an image, or the shapes differ.
        """
        if image is None and strength != 1:
            raise ValueError(f"strength {strength} needs an image to start from")
        rest = grid.tail(strength)
        if image is None or strength == 1:
            return grid, self.start_scale(grid) * eps
        return rest, rest.add_noise(image, eps)

    def noise(self, seeds: Sequence[int], grid: TimeGrid, sampler: str, **options: Any) -> NoiseFn:
        """Return the noise source of a sampler: keyed by seed and step, or along a Brownian path.

        Args:
            seeds: B seeds.
            grid: The time grid.
            sampler: Name of the sampler.
            **options: Options of the sampler.
        """
        if sampler not in self.brownian:
            return keyed_noise(seeds)
        return brownian_noise(seeds, grid, inner=options.get("r", 0.5) if sampler == "dpmpp_sde" else None)


def check_options_of(function: Callable[..., Any], options: Options, where: str) -> None:
    """Raise ValueError for an option that a function does not take, or of another type.

    Args:
        function: The function, of which the keyword-only parameters are options.
        options: The options.
        where: Start of error messages.
    """
    hints = annotations_of(function)
    parameters = signature(function).parameters.values()
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{where}: unknown option {shown(name)}; {nearest(name, known)}")
        convert(value, hints[name], f"{where}.{name}")


_LEADING = {"spacing": "leading", "offset": 1}
CONVENTIONS: dict[str, Convention] = {
    # diffusers' schedulers as Stable Diffusion 1 and 2 configure them: leading, steps_offset 1,
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
        brownian=("dpmpp_sde",),  # DPMSolverSDEScheduler; its multistep schedulers draw independent noise
    ),
    # CompVis ldm/models/diffusion: ddim and plms with ddim_discretize "uniform"; dpm_solver from T to the
    # table's entry 0, in continuous time
    "compvis": Convention(
        grids={
            "dpmpp_2m": {"spacing": "linspace", "integer": False, "final": "none"},
            "unipc": {"spacing": "linspace", "integer": False, "final": "none"},
            "*": {**_LEADING, "final": "first"},
        },
        options={"dpmpp_2m": {"lower_order_final": True}},
    ),
    # Stability AI generative-models: LegacyDDPMDiscretization with do_append_zero, DiscreteDenoiser with
    # quantize_c_noise
    "sgm": Convention(grids={"*": {"spacing": "sgm"}}, quantize=True),
    # k-diffusion external.DiscreteSchedule.get_sigmas; the first state is noise·sigma_max
    "k": Convention(
        grids={"*": {"spacing": "linspace", "integer": False}},
        start="sigma",
        options={"dpmpp_3m_sde": {"curvature": "published"}},
        brownian=("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"),
    ),
}


def get_convention(convention: str | Convention | Mapping[str, Any]) -> Convention:
    """Return a convention by its name, by its fields as a recipe stores them, or as it is.

    Raises:
        ValueError: If there is none of this name, with the nearest name and all choices.
    """
    if isinstance(convention, Convention):
        return convention
    if isinstance(convention, Mapping):
        return build(Convention, convention)
    if not isinstance(convention, str) or convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {shown(convention)}; {nearest(convention, CONVENTIONS)}")
    return CONVENTIONS[convention]
