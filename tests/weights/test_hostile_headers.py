"""Headers of safetensors files that ask for more than a file may, and headers that are no text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fuzzing import Target, read_under_limits

from ldm.registry.inspection import inspect
from ldm.weights.formats.safetensors import MAX_TENSORS, read_safetensors


def read(path: Path) -> None:
    """Read a file, then inspect it."""
    read_safetensors(path)
    inspect(path, digest=False).text()


def file(header: bytes, data: bytes = bytes(8)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


GOOD = b'"good":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def with_good(more: bytes) -> bytes:
    """Return a file with a good tensor and something else in its header."""
    return file(b"{" + GOOD + b"," + more + b"}")


def named(name: str) -> bytes:
    return with_good(json.dumps(name).encode() + b':{"dtype":"U8","shape":[0],"data_offsets":[8,8]}')


def shaped(shape: str, dtype: str = '"U8"', begin: object = 8, end: object = 8) -> bytes:
    return with_good(f'"x":{{"dtype":{dtype},"shape":{shape},"data_offsets":[{begin},{end}]}}'.encode())


def tensors(count: int) -> bytes:
    return b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}' % i for i in range(count))


# name: (file, what the message says; "" if it can be read)
FILES = {
    "as many tensors as may be": (with_good(tensors(10_000)), ""),
    "more tensors than may be": (with_good(tensors(MAX_TENSORS)), "the limit is"),
    "empty lists": (with_good(b'"x":[' + b"[]," * 3_000_000 + b"0]"), "parts, the limit"),
    "empty mappings": (with_good(b'"x":[' + b"{}," * 400_000 + b"0]"), "expected dtype"),
    "strings without number": (with_good(b'"x":[' + b'"",' * 3_000_000 + b"0]"), "parts, the limit"),
    "escapes without number": (with_good(b'"x":"' + b'\\"' * 5_000_000 + b'"'), "expected dtype"),
    "backslashes without number": (with_good(b'"x":"' + b"\\\\" * 5_000_000 + b'"'), "expected dtype"),
    "a string that is not closed": (with_good(b'"x":"' + b"[" * 3_000_000), "parts, the limit"),
    "brackets in a string": (with_good(b'"__metadata__":{"x":"' + b"[{," * 2_000_000 + b'"}'), ""),
    "a deep list": (with_good(b'"x":' + b"[" * 500_000), "not valid JSON"),
    "deep mappings": (with_good(b'"x":' + b'{"a":' * 200_000), "not valid JSON"),
    "a key twice, among many": (with_good(tensors(20_000) + b"," + GOOD), "twice"),
    "metadata twice": (with_good(b'"__metadata__":{},"__metadata__":{}'), "twice"),
    "a number of many digits": (shaped("[" + "9" * 1_000_000 + "]"), "not valid JSON"),
    "a long dimension": (shaped("[" + "9" * 4000 + "]"), "list of at most"),
    "many dimensions": (shaped("[" + "1," * 200_000 + "1]"), "at most 64"),
    "no entries, but a huge shape": (shaped(f"[0,{2**48},{2**48}]"), "contradicts itself"),
    "a shape without bounds": (shaped("[" + f"{2**48}," * 63 + "0]"), "contradicts itself"),
    "an offset without bounds": (shaped("[0]", begin=2**60, end=2**60), "data_offsets"),
    "a list as type": (shaped("[0]", dtype="[]"), "unknown dtype"),
    "a mapping as type": (shaped("[0]", dtype="{}"), "unknown dtype"),
    "a long type": (shaped("[0]", dtype='"' + "x" * 10**6 + '"'), "unknown dtype"),
    "nothing as type": (shaped("[0]", dtype="null"), "unknown dtype"),
    "a real number as dimension": (shaped("[1e400]"), "list of at most"),
    "no number as dimension": (shaped("[NaN]"), "list of at most"),
    "a mapping as shape": (shaped("{}"), "list of at most"),
    "a long name": (named("x" * 2000), "visible characters"),
    "a name with escapes": (named("\x1b[2Jx"), "visible characters"),
    "a name that turns around": (named("\u202ex"), "visible characters"),
    "a name with line ends": (named("x\nloads as sd-v1-5"), "visible characters"),
    "half a character as name": (
        with_good(b'"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[8,8]}'),
        "visible",
    ),
    "half a character in the metadata": (with_good(b'"__metadata__":{"a":"\\ud800"}'), "surrogates"),
    "metadata that are a list": (with_good(b'"__metadata__":[]'), "metadata"),
    "metadata that are nothing": (with_good(b'"__metadata__":null'), "metadata"),
    "bytes that are not UTF-8": (with_good(b'"\xff":0'), "not valid JSON"),
    "UTF-16": (file(('{"a": 1' + "}").encode("utf-16-le")), "not valid JSON"),
    "two values": (file(b"{" + GOOD + b"}{}"), "not valid JSON"),
    "nothing but a length": (bytes(8), "too short"),
    "a header of no bytes": (bytes(8) + b"{}", "not valid JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_reading_headers_is_bounded(case: str) -> None:
    data, words = FILES[case]
    good = safetensors.torch.save({"a": torch.ones(2)}, metadata={"a": "b"})
    outcome = read_under_limits(Target(name="hostile header", read=read), [good], data)
    assert not outcome.fault, outcome
    assert (outcome.error, words in outcome.text) == ("ValueError" if words else "", True), outcome


def test_a_tensor_of_no_entries_has_its_shape(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(shaped("[3,0,5]"))
    found = read_safetensors(tmp_path / "a.safetensors")
    assert found["x"].shape == (3, 0, 5) and found["good"].tolist() == [0, 0]


def test_a_file_without_tensors_is_read_as_the_peer_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(file(b"{}" + b" " * 6, b""))
    assert read_safetensors(path) == {} == safetensors.torch.load_file(path)
