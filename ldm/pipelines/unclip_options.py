"""The options of a call of unCLIP: which stage's they are, and what a recipe says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ldm.support.config import nearest

OTHERS = ("upsample", "noise_level", "tile", "iterations")  # options of a call that are no stage's


def decoders(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are the decoder's."""
    return {
        key: value
        for key, value in options.items()
        if not key.startswith(("prior_", "upsampler_")) and key not in OTHERS
    }


def priors(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are the prior's."""
    return {key: value for key, value in options.items() if key.startswith("prior_") or key == "progress"}


def told(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of the options that are not the decoder's."""
    others = {
        key: value
        for key, value in options.items()
        if key.startswith(("prior_", "upsampler_")) or key in OTHERS
    }
    return {key: value for key, value in others.items() if not isinstance(value, Tensor)}


def held(options: Mapping[str, Any]) -> bool:
    """Whether an option is a tensor, which a recipe does not hold."""
    return any(isinstance(value, Tensor) for value in options.values())


def options_of(stage: str, options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options of a stage among those of a call: "prior_steps" becomes "steps"; ValueError for one that it
    does not have."""
    own = {
        name.removeprefix(f"{stage}_"): value
        for name, value in options.items()
        if name.startswith(f"{stage}_")
    }
    for name in own:
        if name not in names:
            raise ValueError(f"the {stage} has no option {name!r}; {nearest(name, names)}")
    return {name: value for name, value in own.items() if value is not None}
