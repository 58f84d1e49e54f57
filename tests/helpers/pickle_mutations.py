"""Damage pickles by their instructions, and the containers that hold them."""

from __future__ import annotations

import io
import pickletools
import random
import struct
import zipfile
from collections.abc import Sequence

from mutations import EDGES, mutated_bytes

MARK_NAME = "fuzz-canary"  # folder that a mutant would make if it were executed
# What hostile pickles contain: calls, numbers and memo indices without bounds, shared and deep structures.
HOSTILE = (
    b"cposix\nmkdir\nX" + struct.pack("<I", len(MARK_NAME)) + MARK_NAME.encode() + b"\x85R",
    b"\x8c\x08builtins\x8c\x04eval\x93\x8c\x05print\x85R",
    b"cbuiltins\ngetattr\n",
    b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)\x81}b",
    b"cpytorch_lightning\nos.system\n",
    b"ctorch._utils\n_rebuild_qtensor\n)R",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nfloat8_e4m3fn\n",
    b"(ios\nsystem\n",
    b"\x82\x01",
    b"r\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"\x8b\x00\x10\x00\x00" + b"\xff" * 4096,
    b"\x8d" + b"\xff" * 8,
    b"\x95" + b"\xff" * 8,
    b"T\xff\xff\xff\xff",
    b"I" + b"9" * 5000 + b"\n",
    b"F1e999\n",
    b"G\x7f\xf8" + bytes(6),
    b"K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60,
    b"]q\x00" + b"](h\x00h\x00eq\x00" * 60,
    b"K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x02s",
    b")" + b"\x85" * 20_000,
    b"]" * 3000 + b"a" * 2999,
    b"}"
    + b"("
    + b"".join(b"\x8a\x09" + (i * (2**61 - 1)).to_bytes(9, "little") + b"N" for i in range(300))
    + b"u",
    b"\x8f(K\x01K\x02\x90",
    b"Q",
    b"\x00",
    b"0",
    b"1",
    b"2",
    b"(",
    b".",
    b"b",
    b"R",
    b"\x81",
    b"o",
    b"u",
    b"\x94",
    b"\x98",
)


def instructions(text: bytes) -> list[bytes]:
    """Return the instructions of a pickle."""
    starts = [at for _, _, at in pickletools.genops(text) if at is not None]
    return [text[begin:end] for begin, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def mutated_pickle(text: bytes, rng: random.Random) -> bytes:
    """Return a pickle with one to four of its instructions changed."""
    steps = instructions(text)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(steps))
        kind = rng.randrange(8)
        if kind == 0:
            del steps[at]
        elif kind == 1:
            steps.insert(at, rng.choice(steps))
        elif kind in (2, 3):
            steps.insert(at, rng.choice(HOSTILE))
        elif kind == 4:
            end = at + rng.randint(1, 8)
            steps[at:end] = steps[at:end] * rng.choice((2, 10, 1000))
            del steps[200_000:]
        elif kind == 5:
            other = rng.randrange(len(steps))
            steps[at], steps[other] = steps[other], steps[at]
        elif kind == 6:
            steps[at] = rng.choice(
                (b"K\x00", b"K\xff", b"J\xff\xff\xff\xff", b"N", b"\x88", b"}", b"]", b")")
            )
        else:
            value = rng.choice(EDGES)
            steps[at] = b"\x8a\x09" + value.to_bytes(9, "little") if rng.random() < 0.5 else rng.choice(steps)
        if not steps:
            break
    data = b"".join(steps)
    return mutated_bytes([data], rng) if data and rng.random() < 0.1 else data


def unzipped(data: bytes) -> dict[str, bytes]:
    """Return the entries of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezipped(entries: Sequence[tuple[str, bytes]]) -> bytes:
    """Return an archive of uncompressed entries."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content)
    return made.getvalue()


def mutated_archive(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return an archive with its pickle, one of its entries or its list of entries changed."""
    entries = list(unzipped(rng.choice(seeds)).items())
    at = rng.randrange(len(entries))
    name, content = entries[at]
    kind = rng.randrange(10)
    if kind == 0:
        del entries[at]
    elif kind == 1:
        entries.append((name.replace("data", rng.choice(("DATA", "data2", "../data", ""))), content))
    elif kind == 2:
        entries[at] = name, mutated_bytes([content or b"x"], rng)
    elif kind == 3:
        entries.insert(at, ("a/evil.pkl", HOSTILE[0] + b"."))
    else:
        at = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
        entries[at] = entries[at][0], mutated_pickle(entries[at][1], rng)
    if not entries:
        return b""
    data = rezipped(dict(entries).items() if rng.random() < 0.9 else entries)
    return data if rng.random() < 0.9 else rng.choice(seeds) + data


def mutated_directory(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return an archive with a number of its directory, of a header or of its end changed."""
    data = bytearray(rng.choice(seeds))
    marks = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08")
    places = [i for i in range(len(data) - 3) if bytes(data[i : i + 4]) in marks]
    for _ in range(rng.choice((1, 1, 2))):
        at, size = rng.choice(places) + rng.randrange(2, 50), rng.choice((1, 2, 4, 8))
        old = int.from_bytes(data[at : at + size], "little")
        new = rng.choice((rng.choice(EDGES), old + 1, old - 1, old ^ (1 << rng.randrange(8 * size))))
        data[at : at + size] = (new % 256**size).to_bytes(size, "little")
    return bytes(data)


def mutated_legacy(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return a file of five pickles and storages with one of its pickles changed."""
    data = rng.choice(seeds)
    stream, ends = io.BytesIO(data), [0]
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    parts = [data[begin:end] for begin, end in zip(ends, [*ends[1:], len(data)], strict=True)]
    at = rng.choice((1, 2, 3, 3, 3, 3, 4, 4))
    parts[at] = mutated_pickle(parts[at], rng)
    return b"".join(parts)


def mutated_plain(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return a pickle without a container, changed."""
    return mutated_pickle(rng.choice(seeds), rng)
