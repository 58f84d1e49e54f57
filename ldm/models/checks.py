"""Checks that the configurations of several networks share."""

from __future__ import annotations


def check_positive(**values: int | None) -> None:
    """Raise ValueError if a value is below 1; None passes.

    Args:
        values: Values by the names that the error message shows.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
