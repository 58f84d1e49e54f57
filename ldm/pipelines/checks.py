"""Checks of a call's options, made before any work."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from ldm.conditioning.conditioner import Conditioner, KnowsWords
from ldm.conditioning.prompt import check_text
from ldm.samplers import get_sampler
from ldm.support.config import nearest
from ldm.support.scalars import check_kind, check_within, python_scalar, python_scalars, whole_number
from ldm.support.text import shown
from ldm.support.warn import warn_user

MAX_IMAGES = 2**16  # of one call
# Smallest and largest value of options, which have one meaning in all tasks and samplers. Where the limits of
# a task are narrower, it checks them itself.
MAX_NUMBER = 1e6  # of what is not a whole number
REPEATS = (1, 1000)
OPTION_LIMITS: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("strength", "cross", "within", "most"), (0, 1)),
    **dict.fromkeys(("resample", "jump", "iterations", "candidates"), REPEATS),
    **dict.fromkeys(("guidance", "image_guidance", "s_noise", "factor"), (-1000, 1000)),
    **dict.fromkeys(("of", "keep"), (1, MAX_IMAGES)),
    **dict.fromkeys(("window", "tile"), (1, 2**31)),
    "noise_level": (0, 999),
    # of samplers
    **dict.fromkeys(("rtol", "atol"), (0, MAX_NUMBER)),
    **dict.fromkeys(("timestep_scale", "sigma_data"), (1e-6, MAX_NUMBER)),
    "s_min": (0, MAX_NUMBER),
    "s_max": (0, math.inf),
    "r": (1e-3, 1),
    "h_init": (1e-6, 100),
    "safety": (0, 1),
    "max_steps": (1, 10**6),
}
SETTINGS = {
    "sampler": "str | None",
    "spacing": "str | None",
    "progress": "bool | None",
    "keep_steps": "bool",
}
WORDS_NAMED = 20  # of the words that a model has never seen
Prompts = str | int | Sequence[str] | Sequence[int]  # one text or class, or several


class UnknownWords(UserWarning):
    """A prompt has words that the model leaves out: it has never seen them, or they are too many things."""


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


def check_count(n: int | None, prompts: int = 1) -> int:
    """Return n, or 1 for None; ValueError unless n images of each prompt are from 1 to `MAX_IMAGES`."""
    n = python_scalar(n)
    n = 1 if n is None else n
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n: expected a number of images of at least 1, got {shown(n)}")
    whole_number("n", n * prompts, least=1, most=MAX_IMAGES)
    return n


def check_path_count(n: int) -> int:
    """Return n, the number of images between two ends; ValueError if it is not a whole number from 2 on."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise ValueError(f"n: expected at least 2 images from a to b, got {shown(n)}")
    return whole_number("n", n, least=2, most=MAX_IMAGES)


def check_unit_interval(**shares: float) -> None:
    """Raise ValueError for the first value outside [0, 1]."""
    for name, value in shares.items():
        check_kind(name, value, "float")
        check_within(name, value, 0, 1)


def check_option(name: str, value: Any, annotation: str, *, infinite: bool = False) -> None:
    """Raise ValueError for a value of another type than the annotation's, or outside of `OPTION_LIMITS`."""
    check_kind(name, value, annotation, infinite=infinite)
    if name in OPTION_LIMITS and isinstance(value, int | float):
        check_within(name, value, *OPTION_LIMITS[name])
    elif isinstance(value, float) and not infinite:
        check_within(name, value, -MAX_NUMBER, MAX_NUMBER)


def check_number(name: str, value: Any) -> float:
    """Return a number as a float; ValueError if it is not finite or outside of `OPTION_LIMITS`."""
    value = python_scalar(value)
    check_option(name, value, "float")
    return float(value)


def check_emphasis(emphasis: Any) -> dict[str, float]:
    """Return factors of words as floats; ValueError for what is not a mapping of texts to finite numbers."""
    if not isinstance(emphasis, Mapping) or not all(isinstance(word, str) for word in emphasis):
        raise ValueError(f"emphasis: expected a mapping of words to factors, got {shown(emphasis)}")
    return {word: check_number(f"emphasis of {shown(word)}", factor) for word, factor in emphasis.items()}


def check_hooks(latents: object, on_step: object) -> None:
    """Raise ValueError unless latents are None or a tensor of finite numbers, and the hook can be called."""
    if latents is not None and not (isinstance(latents, Tensor) and bool(latents.isfinite().all())):
        raise ValueError(f"latents: expected a tensor of finite numbers, got {type(latents).__name__}")
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step: expected a function, got {shown(on_step)}")


def check_arguments(parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    """Raise ValueError for the first argument that its parameter does not take; see `check_option`."""
    for name, value in given.items():
        if name in parameters:
            check_option(name, value, str(parameters[name].annotation))


def check_settings(**settings: Any) -> None:
    """Raise ValueError for the first setting of another type than in `SETTINGS`."""
    for name, value in python_scalars(settings).items():
        check_option(name, value, SETTINGS[name])


def check_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return a sampler's options; ValueError for one that it does not have, or a value it does not take."""
    parameters = inspect.signature(get_sampler(name)).parameters
    known = [key for key in parameters if key not in ("denoise", "x", "grid", "noise", "on_step")]
    for key, value in options.items():
        if key == "controls":
            raise ValueError("controls: this model takes none; they are for latent diffusion with a UNet")
        if key not in known:
            raise ValueError(
                f"sampler {name!r} has no option {key!r}; {nearest(key, known) if known else 'it has none'}"
            )
        infinite = parameters[key].default in (math.inf, -math.inf)
        check_option(key, value, str(parameters[key].annotation), infinite=infinite)
    return options


def warn_unknown_words(model: str, text: Conditioner | None, prompts: Sequence[Any]) -> None:
    """Warn, once, of the words in prompts that a model has never seen, with the nearest that it has.

    Things that it knows, but leaves out because there are too many, are named apart.
    Nothing is warned of where the model reads no texts, or where its words are not known.
    """
    if text is None:
        return
    texts = dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str))
    found = dict.fromkeys(word for prompt in texts for word in text.unknown(prompt))
    known = (text.known_words if isinstance(text, KnowsWords) else None) or frozenset()
    new, surplus = [word for word in found if word not in known], [word for word in found if word in known]
    if new:
        words = _first_of([_with_nearest(word, known) for word in new])
        warn_user(f"{model} has never seen {words}: the image may not show it", UnknownWords)
    if surplus:
        words = _first_of([shown(word) for word in surplus])
        warn_user(f"{model} cannot draw so many things at once: it leaves out {words}", UnknownWords)


def _first_of(words: Sequence[str]) -> str:
    """Return the first `WORDS_NAMED` words for a message, and the number of others."""
    more = f" and {len(words) - WORDS_NAMED} more" if len(words) > WORDS_NAMED else ""
    return ", ".join(words[:WORDS_NAMED]) + more


def _with_nearest(word: str, known: frozenset[str]) -> str:
    """Return a word for a message, with the known word or phrase that is spelled most like it, if any is."""
    close = difflib.get_close_matches(word[:100], sorted(known), n=1, cutoff=0.8)
    return f"{shown(word)} (did you mean {close[0]!r}?)" if close else shown(word)
