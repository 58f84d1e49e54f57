"""Safetensors files and strict loading: against the format's reference library, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from ldm.weights import strict
from ldm.weights.cast import is_finite
from ldm.weights.formats import safetensors as io

DTYPES = [dtype for dtype in io.NAMES if dtype not in (torch.uint16, torch.uint32, torch.uint64)]


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5, generator=generator) * 50).to(dtype) for dtype in DTYPES}
    return tensors | {
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 4),
        "odd": torch.arange(3, dtype=torch.uint8),
    }


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def test_reads_what_the_library_writes_and_the_reverse(tmp_path: Path) -> None:
    tensors = some_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"a": "b"})
    io.write_safetensors(tmp_path / "ours.safetensors", tensors, {"a": "b"})
    theirs, ours = (
        io.read_safetensors(tmp_path / "theirs.safetensors"),
        safetensors.torch.load_file(tmp_path / "ours.safetensors"),
    )
    for name, tensor in tensors.items():
        assert same(theirs[name], tensor), name
        assert same(ours[name], tensor), name
    assert set(theirs) == set(ours) == set(tensors)
    assert io.read_header(tmp_path / "ours.safetensors")[1] == {"a": "b"}


def test_non_contiguous_tensors_are_written_by_value(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    io.write_safetensors(tmp_path / "f", {"x": tensor})
    assert torch.equal(io.read_safetensors(tmp_path / "f")["x"], tensor)


def test_writing_is_deterministic_and_leaves_no_temporary(tmp_path: Path) -> None:
    tensors = some_tensors()
    io.write_safetensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    io.write_safetensors(tmp_path / "b", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert io.sha256(tmp_path / "a") == io.sha256(tmp_path / "b")
    with pytest.raises(TypeError, match="bad"):
        io.write_safetensors(tmp_path / "a", {"bad": torch.empty(2, device="meta")})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert set(io.read_safetensors(tmp_path / "a")) == set(tensors)  # a failed write keeps the old file


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io.write_safetensors(tmp_path / "a", {"x": torch.ones(2)})
    monkeypatch.setattr(io.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        io.write_safetensors(tmp_path / "a", {"x": torch.zeros(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert torch.equal(io.read_safetensors(tmp_path / "a")["x"], torch.ones(2))


def test_changing_a_mapped_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    io.write_safetensors(tmp_path / "a", {"x": torch.ones(2)})
    io.read_safetensors(tmp_path / "a")["x"].zero_()
    assert torch.equal(io.read_safetensors(tmp_path / "a")["x"], torch.ones(2))


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    io.write_safetensors(tmp_path / "a", {"x": torch.zeros(64 << 20, dtype=torch.uint8)})
    before = anonymous_bytes()
    tensor = io.read_safetensors(tmp_path / "a")["x"]
    assert int(tensor.sum()) == 0
    assert anonymous_bytes() - before < 8 << 20


def anonymous_bytes() -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


def test_written_tensors_are_mapped_as_aligned_as_pytorch_allocates(tmp_path: Path) -> None:
    """Products of weights from a file have the bits of products of the weights that were saved."""
    tensors = {f"bias.{i}": torch.randn(i) for i in range(1, 20)}
    tensors |= {f"b.{i}": torch.randn(16 * i, 5).to(torch.float16) for i in range(1, 20)}
    tensors |= {f"c.{i}": torch.randn(16, i) for i in range(1, 20)}
    for metadata in ({}, {"a": "b"}, {"a": "b" * 29}):
        io.write_safetensors(tmp_path / "f", tensors, metadata)
        for name, tensor in io.read_safetensors(tmp_path / "f").items():
            assert torch.equal(tensor, tensors[name])
            if tensor.nbytes % 64 == 0:
                assert tensor.data_ptr() % 64 == 0, name


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    value = torch.tensor([1.5, -2.0])
    path = raw(
        tmp_path / "f",
        {"a": entry(0, 1, [1], "U8"), "b": entry(1, 9, [2])},
        b"\x01" + value.numpy().tobytes(),
    )
    assert torch.equal(io.read_safetensors(path)["b"], value)


BAD = {
    "gap": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), "gap"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), "overlaps"),
    "past the end": ({"a": entry(0, 400, [100])}, bytes(12), "truncated"),
    "size": ({"a": entry(0, 8, [100])}, bytes(8), "lies"),
    "backwards": ({"a": entry(8, 0, [2])}, bytes(8), "lies"),
    "negative": ({"a": entry(-8, 0, [2])}, bytes(8), "integers"),
    "huge": ({"a": entry(0, 8, [2**62, 2**62])}, bytes(8), "lies"),
    "not a number": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4), "integers"),
    "dtype": ({"a": entry(0, 4, [1], "F31")}, bytes(4), "F31"),
    "entry": ({"a": 3}, b"", "expected dtype"),
    "trailing": ({"a": entry(0, 4, [1])}, bytes(6), "follow the last tensor"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry(0, 4, [1])}, bytes(4), "metadata"),
    "twins": (b'{"a":{},"a":{}}', b"", "twice"),
    "no json": (b"{nonsense", b"", "JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    header, data, words = BAD[case]
    path = raw(tmp_path / "wrong.safetensors", header, data)
    with pytest.raises(ValueError, match=words) as error:
        io.read_safetensors(path)
    assert "wrong.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too short"),
        (b"PK\x03\x04" + bytes(90), "zip"),
        (b"version https://git-lfs", "LFS"),
        (b"<!DOCTYPE html>", "HTML"),
        ((10**15).to_bytes(8, "little") + b"{}", "not a safetensors"),
        ((5000).to_bytes(8, "little") + b"{}", "truncated"),
    ],
)
def test_other_files_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        io.read_safetensors(tmp_path / "wrong.safetensors")
    assert "wrong.safetensors" in str(error.value)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(keep: float, tmp_path: Path) -> None:
    io.write_safetensors(tmp_path / "a", {"x": torch.zeros(1000)})
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match="truncated"):
        io.read_safetensors(tmp_path / "a")


def test_absent_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        io.read_safetensors(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        io.sha256(tmp_path)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def reset_buffers(self) -> None:
        self.table = torch.arange(3.0)


def on_meta(cls: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return cls()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_a_module_on_meta_gets_every_tensor(dtype: torch.dtype | None) -> None:
    source, module = Net(), on_meta(Net)
    strict.load_strict(module, source.state_dict(), source="x", dtype=dtype)
    for key, value in source.state_dict().items():
        wanted = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        assert same(module.state_dict()[key], wanted), key
    assert torch.equal(module.table, torch.arange(3.0))
    assert module.a.weight.requires_grad
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def test_no_copy_without_a_change_of_dtype() -> None:
    source, module = Net().state_dict(), on_meta(Net)
    strict.load_strict(module, source, source="x", dtype=torch.float32)
    assert module.a.weight.data_ptr() == source["a.weight"].data_ptr()


def test_transposed_tensors_become_contiguous() -> None:
    state = Net().state_dict()
    wanted = state["a.weight"].clone()
    for dtype in (None, torch.float64):
        module = on_meta(Net)
        strict.load_strict(module, state | {"a.weight": wanted.t().contiguous().t()}, source="x", dtype=dtype)
        assert module.a.weight.is_contiguous()
        assert torch.equal(module.a.weight.float(), wanted)


def test_one_error_lists_all_that_is_wrong() -> None:
    state, module = Net().state_dict(), Net()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    del state["a.bias"]
    state |= {"stray": torch.zeros(1), "a.weight": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match="weights.ckpt") as error:
        strict.load_strict(module, state, source="weights.ckpt")
    for words in (
        "1 missing (a.bias)",
        "1 unexpected (stray)",
        "1 misshapen (a.weight: (4, 2), expected (4, 3))",
        "Net",
    ):
        assert words in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_many_wrong_keys_are_counted() -> None:
    with pytest.raises(ValueError, match="20 unexpected .* and 15 more"):
        strict.load_strict(
            Net(), Net().state_dict() | {f"k{i}": torch.zeros(1) for i in range(20)}, source="x"
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("place", [0, 7, 999])
def test_nan_and_infinity_are_refused(value: float, dtype: torch.dtype, place: int) -> None:
    bad = nn.Linear(1000, 1).to(dtype)
    assert is_finite(bad.weight)
    bad.weight.data[0, place] = value
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 tensors \(weight\)"):
        strict.load_strict(nn.Linear(1000, 1), bad.state_dict(), source="x")
    strict.load_strict(nn.Linear(1000, 1), bad.state_dict(), source="x", allow_nan=True)


def test_values_that_the_new_dtype_cannot_hold_are_refused() -> None:
    state = nn.Linear(2, 2).state_dict() | {"bias": torch.tensor([1e6, 0.0])}
    with pytest.raises(
        ValueError, match=r"float16 cannot hold the torch.float32 values of 1 tensors \(bias\)"
    ):
        strict.load_strict(nn.Linear(2, 2), state, source="x", dtype=torch.float16)


def test_what_stays_on_meta_is_an_error() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    with pytest.raises(RuntimeError, match="table"):
        strict.load_strict(on_meta(Forgetful), {}, source="x")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("wanted", [None, torch.float16])
def test_weights_that_are_no_real_numbers_are_refused(dtype: torch.dtype, wanted: torch.dtype | None) -> None:
    state = nn.Linear(2, 2).state_dict() | {"weight": torch.ones(2, 2, dtype=dtype)}
    with pytest.raises(ValueError, match=rf"weight: {dtype}, expected real numbers"):
        strict.load_strict(on_meta(lambda: nn.Linear(2, 2)), state, source="x", dtype=wanted)
