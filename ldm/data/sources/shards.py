"""WebDataset shards: tar files whose members are read in any order.

The `webdataset` package reads shards as streams, whose order depends on the number of workers and on where a
run is interrupted. Here the headers of the tar files are read once, and each image is then read at its place,
so that a sample is a function of its global index. Which files belong together is the package's rule.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ldm.data.dataset import Problem, Record
from ldm.data.sources.config import ShardData
from ldm.data.sources.decoding import IMAGE_SUFFIXES, decode
from ldm.data.sources.scanning import ScannedFile, check_problems, scan
from ldm.data.sources.table import Records
from ldm.data.sources.texts import caption_lines, captions_of
from ldm.support.strict_json import parse_json
from ldm.support.text import escaped, shown

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_OPEN = 64  # shards that a process has open at a time
TEXT_SUFFIXES = ("txt", "json")


class ShardSpan(NamedTuple):
    """Where a file lies: number of the shard, offset and size in bytes."""

    shard: int
    offset: int
    size: int


class ShardFiles:
    """Files inside tar files, read by their places; at most `MOST_OPEN` shards are open at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()  # shard → file descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict()}

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)

    def read(self, span: ShardSpan) -> bytes:
        """Return the bytes of a file."""
        if span.shard in self._open:
            self._open.move_to_end(span.shard)
        else:
            if len(self._open) == MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[span.shard] = os.open(self.paths[span.shard], os.O_RDONLY)
        # the place is given with each call: processes that share the file do not disturb one another
        return os.pread(self._open[span.shard], span.size, span.offset)


class ShardImages:
    """The images of WebDataset shards.

    Args:
        config: The shards, and what is expected of them.

    Raises:
        FileNotFoundError: If there is no such shard.
        ValueError: If there is no image to train on, or too many are broken; the message names them.
        ImportError: If `webdataset` is not installed.
    """

    def __init__(self, config: ShardData) -> None:
        self.config = config
        self.files = ShardFiles(find_shards(config.path))
        changed = [path.stat().st_mtime_ns for path in self.files.paths]
        problems: list[Problem] = []
        names, spans, captions = [], [], []
        for name, members in self._samples(problems):
            image = next((suffix for suffix in members if f".{suffix}" in IMAGE_SUFFIXES), None)
            if image is None:
                kind = "caption without an image" if set(members) & {*TEXT_SUFFIXES} else "not an image"
                problems.append(Problem(name, kind, f"it has {', '.join(map(escaped, members))}"))
                continue
            names.append(f"{name}.{image}")
            spans.append(members[image])
            captions.append(self._captions(name, members, problems))
        candidates = [
            ScannedFile(
                name=name,
                size=span.size,
                fingerprint=f"{name}/{span.size}/{changed[span.shard]}",
                captions=texts,
            )
            for name, span, texts in zip(names, spans, captions, strict=True)
        ]
        kept, records, found = scan(candidates, lambda i: io.BytesIO(self.files.read(spans[i])), config)
        self.records, self.problems = Records(records), (*problems, *found)
        self.spans: np.ndarray = np.array([spans[i] for i in kept], dtype=np.int64).reshape(-1, 3)
        check_problems(self.problems, config, len(kept))

    def _samples(self, problems: list[Problem]) -> Iterator[tuple[str, dict[str, ShardSpan]]]:
        """Return the name of each sample, and the places of its files by suffix."""
        from webdataset.tariterators import base_plus_ext

        for number, path in enumerate(self.files.paths):
            current, members = None, dict[str, ShardSpan]()
            for name, span in _members(number, path, problems):
                key, suffix = base_plus_ext(name)
                if key is None or Path(name).name.startswith("."):
                    continue
                if key != current and members:
                    yield f"{path.name}/{current}", members
                    members = {}
                current = key
                members[suffix.lower()] = span
            if members:
                yield f"{path.name}/{current}", members

    def _captions(self, name: str, members: dict[str, ShardSpan], problems: list[Problem]) -> tuple[str, ...]:
        """Return the captions in the .json or the .txt file of a sample."""
        try:
            if "json" in members:
                entry = parse_json(self.files.read(members["json"]).decode("utf-8-sig"), "its .json file")
                try:
                    return captions_of(entry, self.config.caption_key)
                except ValueError:
                    if "txt" not in members:
                        raise
            if "txt" in members:
                return caption_lines(self.files.read(members["txt"]).decode("utf-8-sig"))
        except ValueError as error:
            problems.append(Problem(name, "bad metadata", escaped(error, 300)))
        return ()

    def __len__(self) -> int:
        return len(self.records)

    def record(self, i: int) -> Record:
        """Return what is known of image i."""
        return self.records[i]

    def open(self, i: int, least: int | None = None) -> Image:
        """Decode image i; see `Dataset.open`."""
        try:
            data = self.files.read(ShardSpan(*self.spans[i].tolist()))
        except OSError as error:
            raise ValueError(escaped(error, 300)) from None
        return decode(data, self.config.background, least)


def find_shards(path: str) -> list[Path]:
    """Return the shards that a path names: with braces expanded, or the .tar files of a folder.

    Raises:
        FileNotFoundError: If one is absent, or the folder has none.
        ImportError: If `webdataset` is not installed.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise ImportError("data.kind webdataset needs webdataset: pip install 'ldm[train]'") from None
    if Path(path).is_dir():
        found = sorted(Path(path).glob("*.tar"))
        if not found:
            raise FileNotFoundError(f"data.path {shown(path)}: no .tar file in this folder")
        return found
    if path.partition(":")[0] in ("pipe", "http", "https", "s3", "gs"):
        raise FileNotFoundError(f"data.path {shown(path)}: expected files: mount the server, or copy them")
    found = [Path(each) for each in expand_urls(path)]
    if absent := [str(each) for each in found if not each.is_file()]:
        raise FileNotFoundError(f"data.path {shown(path)}: no such file: {', '.join(map(shown, absent[:5]))}")
    return found


def _members(number: int, path: Path, problems: list[Problem]) -> Iterator[tuple[str, ShardSpan]]:
    """Return the names and the places of the files in a tar file; what is cut off is a problem."""
    whole = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > whole:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                if member.isreg():
                    yield member.name, ShardSpan(number, member.offset_data, member.size)
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
    except (tarfile.TarError, OSError, EOFError) as error:
        problems.append(Problem(path.name, "unreadable", f"the shard is damaged: {escaped(error, 300)}"))
