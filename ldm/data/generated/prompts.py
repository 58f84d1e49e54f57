"""Tables of prompts: what each image of a generated data set shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.sources.texts import MAX_METADATA, read_metadata, read_utf8
from ldm.support.config import nearest
from ldm.support.text import shown

TABLE_SUFFIXES = (".txt", ".csv", ".jsonl")
# options of a row besides prompt and seed, with their types in a CSV
ROW_OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "negative": str,
    "steps": int,
    "guidance": float,
    "sampler": str,
    "spacing": str,
    "convention": str,
    "height": int,
    "width": int,
}


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One row of a table.

    Args:
        prompt: The prompt.
        seed: Seed of its first image; None for that of its place in the table.
        options: Options of `text_to_image` for this row.
    """

    prompt: str
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def read_prompt_table(path: str | Path) -> list[PromptRow]:
    """Read a table of prompts.

    A text file has a prompt in each line; empty lines are left out. CSV and JSON lines have the column
    "prompt", and if wanted "seed" and those of `ROW_OPTIONS`; an empty or absent value is the default.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the suffix, a column or a value is wrong; the message names the line.
    """
    path = Path(path)
    if path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{shown(str(path))}: expected a file name that ends in {', '.join(TABLE_SUFFIXES)}")
    if path.suffix == ".txt":
        lines = (line.strip() for line in read_utf8(path, MAX_METADATA).split("\n"))
        rows = [PromptRow(prompt=line) for line in lines if line]
    else:
        rows = [_read_row(entry, f"{shown(str(path))}, line {line}") for line, entry in read_metadata(path)]
    if not rows:
        raise ValueError(f"{shown(str(path))}: expected at least one prompt")
    return rows


def _read_row(entry: Any, where: str) -> PromptRow:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("prompt"), str):
        raise ValueError(f"{where}: expected a row with a text as its 'prompt', got {shown(entry)}")
    given = {key: value for key, value in entry.items() if key != "prompt" and value not in (None, "")}
    for key in given:
        if key != "seed" and key not in ROW_OPTIONS:
            raise ValueError(
                f"{where}: column {shown(key)}; {nearest(key, ('prompt', 'seed', *ROW_OPTIONS))}"
            )
    try:
        values = {key: _converted(key, value) for key, value in given.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    seed = values.pop("seed", None)
    return PromptRow(prompt=entry["prompt"], seed=seed, options=values)


def _converted(key: str, value: Any) -> Any:
    """Return a value of a column; texts, as a CSV has them, as numbers where the column has numbers."""
    if not isinstance(value, str):
        return value
    convert = int if key == "seed" else ROW_OPTIONS[key]
    try:
        return convert(value)
    except ValueError:
        raise ValueError(f"{key}: expected a number, got {shown(value)}") from None
