"""The options of an unCLIP call: which of its stages each belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.support.config import nearest

STAGES = ("prior_", "upsampler_")  # prefixes of the options of other stages than the decoder
# Options of a call that belong to no stage, with what they take.
SHARED = {
    "candidates": "int",
    "upsample": "bool",
    "noise_level": "int",
    "tile": "int | None",
    "iterations": "int",
}


def decoder_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the decoder."""
    return {key: value for key, value in options.items() if not key.startswith(STAGES) and key not in SHARED}


def other_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not the decoder's."""
    return {key: value for key, value in options.items() if key.startswith(STAGES) or key in SHARED}


def prior_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the prior, and whether progress is shown."""
    return {key: value for key, value in options.items() if key.startswith("prior_") or key == "progress"}


def options_of(stage: str, options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the options of a stage without its prefix: "prior_steps" becomes "steps".

    Args:
        stage: Name of the stage, which is the prefix.
        options: Options of a call.
        names: The options that the stage has.

    Raises:
        ValueError: If the stage has no such option.
    """
    prefix = f"{stage}_"
    own = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
    for name in own:
        if name not in names:
            raise ValueError(f"the {stage} has no option {name!r}; {nearest(name, names)}")
    return {name: value for name, value in own.items() if value is not None}
