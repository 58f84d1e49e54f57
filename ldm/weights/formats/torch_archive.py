"""The zip archives that `torch.save` writes, checked completely before anything in them is used."""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ldm.support.text import shown
from ldm.weights.formats.pickle_tensors import StoredBytes
from ldm.weights.formats.safetensors import mapped_bytes

ZIP = b"PK\x03\x04"  # first bytes of a zip archive, and of each entry
DIRECTORY_ENTRY, DESCRIPTOR, END = b"PK\x01\x02", b"PK\x07\x08", b"PK\x05\x06"
END_64, LOCATOR_64 = b"PK\x06\x06", b"PK\x06\x07"
MAX_ENTRIES = 100_000
SHORT, LONG = 0xFFFF, 0xFFFFFFFF  # "the number is in a field of 64 bits"
SIZES_FOLLOW, UTF_8 = 8, 0x800  # flags of an entry: sizes stand behind it, its name is UTF-8
OTHERS = (
    "version",
    "byteorder",
    ".format_version",
    ".storage_alignment",
)  # entries beside data.pkl and data/


class Entry(NamedTuple):
    """What the central directory states of an entry: name, flags, method of compression, CRC-32, number of
    bytes, compressed and not, and offset."""

    name: str
    flags: int
    method: int
    crc: bytes
    packed: int
    size: int
    at: int


class TorchArchive:
    """The zip archive that `torch.save` writes.

    It is checked completely: the entries fill the file from its first byte, each agrees with the central
    directory, none is compressed, no two have the same name, and one end record is at the end of the file.

    Args:
        path: The file.
        data: Its memory map.

    Attributes:
        places: First byte and number of bytes of each entry, by name.
        sums: Their checksums (CRC-32), by name.
        root: The folder of the entries, such as "archive/".

    Raises:
        ValueError: If the archive is damaged, was not written by `torch.save`, or is a zip bomb.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data = path, data
        self.places: dict[str, tuple[int, int]] = {}
        self.sums: dict[str, int] = {}
        begin, count, end = self._directory()
        entries = sorted(self._entries(begin, count, end), key=lambda entry: entry.at)
        self._refuse_torchscript([entry.name for entry in entries])
        free = 0
        for entry, following in zip(entries, [*(entry.at for entry in entries[1:]), begin], strict=True):
            self._check_kind(entry)
            if entry.at != free:
                raise self._refused(f"{shown(entry.name)} lies outside the archive or overlaps another entry")
            self._place(entry, following)
            free = following
        if len({name.lower() for name in self.places}) != len(entries):
            raise self._refused("two of its entries have the same name")
        pickles = [name for name in self.places if name == "data.pkl" or name.endswith("/data.pkl")]
        self.root = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else None

    def _refused(self, reason: str) -> ValueError:
        return ValueError(f"{str(self.path)!r} is refused: {reason}")

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(
            f"{str(self.path)!r} is truncated or damaged: it begins as a zip archive, but {reason}"
        )

    def _number(self, at: int, size: int) -> int:
        return int.from_bytes(self.data[at : at + size], "little")

    def _directory(self) -> tuple[int, int, int]:
        """Return where the central directory begins, its number of entries, and where it ends."""
        last = len(self.data) - 22
        if last < 0 or self.data[last : last + 4] != END or self._number(last + 20, 2):
            raise self._damaged("its end record is not at its end")
        count, size, begin = (
            self._number(last + 10, 2),
            self._number(last + 12, 4),
            self._number(last + 16, 4),
        )
        disks = self._number(last + 4, 4) or self._number(last + 8, 2) != count
        end = last
        if last >= 76 and self.data[last - 20 : last - 16] == LOCATOR_64:
            end = last - 76
            wide = [self._number(end + 24 + 8 * i, 8) for i in range(4)]
            if (
                self.data[end : end + 4] != END_64
                or (self._number(end + 4, 8), self._number(end + 16, 8)) != (44, 0)
                or (self._number(last - 16, 4), self._number(last - 12, 8), self._number(last - 4, 4))
                != (0, end, 1)
                or wide[0] != wide[1]
                or any(
                    n not in (w, full)
                    for n, w, full in zip((count, size, begin), wide[1:], (SHORT, LONG, LONG), strict=True)
                )
            ):
                raise self._damaged("its two end records do not agree")
            count, size, begin = wide[1:]
        if disks or begin + size != end:
            raise self._damaged("its directory does not end where its end record begins")
        if not 0 < count <= MAX_ENTRIES:
            raise self._damaged(f"it has {count:,} entries, expected 1 to {MAX_ENTRIES:,}")
        return begin, count, end

    def _entries(self, begin: int, count: int, end: int) -> Iterator[Entry]:
        """Yield the entries of the central directory, which must fill it."""
        data, at = self.data, begin
        for _ in range(count):
            if at + 46 > end or data[at : at + 4] != DIRECTORY_ENTRY:
                raise self._damaged("its directory ends early")
            name_end = at + 46 + self._number(at + 28, 2)
            extra_end = name_end + self._number(at + 30, 2)
            if extra_end > end or self._number(at + 32, 4):
                raise self._damaged(
                    "an entry of its directory ends early, has a comment or lies on another disk"
                )
            numbers = [self._number(at + 20, 4), self._number(at + 24, 4), self._number(at + 42, 4)]
            try:
                name = data[at + 46 : name_end].decode()
            except UnicodeDecodeError:
                raise self._damaged("the name of an entry is not UTF-8") from None
            yield Entry(
                name,
                self._number(at + 8, 2),
                self._number(at + 10, 2),
                data[at + 16 : at + 20],
                *self._wide(numbers, name_end, extra_end, order=(1, 0, 2)),
            )
            at = extra_end
        if at != end:
            raise self._damaged("bytes follow its directory")

    def _wide(self, numbers: list[int], at: int, end: int, order: tuple[int, ...]) -> list[int]:
        """Return numbers of 32 bits, those of 64 bits from the extra field, which begins with them.

        Args:
            numbers: The numbers.
            at: Offset of the extra field.
            end: Offset of the first byte behind it.
            order: The order in which the extra field holds those that are too wide.
        """
        wide = [i for i in order if numbers[i] == LONG]
        if wide and (
            self._number(at, 2) != 1
            or self._number(at + 2, 2) < 8 * len(wide)
            or at + 4 + 8 * len(wide) > end
        ):
            raise self._damaged("an entry lacks its sizes")
        for k, i in enumerate(wide):
            numbers[i] = self._number(at + 4 + 8 * k, 8)
        return numbers

    def _refuse_torchscript(self, names: list[str]) -> None:
        if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
            raise ValueError(
                f"{str(self.path)!r} is a TorchScript archive (as OpenAI publishes CLIP), which contains"
                " code that is not run. Use the same weights as safetensors, or, if you trust the file,"
                " convert it once: torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(),"
                " NEW_FILE)"
            )

    def _check_kind(self, entry: Entry) -> None:
        if entry.method or entry.size != entry.packed or entry.flags & 1:
            raise self._refused(
                f"{shown(entry.name)} is compressed ({entry.packed} bytes that expand to {entry.size}), which"
                " torch.save never does: it is a zip bomb or an archive to be unpacked first"
            )
        if entry.flags & ~(SIZES_FOLLOW | UTF_8):
            raise self._refused(
                f"{shown(entry.name)} has flags {entry.flags:#x}, which torch.save never sets"
            )

    def _place(self, entry: Entry, following: int) -> None:
        """Compare an entry with the directory, and record its place.

        Args:
            entry: What the directory states.
            following: Where the following entry, or the directory, begins.
        """
        data, at = self.data, entry.at
        name_end = at + 30 + self._number(at + 26, 2)
        begin = name_end + self._number(at + 28, 2)
        sizes = self._wide(
            [self._number(at + 18, 4), self._number(at + 22, 4)], name_end, begin, order=(1, 0)
        )
        stated = (data[at + 14 : at + 18], *sizes)
        wanted = (entry.crc, entry.packed, entry.size)
        later = entry.flags & SIZES_FOLLOW and stated == (bytes(4), 0, 0)
        end = begin + entry.size
        rest = data[end : min(following, end + 25)]
        trailer = b"" if not entry.flags & SIZES_FOLLOW else DESCRIPTOR + entry.crc
        trailers = [
            trailer + 2 * entry.size.to_bytes(width, "little") for width in (4, 8) if entry.size < 256**width
        ]
        if (
            data[at : at + 4] != ZIP
            or data[at + 30 : name_end] != entry.name.encode()
            or (self._number(at + 6, 2), self._number(at + 8, 2)) != (entry.flags, entry.method)
            or (stated != wanted and not later)
            or end > following
            or rest not in (trailers if trailer else [b""])
        ):
            raise self._refused(
                f"{shown(entry.name)} lies outside the archive or overlaps another entry, or differs from"
                " what the directory states"
            )
        self.places[entry.name] = (begin, entry.size)
        self.sums[entry.name] = int.from_bytes(entry.crc, "little")

    def check_kind(self) -> None:
        """Raise ValueError if the archive does not hold one pickle of `torch.save`."""
        if self.root is None:
            inside = ", ".join(map(shown, list(self.places)[:5]))
            raise ValueError(
                f"{str(self.path)!r} is a zip archive, but not one that torch.save writes; unpack it first."
                f" It holds: {inside}"
            )

    def check_entries(self, storages: Container[str]) -> None:
        """Raise ValueError unless the entries are those that `torch.save` writes.

        Args:
            storages: Keys of the storages that the pickle refers to.
        """
        root, known = str(self.root), ("data.pkl", *OTHERS)
        for name, (_, size) in self.places.items():
            own = name.removeprefix(root) if name.startswith(root) else ""
            stored = own.startswith("data/") and own[5:] in storages
            empty = not size and (own.startswith("data/") or name.endswith("/"))  # the latter is a folder
            if own not in known and not stored and not empty and not own.startswith(".data/"):
                raise self._refused(f"it holds {shown(name)}, which neither torch.save nor its pickle knows")
        begin, size = self.places.get(f"{root}byteorder", (0, 0))
        if size and self.data[begin : begin + min(size, 16)].strip() != b"little":
            raise ValueError(
                f"{str(self.path)!r}: written on a big-endian machine; expected a little-endian file"
            )

    def check_sums(self) -> None:
        """Raise ValueError if the bytes of an entry do not have its checksum."""
        view = memoryview(self.data)
        for name, (begin, size) in self.places.items():
            found = 0
            for at in range(begin, begin + size, 2**20):
                found = zlib.crc32(view[at : min(begin + size, at + 2**20)], found)
            if found != self.sums[name]:
                raise ValueError(f"{str(self.path)!r} is damaged at {shown(name)}: its checksum differs")

    def pickles(self) -> Iterator[tuple[int, int]]:
        """Yield first and last byte of each entry that is a pickle by its name, or, outside of the folder of
        the storages, by its first byte; that of the state dict first."""
        main = f"{self.root}data.pkl"
        for name in sorted(self.places, key=lambda name: name != main):
            begin, size = self.places[name]
            stored = self.root is not None and name.startswith(f"{self.root}data/")
            if name.endswith(".pkl") or (not stored and size and self.data[begin] == 0x80):
                yield begin, begin + size

    def storage(self, stored: StoredBytes, alignment: int) -> Tensor:
        """Return the bytes of a storage, memory-mapped; a copy if they are not aligned."""
        begin, size = self.places.get(f"{self.root}data/{stored.key}", (0, -1))
        if size != stored.size:
            numel = stored.size // stored.dtype.itemsize
            what = "is not in the archive" if size < 0 else f"has {size} bytes in the archive"
            raise ValueError(f"storage {shown(stored.key)} of {numel} × {stored.dtype} {what}")
        return mapped_bytes(self.data, begin, size, alignment)
