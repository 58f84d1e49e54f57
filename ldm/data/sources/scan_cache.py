"""What earlier scans found in files that have not changed, kept in LDM_HOME.

An entry is a JSON file of columns, named by a hash of the place that was scanned. It states the size and the
time of change of what it describes; the reader compares them. An entry that cannot be read is made again, and
one that cannot be written is not kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.data.sources.decoding import Header
from ldm.support.files import write_atomically
from ldm.support.home import library_home, make_folder
from ldm.support.strict_json import read_json

FORMAT = 1  # of the entries; others are not read
LEAST_SECONDS = 0.2  # of work that is worth keeping
DAMAGED = (ValueError, KeyError, TypeError)  # what reading the columns of a damaged entry raises
MAX_ENTRY = 1 << 32  # bytes
FIELDS = ("heights", "widths", "frames", "heads")  # columns of headers


def entry_path(kind: str, *place: object) -> Path:
    """Return the file of the entry of a place, such as a folder or a shard, with what else it depends on."""
    name = hashlib.sha256(json.dumps([FORMAT, kind, *map(str, place)]).encode()).hexdigest()[:32]
    return library_home() / "scans" / f"{kind}-{name}.json"


def read_entry(path: Path) -> dict[str, Any]:
    """Return an entry; an empty one if there is none, or it is damaged."""
    try:
        return read_json(path, MAX_ENTRY)
    except (ValueError, OSError):
        return {}


def write_entry(path: Path, entry: Mapping[str, Any]) -> None:
    """Write an entry, if the folder permits it."""
    with suppress(OSError):
        make_folder(path.parent)
        write_atomically(path, json.dumps(entry, separators=(",", ":")).encode())


def header_columns(headers: Sequence[Header | None]) -> dict[str, list[Any]]:
    """Return headers as columns; one that is not kept has the height 0."""
    kept = [Header(0, 0, False, "") if each is None else each for each in headers]
    return {field: list(column) for field, column in zip(FIELDS, zip(*kept, strict=True), strict=True)}


def headers_of(entry: Mapping[str, Any]) -> list[Header | None]:
    """Return the headers in an entry; None for those that are not kept.

    Raises:
        ValueError, KeyError, TypeError: If it has other columns.
    """
    rows = zip(*(entry[field] for field in FIELDS), strict=True)
    return [Header(*row) if row[0] else None for row in rows]


def known_headers(path: Path) -> dict[str, Header | None]:
    """Return the headers in an entry by the fingerprints of their files; empty without an intact entry."""
    entry = read_entry(path)
    try:
        return dict(zip(entry["fingerprints"], headers_of(entry), strict=True))
    except DAMAGED:
        return {}
