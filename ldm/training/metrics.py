"""The metrics file of a run: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ldm.support.files import append_text, write_atomically


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Append a row to a metrics file."""
    append_text(path, json.dumps(row) + "\n")


def has_validation(path: Path, step: int) -> bool:
    """Return whether a metrics file has the validation row of a step."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any("validation/" in line and _step_of(line) == step for line in lines)


def drop_later_rows(path: Path, step: int) -> None:
    """Remove the rows behind `step`, and a row cut short by a kill."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_atomically(path, "".join(line + "\n" for line in kept).encode())


def thin_rows(path: Path, n: int = 100) -> str:
    """Return a metrics file with at most n of its loss rows, evenly spaced, and all its validation rows."""
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    losses = [i for i, row in enumerate(rows) if "validation/" not in row]
    n = min(n, len(losses))
    kept = {losses[-1 - round(k * (len(losses) - 1) / max(n - 1, 1))] for k in range(n)}
    return "".join(row + "\n" for i, row in enumerate(rows) if i in kept or "validation/" in row)


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")
