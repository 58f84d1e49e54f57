"""Write damaged and malicious files."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch


class Canary:
    """An object whose pickle makes a folder at `path` when a reader executes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def canary_ckpt(path: Path, mark: Path, *, legacy: bool = False) -> Path:
    """Write a checkpoint with valid tensors and one object that would make a folder at `mark`."""
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "extra": Canary(mark)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    return path


def zipped(path: Path, entries: dict[str, bytes], *, compress: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def zip_entries(entries: Mapping[str, bytes]) -> bytes:
    """Return a zip archive of uncompressed entries."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def legacy_file(
    content: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None, keys: object = None
) -> bytes:
    """Return a file in PyTorch's format before 1.6.

    Args:
        content: The pickle of the content.
        storages: (number of entries, bytes) of each storage, by key. Default: none.
        keys: The fifth pickle, as an object; None for the keys of `storages`. Default: None.
    """
    storages = storages or {}
    system = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    magic = (0x1950A86A20F9469CFC6C, 1001, system)
    head = b"".join(pickle.dumps(each, protocol=2) for each in magic)
    tail = pickle.dumps(list(storages) if keys is None else keys, protocol=2)
    data = b"".join(numel.to_bytes(8, "little") + stored for numel, stored in storages.values())
    return head + content + tail + data


def repacked(source: Path, path: Path, *, compress: bool = False, **changes: bytes) -> Path:
    """Copy a checkpoint with some entries replaced (named by the last part of their path, "_" for ".")."""
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for name in entries:
        entries[name] = changes.get(name.rpartition("/")[2].replace(".", "_"), entries[name])
    return zipped(path, entries, compress=compress)


def stack_global(module: str, name: str, argument: str) -> bytes:
    """Return a protocol-4 pickle that calls a function named by strings."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


def huge_memo() -> bytes:
    """Return a pickle of a few bytes that makes an ordinary unpickler reserve gigabytes."""
    return b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + b"."


def plain_pickle(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path
