"""Files inside tar files, read at their places."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ldm.data.dataset import Problem
from ldm.support.text import escaped

MOST_OPEN = 64  # shards that a process has open at a time
READ_AHEAD = 1 << 14  # bytes
TAR_BLOCK = 512  # bytes of a tar file's header, and what the size of a member is rounded up to
MOST_EXTENDED = 1 << 14  # bytes of an extended header that is read here
PAX_RECORD = re.compile(rb"(\d{1,3}) (?:[amc]time|[ug]id|[ug]name)=[^\n]*\n")  # of an extended header


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
    """Return the names and the places of the files in a tar file; what is cut off is a problem.

    Headers of the common kind are read here, in a quarter of the time that `tarfile` takes, which reads the
    tar file from the first other header on.
    """
    whole = path.stat().st_size
    try:
        with path.open("rb", buffering=0) as file:
            place = 0
            while (found := plain_member(file.fileno(), place)) is not None:
                name, begin, size = found
                place = begin + -(-size // TAR_BLOCK) * TAR_BLOCK
                check_end(name, begin + size, whole)
                yield name, ShardSpan(number, begin, size)
            check_end("the last file", place, whole)
            file.seek(place)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    check_end(member.name, member.offset_data + member.size, whole)
                    if member.isreg():
                        yield member.name, ShardSpan(number, member.offset_data, member.size)
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
    except (tarfile.TarError, OSError, EOFError) as error:
        problems.append(Problem(path.name, "unreadable", f"the shard is damaged: {escaped(error, 300)}"))


def check_end(name: str, end: int, whole: int) -> None:
    """Raise ReadError if a member ends behind the end of its tar file."""
    if end > whole:
        raise tarfile.ReadError(f"it ends within {name}")


def plain_member(handle: int, place: int) -> tuple[str, int, int] | None:
    """Return name, offset and size of the file whose header is at a place in a tar file.

    Args:
        handle: File descriptor of the tar file.
        place: Offset of the header, or of extended headers (pax) before it that only state times and owners,
            as the shards of the `webdataset` package have them.

    Returns:
        None unless it is a regular file whose header is intact and states its short name and its size in
        octal digits (POSIX.1-1988), so that `tarfile` reads the same from it.
    """
    header = os.pread(handle, TAR_BLOCK, place)
    if header[156:157] == b"x" and (size := octal_size(header)) is not None and size <= MOST_EXTENDED:
        extended = os.pread(handle, size, place + TAR_BLOCK)
        if not states_times(extended):
            return None
        place += TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK
        header = os.pread(handle, TAR_BLOCK, place)
    size = octal_size(header)
    name = header[:100].partition(b"\0")[0]
    if size is None or header[156:157] not in (b"0", b"\0") or header[345:346] != b"\0" or not name.isascii():
        return None
    if not name or name.endswith(b"/"):  # a folder of old
        return None
    return name.decode("ascii"), place + TAR_BLOCK, size


def states_times(extended: bytes) -> bool:
    """Return whether an extended header (pax) is intact and states times and owners alone."""
    while extended:
        record = PAX_RECORD.match(extended)
        if record is None or int(record[1]) != record.end():
            return False
        extended = extended[record.end() :]
    return True


def octal_size(header: bytes) -> int | None:
    """Return the size that a header states; None unless its checksum is right and both are octal digits."""
    stated, size = (header[part].strip(b" \0") for part in (slice(148, 156), slice(124, 136)))
    if len(header) < TAR_BLOCK or not stated.isdigit() or not size.isdigit() or b"8" in size or b"9" in size:
        return None
    if (
        b"8" in stated
        or b"9" in stated
        or int(stated, 8) != sum(header) - sum(header[148:156]) + 8 * ord(" ")
    ):
        return None
    return int(size, 8)
