"""The options of a call, settled: what the caller said, else what the card says, checked before any work."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ldm.catalog.cards import ModelCard
from ldm.conditioning.conditioner import Conditioner
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised, OnStep, Sampler
from ldm.diffusion.schedule import NoiseSchedule
from ldm.diffusion.seeds import check_seeds
from ldm.samplers import get_sampler
from ldm.samplers.conventions import Convention, get_convention
from ldm.support.config import build, nearest, to_dict

Prompts = str | int | Sequence[str] | Sequence[int]
Rules = str | Convention | Mapping[str, Any]  # a convention by name, one's own, or as a recipe holds it
# one of one's own, a list of falling timesteps, or as a recipe holds it
Grid = TimeGrid | Sequence[float] | Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class SizeCondition:
    """What SDXL is told of a picture, in pixels (Podell et al. 2023, section 2.2): its size before it was
    scaled, what was cropped off its top and left, and the size wanted, each (height, width), None for the
    size of the picture that is made; for the refiner its aesthetic score in place of the last."""

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    aesthetic: float = 6.0
    negative_aesthetic: float = 2.5


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call: a prompt (or class) and a seed for each picture, a negative prompt for all or one for each,
    the solver with its options, rules and grid, and what happens on the way.

    ``asked``: the sampler's options and the grid's as the caller gave them, for the recipe.
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

    @property
    def negatives(self) -> list[str]:
        """The negative prompts: one, or one for each picture."""
        return [self.negative] if isinstance(self.negative, str) else list(self.negative)

    @property
    def replayable(self) -> bool:
        """Whether a recipe can hold all that the call depends on."""
        return self.latents is None and self.on_step is None

    def over(self, grid: TimeGrid) -> Call:
        """The call over another grid, a part of its own."""
        return replace(self, grid=grid)

    def recipe(self, task: str) -> dict[str, Any]:
        """The options as a recipe states them; those of SDXL only where they were given."""
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
            **self.asked,
        }


def settle(
    card: ModelCard,
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
    seed: int | Sequence[int] = 0,
    height: int | None = None,
    width: int | None = None,
    sizes: SizeCondition | Mapping[str, Any] | None = None,
    latents: Tensor | None = None,
    progress: bool = True,
    on_step: OnStep | None = None,
    keep_steps: bool = False,
    **sampler_options: Any,
) -> Call:
    """The call of some options; None for what the card says. ValueError names what is wrong."""
    defaults = card.defaults
    prompts = check_prompts(prompt)
    each = check_count(n)
    name = sampler or defaults.sampler
    solve, rules = get_sampler(name), card.grids() if convention is None else get_convention(convention)
    check_options(name, sampler_options)
    laid = lay(rules, schedule, name, steps, defaults.steps, spacing, grid)
    said = {"convention": convention, "spacing": spacing, "grid": None if grid is None else laid.to_dict()}
    return Call(
        prompts=tuple(p for p in prompts for _ in range(each)),
        negative=check_negative(negative, len(prompts), each),
        n=each,
        seeds=check_seeds(seed, each * len(prompts)),
        sampler=name,
        solve=solve,
        options={**rules.options.get(name, {}), **sampler_options},
        rules=rules,
        grid=laid,
        asked={**sampler_options, **{key: value for key, value in said.items() if value is not None}},
        guidance=defaults.guidance if guidance is None else float(guidance),
        height=height or defaults.height,
        width=width or defaults.width,
        sizes=sizes if isinstance(sizes, SizeCondition) else build(SizeCondition, sizes or {}, "sizes"),
        latents=latents,
        progress=progress,
        on_step=on_step,
        keep_steps=keep_steps,
    )


def lay(
    rules: Convention,
    schedule: NoiseSchedule,
    sampler: str,
    steps: int | None,
    usual: int,
    spacing: str | None,
    grid: Grid | None,
) -> TimeGrid:
    """The caller's grid, or the convention's with the caller's spacing; ``usual``: the card's number of
    steps."""
    if grid is None:
        return rules.grid(
            schedule,
            usual if steps is None else steps,
            sampler,
            **({} if spacing is None else {"spacing": spacing}),
        )
    if isinstance(grid, Mapping):
        grid = TimeGrid.from_dict(schedule, grid)
    laid = grid if isinstance(grid, TimeGrid) else TimeGrid.explicit(schedule, grid)
    if spacing is not None or steps not in (None, len(laid)):
        raise ValueError(
            f"grid says all of its {len(laid)} steps: leave spacing ({spacing!r}) and steps ({steps!r}) out"
        )
    return laid


def check_prompts(prompt: Prompts) -> list[Any]:
    """The prompts as a list; ValueError if there is none, or it holds anything but texts alone or classes
    alone."""
    prompts = [prompt] if isinstance(prompt, str | int) else list(prompt)
    kinds = {type(p) for p in prompts}
    if kinds not in ({str}, {int}):
        raise ValueError(f"prompt: expected a text or several, got {prompt!r}")
    return prompts


def check_negative(negative: str | Sequence[str], prompts: int, each: int) -> str | tuple[str, ...]:
    """The negative prompt of all pictures, or one for each: a list has one for each prompt or for each
    picture; ValueError for another number."""
    if isinstance(negative, str):
        return negative
    given = list(negative)
    if any(not isinstance(text, str) for text in given) or len(given) not in (prompts, prompts * each):
        raise ValueError(
            f"negative: expected a text, or {prompts} (one for each prompt) or {prompts * each} (for each"
            f" picture), got {negative!r}"
        )
    return (
        tuple(given) if len(given) == prompts * each else tuple(text for text in given for _ in range(each))
    )


def check_count(n: int | None) -> int:
    """n, or 1 for None; ValueError if it is not a number of pictures."""
    if n is None:
        return 1
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n: expected a number of pictures of at least 1, got {n!r}")
    return n


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """ValueError for an option that the sampler does not take."""
    parameters = inspect.signature(get_sampler(name)).parameters
    known = [key for key in parameters if key not in ("denoise", "x", "grid", "noise", "on_step")]
    for key in options:
        if key not in known:
            raise ValueError(
                f"sampler {name!r} has no option {key!r}; {nearest(key, known) if known else 'it has none'}"
            )


class UnknownWords(UserWarning):
    """A prompt has words that the model has never seen."""


def warn_unknown(model: str, text: Conditioner | None, prompts: Sequence[Any], *, stacklevel: int) -> None:
    """A warning that names the words of prompts which a model has never seen; none where it reads no texts,
    or its words are not known."""
    texts = [] if text is None else [prompt for prompt in prompts if isinstance(prompt, str)]
    unknown = list(dict.fromkeys(word for prompt in texts for word in text.unknown(prompt)))  # type: ignore[union-attr]
    if unknown:
        words = ", ".join(repr(word) for word in unknown)
        warnings.warn(
            f"{model} has never seen {words}: the picture may not show it",
            UnknownWords,
            stacklevel=stacklevel,
        )


def all_hooks(own: OnStep | None, *others: Callable[[int, Tensor, Denoised], Any]) -> OnStep:
    """A hook that calls all: the others look, then the caller's own, which may return a new x or stop."""

    def hook(i: int, x: Tensor, d: Denoised) -> Tensor | None:
        for other in others:
            other(i, x, d)
        return None if own is None else own(i, x, d)

    return hook


def progress_bar(total: int, shown: bool) -> Any:
    """A bar on standard error, on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, unit="step", leave=False, disable=None if shown else True)
