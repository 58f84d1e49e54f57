"""What is in a shard: its samples, their captions and the headers of their images.

It is kept in LDM_HOME (see `ldm.data.sources.scan_cache`) until the shard has another size or time of change,
so that a restart does not read shards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ldm.data.dataset import Problem
from ldm.data.sources.decoding import IMAGE_SUFFIXES, Header
from ldm.data.sources.scan_cache import (
    DAMAGED,
    LEAST_SECONDS,
    entry_path,
    header_columns,
    headers_of,
    read_entry,
    write_entry,
)
from ldm.data.sources.scanning import ScannedFile, look_again
from ldm.data.sources.shard_files import ShardFiles, ShardSpan, shard_members
from ldm.data.sources.table import SEPARATOR
from ldm.data.sources.texts import caption_lines, captions_of
from ldm.support.strict_json import parse_json
from ldm.support.text import escaped

TEXT_SUFFIXES = ("txt", "json")


class ShardImage(NamedTuple):
    """An image in a shard: name, place, captions, and the header if an earlier scan has it."""

    name: str
    span: ShardSpan
    captions: tuple[str, ...]
    header: Header | None


def scan_shard(
    files: ShardFiles, number: int, key: str | None, problems: list[Problem]
) -> tuple[list[ScannedFile], list[ShardSpan]]:
    """Return the images of a shard, and where they lie.

    Args:
        files: The shards.
        number: Number of the shard.
        key: Key of captions in .json files; see `ShardData`.
        problems: What is wrong with samples is appended to it.
    """
    path, started = files.paths[number], time.monotonic()
    status = path.stat()
    stamp = {"size": status.st_size, "changed": status.st_mtime_ns}
    place = entry_path("shard", path.resolve(), key)
    found = _kept(read_entry(place), number, stamp)
    images, noted = _read_shard(files, number, key) if found is None else found
    candidates = [
        ScannedFile(
            name=each.name,
            size=each.span.size,
            fingerprint=f"{each.name}/{each.span.size}/{status.st_mtime_ns}",
            captions=each.captions,
            header=look_again(each.header, partial(files.opened, each.span)),
        )
        for each in images
    ]
    problems += noted
    damaged = any(problem.kind == "unreadable" for problem in noted)
    if found is None and not damaged and time.monotonic() - started > LEAST_SECONDS:
        write_entry(place, _entry(images, candidates, noted, stamp))
    return candidates, [each.span for each in images]


def _entry(
    images: list[ShardImage], looked: list[ScannedFile], noted: list[Problem], stamp: Mapping[str, int]
) -> dict[str, Any]:
    headers = [each.header if isinstance(each.header, Header) else None for each in looked]
    return {
        **stamp,
        "names": [each.name for each in images],
        "offsets": [each.span.offset for each in images],
        "sizes": [each.span.size for each in images],
        "captions": [SEPARATOR.join(each.captions) for each in images],
        **header_columns(headers),
        "problems": [list(problem) for problem in noted],
    }


def _kept(
    entry: Mapping[str, Any], number: int, stamp: Mapping[str, int]
) -> tuple[list[ShardImage], list[Problem]] | None:
    """Return what an entry states of a shard; None unless it is intact and of the shard as it is now."""
    if any(entry.get(name) != value for name, value in stamp.items()):
        return None
    try:
        columns = (entry[name] for name in ("names", "offsets", "sizes", "captions"))
        images = [
            ShardImage(
                name,
                ShardSpan(number, offset, size),
                tuple(captions.split(SEPARATOR)) if captions else (),
                header,
            )
            for name, offset, size, captions, header in zip(*columns, headers_of(entry), strict=True)
        ]
        return images, [Problem(*problem) for problem in entry["problems"]]
    except DAMAGED:
        return None


def _read_shard(files: ShardFiles, number: int, key: str | None) -> tuple[list[ShardImage], list[Problem]]:
    """Return the images of a shard without their headers, and what is wrong with its samples."""
    images, problems = list[ShardImage](), list[Problem]()
    for name, members in _samples(files.paths[number], number, problems):
        image, *others = [suffix for suffix in members if f".{suffix}" in IMAGE_SUFFIXES] or [""]
        if not image:
            kind = "caption without an image" if set(members) & {*TEXT_SUFFIXES} else "not an image"
            problems.append(Problem(name, kind, f"it has {', '.join(map(escaped, members))}"))
            continue
        if others:
            used = f".{image} is used, not .{', .'.join(others)}"
            problems.append(Problem(name, "several images", used))
        captions = _captions(files, name, members, key, problems)
        images.append(ShardImage(f"{name}.{image}", members[image], captions, None))
    return images, problems


def _samples(path: Path, number: int, problems: list[Problem]) -> Iterator[tuple[str, dict[str, ShardSpan]]]:
    """Return the name of each sample of a shard, and the places of its files by suffix."""
    from webdataset.tariterators import base_plus_ext

    current, members = None, dict[str, ShardSpan]()
    for name, span in shard_members(number, path, problems):
        key, suffix = base_plus_ext(name)
        if key is None or Path(name).name.startswith("."):
            continue
        if key != current and members:
            yield f"{path.name}/{current}", members
            members = {}
        current, suffix = key, suffix.lower()
        if suffix in members:
            problems.append(Problem(f"{path.name}/{name}", "duplicate", "the shard has a file of this name"))
            continue
        members[suffix] = span
    if members:
        yield f"{path.name}/{current}", members


def _captions(
    files: ShardFiles, name: str, members: dict[str, ShardSpan], key: str | None, problems: list[Problem]
) -> tuple[str, ...]:
    """Return the captions in the .json or the .txt file of a sample."""
    try:
        if "json" in members:
            entry = parse_json(files.read(members["json"]).decode("utf-8-sig"), "its .json file")
            try:
                return captions_of(entry, key)
            except ValueError:
                if "txt" not in members:
                    raise
        if "txt" in members:
            return caption_lines(files.read(members["txt"]).decode("utf-8-sig"))
    except ValueError as error:
        problems.append(Problem(name, "bad metadata", escaped(error, 300)))
    return ()
