"""The headers of tar files: what is read here is what `tarfile` reads, also of damaged files."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ldm.data.dataset import Problem
from ldm.data.sources import shard_files
from ldm.data.sources.shard_files import ShardSpan, plain_member, shard_members

Members = list[tuple[str, ShardSpan]]


def by_tarfile(path: Path) -> tuple[Members, bool]:
    """Return the files of a tar file as `tarfile` reads them, and whether it is damaged."""
    members: Members = []
    try:
        with tarfile.open(path, "r:") as tar:
            for each in tar:
                if each.offset_data + each.size > path.stat().st_size:
                    return members, True
                if each.isreg():
                    members.append((each.name, ShardSpan(0, each.offset_data, each.size)))
    except (tarfile.TarError, OSError, EOFError):
        return members, True
    return members, False


def read(path: Path) -> tuple[Members, bool]:
    problems: list[Problem] = []
    members = list(shard_members(0, path, problems))
    return members, bool(problems)


def add(tar: tarfile.TarFile, name: str, data: bytes = b"data", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(params=["ustar", "gnu", "pax"])
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tar file of one format: short and long names, times with fractions, folders, links, odd sizes."""
    formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    path = tmp_path / "shard.tar"
    with tarfile.TarFile(path, mode="w", format=formats[request.param]) as tar:
        for i in range(4):
            time = 1.7e9 + (0.25 if request.param == "pax" else 0)
            add(tar, f"{i:04d}.jpg", bytes(511 + i), mtime=time)
            add(tar, f"{i:04d}.txt", b"a caption", mtime=time)
        add(tar, "empty.txt", b"")
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        add(tar, f"folder/{'long' * 22}/{'name' * 15}.jpg")
        add(tar, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="0000.jpg")
        if request.param != "ustar":
            add(tar, "Äpfel.jpg")
        add(tar, "last.jpg", bytes(2000))
    return path


def test_members_are_those_of_tarfile(shard: Path) -> None:
    members, damaged = read(shard)
    assert (members, damaged) == by_tarfile(shard) and not damaged
    assert len(members) >= 11 and {span.size for _, span in members} >= {0, 511, 512, 513, 2000}


def test_damaged_files_are_read_as_tarfile_reads_them(shard: Path) -> None:
    whole, rng = shard.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole[: int(rng.integers(len(whole)))] if rng.random() < 0.3 else whole)
        for _ in range(rng.integers(0, 4)):
            if data:  # headers are at multiples of a block
                place = int(rng.integers(len(data))) // 512 * 512 + int(rng.integers(350))
                data[min(place, len(data) - 1)] = int(rng.choice([0, 32, 47, 48, 55, 56, 120, 255]))
        shard.write_bytes(data)
        assert read(shard) == by_tarfile(shard)


def test_headers_with_a_right_checksum_and_odd_fields_are_read_as_tarfile_reads_them(shard: Path) -> None:
    """Fields of the first header are changed, and its checksum is made right."""
    whole = shard.read_bytes()
    start = whole.index(b"0000.jpg")
    start = start // 512 * 512
    for place, field in (
        (0, b"name/\0\0\0\0\0"),
        (0, b"n\xe4me.jpg\0"),
        (0, b"\0" * 10),
        (124, b"00000001000\0"),
        (124, b"        777 "),
        (124, b"-0000000777\0"),
        (124, b"\x80" + b"\0" * 9 + b"\2\0"),
        (124, b"0_0000007_7\0"),
        (124, b"00000000899\0"),
        (156, b"7"),
        (156, b"x"),
        (156, b"\0"),
        (156, b"5"),
        (156, b"L"),
        (345, b"folder\0"),
    ):
        header = bytearray(whole[start : start + 512])
        header[place : place + len(field)] = field
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        shard.write_bytes(whole[:start] + bytes(header) + whole[start + 512 :])
        assert read(shard) == by_tarfile(shard), (place, field)


def test_common_shards_are_read_without_tarfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's writer states the time as a fraction, in an extended header before each file."""
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(5):
            writer.write({"__key__": f"{i}", "jpg": bytes(i + 500), "txt": "a caption"})
    expected, handle = by_tarfile(path), os.open(path, os.O_RDONLY)
    assert plain_member(handle, 0) is not None
    os.close(handle)
    opened: list[int] = []
    real = tarfile.open
    monkeypatch.setattr(
        shard_files.tarfile,
        "open",
        lambda **options: opened.append(options["fileobj"].tell()) or real(**options),
    )
    assert read(path) == expected and len(expected[0]) == 10
    assert opened == [expected[0][-1][1].offset + 512]  # the end of the file alone
