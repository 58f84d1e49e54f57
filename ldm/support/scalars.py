"""Numbers of numpy and torch as Python numbers, which can be checked, compared and written as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ldm.support.text import shown


def python_scalar(value: Any) -> Any:
    """Return a numpy scalar, or a 0-d array or tensor, as a Python number; any other value as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def python_scalars(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with every value as `python_scalar` returns it."""
    return {name: python_scalar(value) for name, value in options.items()}


def whole_number(name: str, value: Any, *, least: int) -> int:
    """Return a whole number; ValueError, which names it, for anything else or a number below `least`."""
    value = python_scalar(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {shown(value)}")
    return value


def finite_number(name: str, value: Any) -> float:
    """Return a finite number as a float; ValueError, which names it, for anything else."""
    value = python_scalar(value)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {shown(value)}")
    return float(value)
