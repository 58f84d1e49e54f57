"""Captions beside images: text files, and metadata in JSON lines or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.support.text import escaped, read_utf8, shown

CAPTION_KEYS = ("text", "caption", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")
MAX_TEXT = 1 << 20  # bytes of a caption's file
MAX_METADATA = 1 << 32  # bytes of a file of metadata


def caption_lines(text: str) -> tuple[str, ...]:
    """Return the captions in a text file: its lines that are not empty, with single spaces."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return tuple(line for line in lines if line)


def captions_of(entry: Mapping[str, Any], key: str | None) -> tuple[str, ...]:
    """Return the captions in an entry of metadata.

    Args:
        entry: The entry.
        key: Its key of captions; None for the first of `CAPTION_KEYS` that it has.

    Raises:
        ValueError: If it has no such key, or the value is neither a text nor a list of texts.
    """
    keys = CAPTION_KEYS if key is None else (key,)
    found = next((name for name in keys if entry.get(name) is not None), None)
    if found is None:
        raise ValueError(f"expected {' or '.join(keys)}, got the keys {', '.join(map(escaped, entry))[:300]}")
    value = entry[found]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{found}: expected a text or a list of texts, got {shown(value)}")
    return tuple(line for text in texts for line in (" ".join(text.split()),) if line)


def read_metadata(path: Path) -> Iterable[tuple[int, Any]]:
    """Return the entries of a file of metadata, each with the number of its line.

    Raises:
        ValueError: If the file is not UTF-8, or a line of JSON is not valid; the message names it.
    """
    text = read_utf8(path, MAX_METADATA)
    if path.suffix == ".csv":
        try:
            return list(enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2))
        except csv.Error as error:
            raise ValueError(f"{shown(str(path))} is not valid CSV: {escaped(error, 300)}") from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{shown(str(path))}, line {number} is not valid JSON: {escaped(error, 300)}"
                ) from None
    return found
