"""Pickles that ask for more than a file of their size may: refused within the limits of time and memory."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
import torch
from fuzzing import Target, read_under_limits
from malicious_files import legacy_file, zip_entries

from ldm.registry.inspection import inspect
from ldm.weights.formats.pickles import examine, read_ckpt


def read(path: Path) -> None:
    """Inspect a file, then read it."""
    inspect(path, nan=True, digest=False).text()
    read_ckpt(path)


def number(value: int) -> bytes:
    return b"\x8a\x20" + value.to_bytes(32, "little", signed=True)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nByteStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuM\x00\x04tQ"  # 1024
)


def tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00", storage: bytes = STORAGE) -> bytes:
    """Return the instructions that build a tensor."""
    return b"ctorch._utils\n_rebuild_tensor\n(" + storage + offset + size + stride + b"tR"


def state(value: bytes, key: bytes = b"X\x01\x00\x00\x00w") -> bytes:
    """Return a pickle of a dictionary with a good tensor and an entry."""
    good = b"X\x04\x00\x00\x00good" + tensor(b"K\x04\x85", b"K\x01\x85")
    return b"\x80\x02}" + good + b"s" + key + value + b"s."


DOUBLED_TUPLE = b"K\x01q\x000" + b"h\x00h\x00\x86q\x000" * 100 + b"h\x00"
DOUBLED_LIST = b"]q\x000" + b"](h\x00h\x00eq\x000" * 100 + b"h\x00"
MODULUS = 2**61 - 1  # whole numbers that differ by it have one hash
# name: (the pickle of the state, what the message says; "" if the file can be read)
PICKLES = {
    "a text as a dimension": (
        state(tensor(b"X\x01\x00\x00\x00aJ\xff\xff\xff\x7f\x86", b"K\x01K\x01\x86")),
        "whole numbers",
    ),
    "a list as a dimension": (
        state(tensor(b"](K\x01eJ\xff\xff\xff\x7f\x86", b"K\x01K\x01\x86")),
        "whole numbers",
    ),
    "a truth value as a dimension": (state(tensor(b"\x88\x85", b"K\x01\x85")), "whole numbers"),
    "a negative dimension": (state(tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85")), "whole numbers"),
    "a huge dimension": (state(tensor(number(2**200) + b"\x85", b"K\x01\x85")), "whole numbers"),
    "many dimensions": (
        state(tensor(b"(" + b"K\x01" * 100_000 + b"t", b"(" + b"K\x01" * 100_000 + b"t")),
        "at most 64",
    ),
    "a product without bounds": (
        state(tensor(b"(" + number(2**40) * 60 + b"t", b"(" + b"K\x00" * 60 + b"t")),
        "does not fit",
    ),
    "no entries, but a huge shape": (
        state(tensor(b"K\x00" + number(2**48) * 2 + b"\x87", b"K\x01" * 3 + b"\x87")),
        "does not fit",
    ),
    "stride 0": (state(tensor(b"J\x00\x00\x00\x10\x85", b"K\x00\x85")), "does not fit"),
    "behind the storage": (state(tensor(b"K\x04\x85", b"M\x00\x02\x85")), "does not fit"),
    "an offset behind the storage": (
        state(tensor(b"K\x00\x85", b"K\x01\x85", number(2**40))),
        "does not fit",
    ),
    "a storage of a negative size": (
        state(
            tensor(b"K\x01\x85", b"K\x01\x85", storage=STORAGE.replace(b"M\x00\x04", b"J\xff\xff\xff\xff"))
        ),
        "storage",
    ),
    "a storage of a huge size": (
        state(tensor(b"K\x01\x85", b"K\x01\x85", storage=STORAGE.replace(b"M\x00\x04", number(2**70)))),
        "storage",
    ),
    "a doubled tuple as a key": (state(b"N", DOUBLED_TUPLE), ""),
    "a doubled list as a key": (state(b"N", DOUBLED_LIST), "cannot be a key"),
    "a doubled tuple as a value": (state(DOUBLED_TUPLE), ""),
    "a doubled tuple as a storage": (state(DOUBLED_TUPLE + b"Q"), "storage"),
    "a doubled list as an argument": (
        state(b"ctorch._utils\n_rebuild_tensor\n" + DOUBLED_LIST + b"\x85R"),
        "arguments",
    ),
    "a doubled list as a shape": (state(b"ctorch\nSize\n" + DOUBLED_LIST + b"\x85R"), "shape"),
    "deep tuples": (state(b")" + b"\x85" * 200_000), ""),
    "a deep tuple as a key": (state(b"N", b")" + b"\x85" * 200_000), ""),
    "deep lists": (state(b"]" * 100_000 + b"a" * 99_999), ""),
    "deep dictionaries": (state(b"}" + b"K\x01}" * 60_000 + b"s" * 60_000), ""),
    "deep calls": (
        state(b"cbuiltins\nset\nq\x000" + b"h\x00" * 60_000 + b")" + b"R\x85" * 59_999 + b"R"),
        "",
    ),
    "a huge number": (state(b"\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20), "bytes, the limit is"),
    "a number in many digits": (state(b"I" + b"9" * 100_000 + b"\n"), "line of at most"),
    "a number in digits": (state(b"L" + b"9" * 1000 + b"L\n"), "whole number"),
    "text without end": (state(b"\x8d" + b"\xff" * 8), "ends early"),
    "a frame without end": (state(b"\x95" + b"\xff" * 8 + b"N"), "ends early"),
    "a memo without bounds": (state(b"Nr\xff\xff\xff\x7f"), "memo index"),
    "a memo that was not written": (state(b"j\xff\x00\x00\x00"), "no index"),
    "numbers with the same hash": (
        state(b"}(" + b"".join(number(i * MODULUS) + b"N" for i in range(100_000)) + b"u"),
        "cannot be a key",
    ),
    "numbers with similar hashes": (
        state(b"}(" + b"".join(number(i << 43) + b"N" for i in range(200_000)) + b"u"),
        "",
    ),
    "real numbers as keys": (
        state(
            b"}("
            + b"".join(b"G" + struct.pack(">d", 2.0 ** (i % 1000) * (1 + i)) + b"N" for i in range(200_000))
            + b"u"
        ),
        "",
    ),
    "steps without end": (state(b"N0" * 1_000_000 + b"N"), "steps"),
    "a stack that is moved by marks": (state(b"N" * 100_000 + b"(0" * 100_000 + b"0" * 99_999), ""),
    "one list, copied often": (
        state(b"(" + b"N" * 100_000 + b"lq\x00ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 1000),
        "expected a list",
    ),
    "pairs, copied often": (
        state(
            b"(" + b"NN\x86" * 100_000 + b"lq\x00ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 1000
        ),
        "copied",
    ),
    "shapes, copied often": (
        state(b"(" + b"K\x01" * 60 + b"lq\x00ctorch\nSize\nq\x01(" + b"h\x01h\x00\x85R" * 200_000 + b"l"),
        "copied",
    ),
    "tensors without number": (
        state(
            b"ctorch._utils\n_rebuild_tensor\nq\x01("
            + STORAGE
            + b"K\x00K\x01\x85K\x01\x85tq\x00("
            + b"h\x01h\x00R" * 200_000
            + b"l"
        ),
        "tensors",
    ),
    "tensors that share a storage": (
        state(
            b"ctorch._utils\n_rebuild_tensor\nq\x010("
            + STORAGE
            + b"K\x00M\x00\x04\x85K\x01\x85tq\x000("
            + b"h\x01h\x00R" * 40_000
            + b"l"
        ),
        "share",
    ),
    "names without number": (state(b"".join(b"ca\nb%d\n0" % i for i in range(200_000)) + b"N"), "a.b0"),
    "a long name": (state(text("a" * 100_000) + b"q\x00" + b"h\x00h\x00\x930" * 1000 + b"N"), "has the name"),
    "a name with control characters": (state(b"cos\x1b[2J\nsystem\n"), "has the name"),
    "text with control characters as a key": (
        state(tensor(b"K\x01\x85", b"K\x01\x85"), text("\x1b[2J\u202e")),
        "visible",
    ),
    "half a character": (state(b"X\x03\x00\x00\x00\xed\xa0\x80"), "not UTF-8"),
    "a long key": (state(tensor(b"K\x01\x85", b"K\x01\x85"), text("k" * 5000)), "at most 1000"),
    "many keys": (
        state(b"N").replace(
            b"\x80\x02}",
            b"\x80\x02}(" + b"".join(struct.pack("<ci", b"J", i) + b"N" for i in range(200_000)) + b"u",
        ),
        "",
    ),
    "a storage as a key": (state(b"N", STORAGE), "cannot be a key"),
    "a call of a text": (state(text("posix.system") + b")R"), "expected a global"),
    "a call without a tuple": (state(b"ctorch\nSize\nNR"), "expected a global"),
    "a conjugated tensor": (
        state(
            b"ctorch._utils\n_rebuild_tensor_v2\n("
            + STORAGE
            + b"K\x00K\x01\x85K\x01\x85\x89N}X\x04\x00\x00\x00conj\x88stR"
        ),
        "properties",
    ),
}


def seeds() -> list[bytes]:
    found = []
    for legacy in (False, True):
        stream = io.BytesIO()
        torch.save({"w": torch.ones(2)}, stream, _use_new_zipfile_serialization=not legacy)
        found.append(stream.getvalue())
    return found


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", PICKLES)
def test_reading_is_bounded(case: str, legacy: bool, tmp_path: Path) -> None:
    pickled, words = PICKLES[case]
    if legacy:
        data = legacy_file(pickled, {"0": (1024, bytes(1024))})
    else:
        data = zip_entries({"a/data.pkl": pickled, "a/data/0": bytes(1024)})
    outcome = read_under_limits(Target(name="hostile", read=read), seeds(), data)
    assert not outcome.fault
    assert (outcome.error, words in outcome.text) == ("ValueError" if words else "", True), outcome


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_good_entry_of_these_files_is_read(legacy: bool, tmp_path: Path) -> None:
    """Without what is hostile, the files are read: it is refused for its own sake."""
    pickled, stored = state(b"N"), bytes(range(256)) * 4
    data = (
        legacy_file(pickled, {"0": (1024, stored)})
        if legacy
        else zip_entries({"a/data.pkl": pickled, "a/data/0": stored})
    )
    (tmp_path / "a.ckpt").write_bytes(data)
    assert read_ckpt(tmp_path / "a.ckpt").tensors["good"].tolist() == [0, 1, 2, 3]


def test_the_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(legacy_file(b"\x80\x02}K\x01" + b"\x8bABCD"))
    begin = (tmp_path / "a.ckpt").read_bytes().index(b"\x8bABCD")
    assert f"byte {begin}: " in examine(tmp_path / "a.ckpt").problem
