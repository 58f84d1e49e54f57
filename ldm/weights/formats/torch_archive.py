"""The zip archives that `torch.save` writes, checked completely before anything in them is used."""

from __future__ import annotations

import mmap
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ldm.weights.formats.pickle_scan import MAX_PICKLE
from ldm.weights.formats.safetensors import mapped_tensor

ZIP = b"PK\x03\x04"  # first bytes of a zip archive


class TorchArchive:
    """The zip archive that `torch.save` writes.

    It is checked completely: no entry is compressed, overlaps another or extends beyond the file.

    Args:
        path: The file.
        data: Its memory map.

    Raises:
        ValueError: If the archive is damaged, was not written by `torch.save`, or is a zip bomb.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data = path, data
        self.places: dict[str, tuple[int, int]] = {}  # name: (first byte, bytes)
        try:
            with zipfile.ZipFile(path) as archive:
                entries, end = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise ValueError(
                f"{str(path)!r} is truncated or damaged: it begins as a zip archive, but {error}"
            ) from None
        self._refuse_torchscript([entry.filename for entry in entries])
        self._locate(sorted(entries, key=lambda entry: entry.header_offset), end)
        pickles = [name for name in self.places if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            inside = ", ".join(list(self.places)[:5])
            raise ValueError(
                f"{str(path)!r} is a zip archive, but not one that torch.save writes; unpack it first. It"
                f" holds: {inside}"
            )
        self.root = pickles[0].removesuffix("data.pkl")
        order = self.places.get(f"{self.root}byteorder")
        if order is not None and data[order[0] : sum(order)].strip() != b"little":
            raise ValueError(f"{str(path)!r}: written on a big-endian machine; expected a little-endian file")

    def _locate(self, entries: list[zipfile.ZipInfo], end: int) -> None:
        """Check and record the place of each entry, in the order of the file; ``end``: where entries end."""
        free = 0
        for entry in entries:
            if (
                entry.compress_type != zipfile.ZIP_STORED
                or entry.file_size != entry.compress_size
                or entry.flag_bits & 1
            ):
                raise ValueError(
                    f"{str(self.path)!r} is refused: {entry.filename!r} is compressed ({entry.compress_size}"
                    f" bytes that expand to {entry.file_size}), which torch.save never does: it is a zip bomb"
                    " or an archive to be unpacked first"
                )
            head = self.data[entry.header_offset : entry.header_offset + 30]
            begin = (
                entry.header_offset
                + 30
                + int.from_bytes(head[26:28], "little")
                + int.from_bytes(head[28:30], "little")
            )
            if (
                head[:4] != ZIP
                or entry.header_offset < free
                or begin + entry.file_size > end
                or entry.filename in self.places
            ):
                raise ValueError(
                    f"{str(self.path)!r} is refused: {entry.filename!r} lies outside the archive"
                    " or overlaps another entry"
                )
            free = begin + entry.file_size
            self.places[entry.filename] = (begin, entry.file_size)

    def _refuse_torchscript(self, names: list[str]) -> None:
        if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
            raise ValueError(
                f"{str(self.path)!r} is a TorchScript archive (as OpenAI publishes CLIP), which contains"
                " code that is not run. Use the same weights as safetensors, or, if you trust the file,"
                " convert it once: torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(),"
                " NEW_FILE)"
            )

    def pickle(self) -> bytes:
        """Return the bytes of data.pkl."""
        begin, size = self.places[f"{self.root}data.pkl"]
        if size > MAX_PICKLE:
            raise ValueError(
                f"{str(self.path)!r} is refused: a pickle of {size} bytes, the limit is {MAX_PICKLE}"
            )
        return self.data[begin : begin + size]

    def storage(self, dtype: torch.dtype, key: str, numel: int) -> Tensor:
        """Return the memory-mapped storage ``key`` of ``numel`` entries as a flat tensor."""
        begin, size = self.places.get(f"{self.root}data/{key}", (0, -1))
        if size != numel * dtype.itemsize:
            what = "is not in the archive" if size < 0 else f"has {size} bytes in the archive"
            raise ValueError(
                f"{str(self.path)!r}: its pickle is wrong: storage {key!r} of {numel} × {dtype} {what}"
            )
        return mapped_tensor(self.data, dtype, (numel,), begin)
