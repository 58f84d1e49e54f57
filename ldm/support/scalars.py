"""Values of options: numbers of numpy and torch as Python numbers, and the checks of types and ranges.

Python numbers can be checked, compared and written as JSON. What an option takes is the annotation of the
parameter: "int", "float", "bool", "str", or several of these and "None" with bars between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ldm.support.text import shown

KINDS = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "True or False",
    "str": "a text",
    "None": "None",
}


def python_scalar(value: Any) -> Any:
    """Return a numpy scalar, or a 0-d array or tensor, as a Python number; any other value as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def python_values(value: Any) -> Any:
    """Return a value as `python_scalar` does, and so what lists, tuples and mappings in it hold."""
    if type(value) in (list, tuple):
        return type(value)(python_values(each) for each in value)
    if type(value) is dict:
        return {key: python_values(each) for key, each in value.items()}
    return python_scalar(value)


def python_scalars(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with every value as `python_values` returns it."""
    return {name: python_values(value) for name, value in options.items()}


def whole_number(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """Return a whole number; ValueError, which names it, for anything else or a number out of range."""
    value = python_scalar(value)
    if not _is_kind(value, "int") or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected a whole number {limits}, got {shown(value)}")
    return int(value)


def finite_number(name: str, value: Any) -> float:
    """Return a finite number as a float; ValueError, which names it, for anything else."""
    value = python_scalar(value)
    check_kind(name, value, "float")
    return float(value)


def check_finite(**numbers: Any) -> None:
    """Raise ValueError for the first number that is not finite; tensors and None are not looked at."""
    for name, value in numbers.items():
        value = python_scalar(value)
        if value is not None and not hasattr(value, "shape"):
            check_kind(name, value, "float")


def check_above_zero(**numbers: float | None) -> None:
    """Raise ValueError for the first number that is not positive; None stands for no value."""
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {shown(value)}")


def check_kind(name: str, value: Any, annotation: str, *, infinite: bool = False) -> None:
    """Raise ValueError for a value that the annotation of an option does not allow.

    Nothing is checked where the annotation names other types than those of `KINDS`.

    Args:
        name: Name of the option.
        value: Its value.
        annotation: The annotation of the parameter.
        infinite: Whether a float may be infinite. Default: False.
    """
    kinds = annotation.split(" | ")
    if not all(kind in KINDS for kind in kinds) or any(_is_kind(value, kind) for kind in kinds):
        return
    if infinite and "float" in kinds and value in (math.inf, -math.inf):
        return
    expected = " or ".join(KINDS[kind] for kind in kinds)
    raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def check_within(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError, which names the option, for a number outside [low, high]."""
    if not low <= value <= high:
        expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "None":
        return value is None
    if kind == "str":
        return isinstance(value, str)
    if kind == "bool":
        return isinstance(value, int) and value in (0, 1)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, int):
        return value.bit_length() < 64
    return kind == "float" and math.isfinite(value)
