"""Checks of a call's options, made before any work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Set
from typing import Any

from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.prompt import check_text
from ldm.samplers import get_sampler
from ldm.support.config import nearest
from ldm.support.scalars import python_scalar
from ldm.support.text import shown
from ldm.support.warn import warn_user

WORDS_NAMED = 20  # of the words that a model has never seen
Prompts = str | int | Sequence[str] | Sequence[int]  # one text or class, or several


class UnknownWords(UserWarning):
    """A prompt has words that the model has never seen."""


def check_prompts(prompt: Prompts) -> list[Any]:
    """Return the prompts as a list.

    Raises:
        ValueError: If there is none, or they are neither all texts nor all class numbers.
    """
    prompt = python_scalar(prompt)
    prompts = [prompt] if isinstance(prompt, str | int) else _listed(prompt)
    kinds = {type(p) for p in prompts}
    if kinds not in ({str}, {int}):
        raise ValueError(f"prompt: expected a text or several, got {shown(prompt)}")
    for text in dict.fromkeys(prompts):
        if isinstance(text, str):
            check_text(text, "prompt")
    return prompts


def _listed(values: Any) -> list[Any]:
    """Return the members of a sequence, an array or an iterator; nothing of what else can be iterated."""
    if isinstance(values, bytes | bytearray | Mapping | Set) or getattr(values, "ndim", 1) == 0:
        return []
    return [python_scalar(each) for each in values] if hasattr(values, "__iter__") else []


def check_negative(negative: str | Sequence[str], prompts: int, each: int) -> str | tuple[str, ...]:
    """Return the negative prompt of all images, or a tuple with one for each.

    Args:
        negative: One text, one for each prompt, or one for each image.
        prompts: Number of prompts.
        each: Number of images of each prompt.

    Raises:
        ValueError: If the number of texts fits neither.
    """
    negative = python_scalar(negative)
    given = [negative] if isinstance(negative, str) else _listed(negative)
    fits = isinstance(negative, str) or len(given) in (prompts, prompts * each)
    if any(not isinstance(text, str) for text in given) or not fits:
        raise ValueError(
            f"negative: expected a text, or {prompts} (one for each prompt) or {prompts * each} (for each"
            f" image), got {shown(negative)}"
        )
    for text in dict.fromkeys(given):
        check_text(text, "negative")
    if isinstance(negative, str):
        return negative
    return (
        tuple(given) if len(given) == prompts * each else tuple(text for text in given for _ in range(each))
    )


def check_count(n: int | None) -> int:
    """Return n, or 1 for None; ValueError if it is not a positive whole number."""
    n = python_scalar(n)
    if n is None:
        return 1
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n: expected a number of images of at least 1, got {n!r}")
    return n


def check_path_count(n: int) -> int:
    """Return n, the number of images between two ends; ValueError if it is not a whole number from 2 on."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise ValueError(f"n: expected at least 2 images from a to b, got {n!r}")
    return n


def check_unit_interval(**shares: float) -> None:
    """Raise ValueError for the first value outside [0, 1]."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected 0 to 1, got {value}")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the sampler does not take."""
    parameters = inspect.signature(get_sampler(name)).parameters
    known = [key for key in parameters if key not in ("denoise", "x", "grid", "noise", "on_step")]
    for key in options:
        if key not in known:
            raise ValueError(
                f"sampler {name!r} has no option {key!r}; {nearest(key, known) if known else 'it has none'}"
            )


def warn_unknown_words(model: str, text: Conditioner | None, prompts: Sequence[Any]) -> None:
    """Warn, once, of the words in prompts that a model has never seen.

    Nothing is warned of where the model reads no texts, or where its words are not known.
    """
    if text is None:
        return
    texts = dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str))
    found = list(dict.fromkeys(word for prompt in texts for word in text.unknown(prompt)))
    if found:
        words = ", ".join(shown(word) for word in found[:WORDS_NAMED])
        more = f" and {len(found) - WORDS_NAMED} more" if len(found) > WORDS_NAMED else ""
        warn_user(f"{model} has never seen {words}{more}: the image may not show it", UnknownWords)
