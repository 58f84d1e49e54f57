"""Files inside tar files, read at their places."""

from __future__ import annotations

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ldm.data.dataset import Problem
from ldm.support.text import escaped

MOST_OPEN = 64  # shards that a process has open at a time
READ_AHEAD = 1 << 14  # bytes


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

    def opened(self, span: ShardSpan) -> BinaryIO:
        """Return a file that is read piece by piece, as far as it is needed."""
        return cast(BinaryIO, io.BufferedReader(_Pieces(self, span), READ_AHEAD))


class _Pieces(io.RawIOBase):
    """A file inside a shard, of which each read reads a piece."""

    def __init__(self, files: ShardFiles, span: ShardSpan) -> None:
        super().__init__()
        self._files, self._span, self._place = files, span, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # any writable buffer
        shard, offset, size = self._span
        count = max(0, min(len(buffer), size - self._place))
        found = self._files.read(ShardSpan(shard, offset + self._place, count))
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._span.size}[whence]
        self._place = max(0, start + offset)
        return self._place


def shard_members(number: int, path: Path, problems: list[Problem]) -> Iterator[tuple[str, ShardSpan]]:
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
