"""JSON restricted to what a configuration needs, read in a time and a memory that the file's size bounds.

Keys that are given twice, numbers that are not finite in float64, longer numbers than below, and nesting
deeper than `MAX_JSON_DEPTH` are refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from ldm.support.files import file_exists
from ldm.support.text import escaped, read_utf8, shown

MAX_JSON_BYTES = 1 << 22  # of a configuration
MAX_JSON_DEPTH = 32
MAX_JSON_DIGITS = 40  # characters of a whole number
MAX_JSON_DECIMALS = 400  # characters of another number
MAX_CONTAINERS = 1_000_000  # lists and mappings; an empty one takes 3 bytes in the file and 60 in memory


def read_json(path: Path, most: int = MAX_JSON_BYTES, *, infinite: bool = False) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Args:
        path: The file.
        most: Size in bytes that it may have. Default: `MAX_JSON_BYTES`.
        infinite: Whether infinity is read, which `json.dumps` writes. Default: False.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is larger, not UTF-8, not valid JSON, not a mapping, or holds what is not read; the
            message names it.
    """
    where = shown(str(path))
    if not file_exists(path):
        raise FileNotFoundError(f"no such file: {where}")
    return parse_json(read_utf8(path, most), where, infinite=infinite)


def parse_json(text: str, where: str, *, infinite: bool = False) -> dict[str, Any]:
    """Return the mapping in a JSON text.

    Args:
        text: The text.
        where: Start of error messages.
        infinite: Whether infinity is read, which `json.dumps` writes. Default: False.

    Raises:
        ValueError: See `read_json`.
    """
    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise ValueError(f"{where}: expected at most {MAX_CONTAINERS:,} lists and mappings")
    try:
        content = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_infinite if infinite else _refused,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {escaped(error, 300)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping, got {type(content).__name__}")
    _check_depth(content, where)
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {shown(twice)} is given twice")
    return mapping


def _whole(text: str) -> int:
    if len(text) > MAX_JSON_DIGITS:
        raise ValueError(f"expected a number of at most {MAX_JSON_DIGITS} characters, got {len(text)}")
    return int(text)


def _finite(text: str) -> float:
    if len(text) > MAX_JSON_DECIMALS or not math.isfinite(float(text)):
        raise ValueError(f"expected a finite number, got {shown(text)}")
    return float(text)


def _refused(name: str) -> float:
    raise ValueError(f"expected a finite number, got {name}")


def _infinite(name: str) -> float:
    return _refused(name) if name == "NaN" else float(name)


def _check_depth(content: dict[str, Any], where: str) -> None:
    """Raise ValueError if values are nested deeper than `MAX_JSON_DEPTH`."""
    level: list[Any] = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"{where}: expected at most {MAX_JSON_DEPTH} levels")
