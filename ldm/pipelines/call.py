"""The options of a call, settled: the caller's, else the card's defaults, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ldm.catalog.cards import DiffusionCard
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import OnStep, Sampler
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.seeds import check_seeds
from ldm.images.opening import check_pixels
from ldm.pipelines.checks import (
    Prompts,
    check_count,
    check_negative,
    check_number,
    check_options,
    check_prompts,
    check_settings,
)
from ldm.pipelines.control.control_use import ControlUse, json_of
from ldm.samplers import get_sampler
from ldm.samplers.conventions import Convention, get_convention
from ldm.support.config import build, to_dict
from ldm.support.scalars import finite_number, python_scalar, python_scalars, python_values, whole_number
from ldm.support.text import shown

Rules = str | Convention | Mapping[str, Any]  # a convention, by name, as an object, or as a recipe holds it
# a grid, a list of falling timesteps, or as a recipe holds it
Grid = TimeGrid | Sequence[float] | Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class SizeCondition:
    """SDXL's size conditions, in pixels (Podell et al. 2023, section 2.2).

    Attributes:
        original: (height, width) of the image before it was scaled. None: the size of the image made.
        crop: (top, left) of the crop.
        target: (height, width) wanted. None: the size of the image made.
        aesthetic: Aesthetic score, which the refiner takes in place of `target`.
        negative_aesthetic: The score of the unconditional branch.

    Raises:
        ValueError: If a size or a crop is not a pair of whole numbers of at least 0, or a score not finite.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    aesthetic: float = 6.0
    negative_aesthetic: float = 2.5

    def __post_init__(self) -> None:
        for name in ("original", "crop", "target"):
            value = getattr(self, name)
            if value is None and name != "crop":
                continue
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise ValueError(f"{name}: expected two numbers of pixels, got {shown(value)}")
            pair = tuple(whole_number(name, each, least=0, most=2**31) for each in value)
            object.__setattr__(self, name, pair)
        for name in ("aesthetic", "negative_aesthetic"):
            object.__setattr__(self, name, finite_number(name, getattr(self, name)))


@dataclass(frozen=True, kw_only=True)
class Call:
    """The settled options of one call, of B images.

    Attributes:
        prompts: A prompt, or a class number, for each image.
        negative: One negative prompt for all images, or one for each.
        n: Number of images of each prompt.
        seeds: A seed for each image.
        sampler: Name of the sampler.
        solve: The sampler.
        options: Options of the sampler: the convention's, then the caller's.
        asked: The options of sampler and grid that the caller gave, for the recipe.
        rules: The convention: grids, first state, noise.
        grid: The time grid.
        guidance: Guidance scale.
        height, width: Size of the images in pixels.
        sizes: SDXL's size conditions.
        latents: The caller's noise (B, C, h, w) in place of the seeds'.
        progress: Whether a progress bar is shown.
        on_step: The caller's hook.
        keep_steps: Whether the prediction of every step is kept.
        others: Options of the other stages (unCLIP's prior and upsamplers), by the caller's names.
        controls: The controls of the UNet, with their hints.
    """

    prompts: tuple[str, ...] | tuple[int, ...]
    negative: str | tuple[str, ...]
    n: int
    seeds: tuple[int, ...]
    sampler: str
    solve: Sampler
    options: Mapping[str, Any]
    asked: Mapping[str, Any]
    rules: Convention
    grid: TimeGrid
    guidance: float
    height: int
    width: int
    sizes: SizeCondition
    latents: Tensor | None
    progress: bool
    on_step: OnStep | None
    keep_steps: bool = False
    others: Mapping[str, Any] = field(default_factory=dict)
    controls: tuple[ControlUse, ...] = ()

    @property
    def negatives(self) -> list[str]:
        """The negative prompts: one, or one for each image."""
        return [self.negative] if isinstance(self.negative, str) else list(self.negative)

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts as texts."""
        return tuple(str(prompt) for prompt in self.prompts)

    @property
    def replayable(self) -> bool:
        """Whether a recipe can hold all that the call depends on: no tensors, no hook."""
        tensors = any(isinstance(value, Tensor) for value in self.others.values())
        hints = all(use.option.in_files for use in self.controls)
        return self.latents is None and self.on_step is None and not tensors and hints

    def over(self, grid: TimeGrid) -> Call:
        """Return the call over another grid, such as a part of its own."""
        return replace(self, grid=grid)

    def recipe(self, task: str) -> dict[str, Any]:
        """Return the options as a recipe states them; SDXL's sizes only where they were given."""
        one = len(set(self.prompts)) == 1
        sizes = {"sizes": to_dict(self.sizes)} if self.sizes != SizeCondition() else {}
        return {
            "task": task,
            "prompt": self.prompts[0] if one else list(self.prompts),
            "negative": self.negative if isinstance(self.negative, str) else list(self.negative),
            "n": len(self.prompts) if one else None,
            "seed": list(self.seeds),
            "steps": len(self.grid),
            "guidance": self.guidance,
            "sampler": self.sampler,
            "height": self.height,
            "width": self.width,
            **sizes,
            **({"controls": json_of(self.controls)} if self.controls else {}),
            **self.asked,
            **{name: value for name, value in self.others.items() if not isinstance(value, Tensor)},
        }


def settle(
    card: DiffusionCard,
    schedule: NoiseSchedule,
    prompt: Prompts,
    *,
    negative: str | Sequence[str] = "",
    n: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    convention: Rules | None = None,
    spacing: str | None = None,
    grid: Grid | None = None,
    seed: int | Sequence[int] | None = 0,
    height: int | None = None,
    width: int | None = None,
    sizes: SizeCondition | Mapping[str, Any] | None = None,
    latents: Tensor | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    keep_steps: bool = False,
    **sampler_options: Any,
) -> Call:
    """Settle the options of a call; None stands for the card's default.

    The arguments are those of `LatentDiffusion.text_to_image`.

    Raises:
        ValueError: If an option is unknown or out of range; the message names it.
    """
    defaults, prompts = card.defaults, check_prompts(prompt)
    each = check_count(n, len(prompts))
    check_settings(sampler=sampler, spacing=spacing, progress=progress, keep_steps=keep_steps)
    name = sampler or defaults.sampler
    solve, rules = get_sampler(name), card.grids() if convention is None else get_convention(convention)
    sampler_options = python_scalars(sampler_options)
    options = check_options(name, {**rules.options.get(name, {}), **sampler_options})
    laid = lay_grid(rules, schedule, name, steps, defaults.steps, spacing, grid)
    height, width = image_size_of(card, height, width)
    asked = {"convention": convention, "spacing": spacing, "grid": None if grid is None else laid.to_dict()}
    return Call(
        prompts=tuple(p for p in prompts for _ in range(each)),
        negative=check_negative(negative, len(prompts), each),
        n=each,
        seeds=check_seeds(seed, each * len(prompts)),
        sampler=name,
        solve=solve,
        options=options,
        rules=rules,
        grid=laid,
        asked={**sampler_options, **{key: value for key, value in asked.items() if value is not None}},
        guidance=defaults.guidance if guidance is None else check_number("guidance", guidance),
        height=height,
        width=width,
        sizes=size_condition(sizes),
        latents=latents,
        progress=progress,
        on_step=on_step,
        keep_steps=keep_steps,
    )


def image_size_of(card: DiffusionCard, height: int | None, width: int | None) -> tuple[int, int]:
    """Return the height and width of a call's images; ValueError for what is none, or too many pixels."""
    defaults = card.defaults
    h = defaults.height if height is None else whole_number("height", height, least=1)
    w = defaults.width if width is None else whole_number("width", width, least=1)
    check_pixels(w, h)
    return h, w


def size_condition(sizes: SizeCondition | Mapping[str, Any] | None) -> SizeCondition:
    """Return SDXL's size conditions, as an object or as a recipe holds them; None: the defaults."""
    if isinstance(sizes, SizeCondition):
        return sizes
    return build(SizeCondition, {} if sizes is None else python_values(sizes), "sizes")


def named_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword-only options among the arguments of a task, its `locals()` before any other line.

    Left out are the pipeline, the prompt, and the mapping of further options.
    """
    return {
        name: value
        for name, value in arguments.items()
        if name not in ("self", "prompt", "options", "sampler_options")
    }


def lay_grid(
    rules: Convention,
    schedule: NoiseSchedule,
    sampler: str,
    steps: int | None,
    usual: int,
    spacing: str | None,
    grid: Grid | None,
) -> TimeGrid:
    """Return the caller's grid, or the convention's with the caller's spacing.

    Args:
        rules: The convention.
        schedule: The model's noise schedule.
        sampler: Name of the sampler, by which conventions choose a grid.
        steps: Number of steps. None: `usual`, the card's default.
        usual: The card's number of steps.
        spacing: Spacing in place of the convention's.
        grid: A grid that replaces steps and spacing.

    Raises:
        ValueError: If `grid` is given together with a spacing or another number of steps.
    """
    steps = python_scalar(steps)
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool)):
        raise ValueError(f"steps: expected a whole number, got {steps!r}")
    if grid is None:
        changes = {} if spacing is None else {"spacing": spacing}
        return rules.grid(schedule, usual if steps is None else steps, sampler, **changes)
    laid = grid if isinstance(grid, TimeGrid) else read_grid(schedule, grid)
    if spacing is not None or steps not in (None, len(laid)):
        raise ValueError(
            f"grid states all of its {len(laid)} steps: leave out spacing ({spacing!r}) and steps ({steps!r})"
        )
    return laid


def read_grid(schedule: NoiseSchedule, grid: Any) -> TimeGrid:
    """Return the grid that a caller or a recipe states; ValueError for what is none."""
    for each in grid.values() if isinstance(grid, Mapping) else [grid]:
        if isinstance(each, str | bytes) or not hasattr(each, "__len__") or not len(each):
            raise ValueError(f"grid: expected falling timesteps, got {shown(grid)}")
        for number in each:
            finite_number("grid", number)
    try:
        if isinstance(grid, Mapping):
            return TimeGrid.from_dict(schedule, grid)
        return TimeGrid.explicit(schedule, grid)
    except ValueError as error:
        raise ValueError(f"grid: {error}") from None
