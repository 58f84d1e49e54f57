"""The options of a call that draws tokens, settled: the caller's, else the card's defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.catalog.dalle_cards import MAX_TEMPERATURE, MAX_TOP_K, DalleCard
from ldm.diffusion.seeds import check_seeds
from ldm.pipelines.checks import (
    Prompts,
    check_count,
    check_negative,
    check_number,
    check_prompts,
    check_settings,
)
from ldm.support.config import nearest
from ldm.support.scalars import check_within, finite_number, python_scalars, whole_number
from ldm.support.text import shown

# called after every token as (number of tokens, tokens (B, N) with −1 where there is none, images of them)
OnToken = Callable[[int, Tensor, Callable[[], Tensor]], None]
OPTIONS = ("n", "negative", "seed", "guidance", "temperature", "top_k", "top_p", "on_step", "keep_steps")


@dataclass(frozen=True, kw_only=True)
class TokenCall:
    """The settled options of one call, of B images.

    Attributes:
        prompts: A prompt for each image.
        negative: What stands for no prompt: one text for all images, or one for each.
        seeds: A seed for each image.
        guidance: Factor of super-conditioning.
        temperature: Divisor of the logits.
        top_k: Number of the most probable tokens that are drawn from.
        top_p: Probability that they have together.
        progress: Whether a progress bar is shown.
        on_step: The caller's hook.
        keep_steps: Whether images of every row of tokens are kept.
    """

    prompts: tuple[str, ...]
    negative: str | tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float
    temperature: float
    top_k: int
    top_p: float
    progress: bool
    on_step: OnToken | None
    keep_steps: bool

    @property
    def negatives(self) -> tuple[str, ...]:
        """The negative prompt of each image."""
        return (self.negative,) * len(self.prompts) if isinstance(self.negative, str) else self.negative

    def recipe(self, task: str) -> dict[str, Any]:
        """Return the options as a recipe states them."""
        one = len(set(self.prompts)) == 1
        return {
            "task": task,
            "prompt": self.prompts[0] if one else list(self.prompts),
            "negative": self.negative if isinstance(self.negative, str) else list(self.negative),
            "n": len(self.prompts) if one else None,
            "seed": list(self.seeds),
            "guidance": self.guidance,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


def settle_tokens(
    card: DalleCard,
    prompt: Prompts,
    *,
    n: int | None = None,
    negative: str | Sequence[str] = "",
    seed: int | Sequence[int] | None = 0,
    guidance: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    progress: bool = True,
    on_step: OnToken | None = None,
    keep_steps: bool = False,
    **unknown: Any,
) -> TokenCall:
    """Settle the options of a call; None stands for the card's default.

    The arguments are those of `DalleMini.text_to_image`.

    Raises:
        ValueError: If an option is unknown or out of range; the message names it.
    """
    check_unknown(card, unknown)
    prompts, usual = check_prompts(prompt), card.sampling
    if not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompt: expected a text or several, got {shown(prompt)}")
    check_settings(progress=progress, keep_steps=keep_steps)
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step: expected a function, got {shown(on_step)}")
    each = check_count(card.pictures if n is None else n, len(prompts))
    heat = usual.temperature if temperature is None else finite_number("temperature", temperature)
    check_within("temperature", heat, 0, MAX_TEMPERATURE)
    share = usual.top_p if top_p is None else finite_number("top_p", top_p)
    if not 0 < share <= 1:
        raise ValueError(f"top_p: expected a number above 0 and at most 1, got {shown(top_p)}")
    return TokenCall(
        prompts=tuple(text for text in prompts for _ in range(each)),
        negative=check_negative(negative, len(prompts), each),
        seeds=check_seeds(seed, each * len(prompts)),
        guidance=usual.guidance if guidance is None else check_number("guidance", guidance),
        temperature=heat,
        top_k=usual.top_k if top_k is None else whole_number("top_k", top_k, least=1, most=MAX_TOP_K),
        top_p=share,
        progress=bool(progress),
        on_step=on_step,
        keep_steps=bool(keep_steps),
    )


def check_unknown(card: DalleCard, options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that are not those of `settle_tokens`, but for the size of the card."""
    for name, value in python_scalars(options).items():
        if name not in ("height", "width"):
            raise ValueError(
                f"{name}: {card.name!r} draws tokens and has no option {name!r}; {nearest(name, OPTIONS)}"
            )
        if value not in (None, card.side):
            raise ValueError(f"{name}: {card.name!r} makes images of {card.side}×{card.side} pixels alone")
