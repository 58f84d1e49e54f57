"""Flax's files: MessagePack without flax, names as PyTorch's, and damaged or hostile content."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax_files import packed
from torch import Tensor

from ldm.weights.formats.flax_file import read_flax
from ldm.weights.formats.single_file import FLAX_KIND, file_kind, read_tensors
from ldm.weights.rules.flax import torch_names


def write(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(value if isinstance(value, bytes) else packed(value))
    return path


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_tensors_and_names(tmp_path) -> None:
    tree = {"a": {"kernel": numbers(2, 3)}, "b": np.array([1, 2], dtype=np.int32), "c": numbers(0, 2)}
    path = write(tmp_path, tree)
    assert file_kind(path) == FLAX_KIND
    found = read_flax(path)
    assert list(found) == ["a/kernel", "b", "c"]
    assert torch.equal(found["a/kernel"], torch.arange(6.0).view(2, 3))
    assert found["b"].dtype == torch.int32 and found["c"].shape == (0, 2)


def test_it_reads_what_the_package_msgpack_writes(tmp_path) -> None:
    msgpack = pytest.importorskip("msgpack")
    tree = {f"layer{i}": {"kernel": numbers(3, 2) + i, "bias": numbers(2)} for i in range(40)}

    def encode(value: Any) -> Any:
        inner = msgpack.packb((value.shape, value.dtype.name, value.tobytes("C")), use_bin_type=True)
        return msgpack.ExtType(1, inner)

    path = write(tmp_path, msgpack.packb(tree, default=encode, strict_types=True))
    found = read_flax(path)
    assert len(found) == 80 and torch.equal(found["layer7/kernel"], torch.arange(6.0).view(3, 2) + 7)


def test_chunks_are_joined(tmp_path) -> None:
    chunks = {str(i): numbers(6)[2 * i : 2 * i + 2] for i in range(3)}
    leaf = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": chunks}
    assert torch.equal(read_flax(write(tmp_path, {"x": leaf}))["x"], torch.arange(6.0).view(2, 3))
    wrong = {**leaf, "shape": {"0": 2, "1": 4}}
    with pytest.raises(ValueError, match="6 numbers for the shape"):
        read_flax(write(tmp_path, {"x": wrong}))


def test_names_of_a_transformer() -> None:
    stack = torch.arange(24.0).view(2, 3, 4)
    flat = {
        "params/model/encoder/layers/FlaxBartEncoderLayers/FlaxBartAttention_0/q_proj/kernel": stack,
        "params/model/encoder/layers/FlaxBartEncoderLayers/LayerNorm_1/scale": stack[:, 0],
        "params/model/decoder/layers/FlaxBartDecoderLayers/FlaxBartAttention_1/v_proj/kernel": stack,
        "params/model/decoder/layers/FlaxBartDecoderLayer_1/LayerNorm_2/bias": stack[0, 0],
        "params/model/decoder/layers/FlaxBartDecoderLayers/GLU_0/Dense_2/kernel": stack,
        "params/model/decoder/embed_tokens/embedding": stack[0],
        "params/lm_head/kernel": stack[0],
    }
    found = torch_names(flat)
    assert set(found) == {
        *(f"model.encoder.layers.{i}.self_attn.q_proj.weight" for i in range(2)),
        *(f"model.encoder.layers.{i}.self_attn_layer_norm.weight" for i in range(2)),
        *(f"model.decoder.layers.{i}.encoder_attn.v_proj.weight" for i in range(2)),
        "model.decoder.layers.1.pre_encoder_attn_layer_norm.bias",
        *(f"model.decoder.layers.{i}.glu.fc2.weight" for i in range(2)),
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    }
    assert torch.equal(found["model.encoder.layers.1.self_attn.q_proj.weight"], stack[1].T)
    assert torch.equal(found["lm_head.weight"], stack[0].T)


def test_names_of_an_autoencoder() -> None:
    kernel = torch.arange(24.0).view(1, 2, 3, 4)
    found = torch_names(
        {
            "decoder/up_4/block_0/conv1/kernel": kernel,
            "decoder/up_4/attn_2/norm/scale": kernel[0, 0, 0],
            "decoder/mid/block_1/conv2/bias": kernel[0, 0, 0],
            "encoder/down_1/downsample/conv/bias": kernel[0, 0, 0],
            "quantize/embedding/embedding": kernel[0, 0],
        }
    )
    assert set(found) == {
        "decoder.up.4.block.0.conv1.weight",
        "decoder.up.4.attn.2.norm.weight",
        "decoder.mid.block_1.conv2.bias",
        "encoder.down.1.downsample.conv.bias",
        "quantize.embedding.weight",
    }
    assert torch.equal(found["decoder.up.4.block.0.conv1.weight"], kernel.permute(3, 2, 0, 1))


def bad_array(shape: bytes, dtype: str | list[int], data: bytes) -> bytes:
    name = packed(dtype) if isinstance(dtype, str) else bytes([0x90 | len(dtype), *dtype])
    inner = b"\x93" + shape + name + b"\xc4" + bytes([len(data)]) + data
    return b"\x81\xa1x\xc7" + bytes([len(inner)]) + b"\x01" + inner


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x81\xa1x", "ends early"),
        (b"\x81\xa1x\xc1", "begins no value"),
        (b"\x81\xa1x\x05", "no array"),
        (b"\x82\xa1x\x05\xa1x\x05", "different short texts"),
        (b"\x81\x05\x05", "different short texts"),
        (b"\x81\xa1\xff\x05", "UTF-8"),
        (b"\xdf\xff\xff\xff\xff", "values"),
        (b"\x81\xa1x\xc6\xff\xff\xff\xff", "ends early"),
        (b"\x81\xa1x" * 100, "levels"),
        (b"\x81\xa1x\xd4\x03\x00", "type 3"),
        (b"\x81\xa1x\xd4\x01\x00", "no list of shape"),
        (bad_array(b"\x91\x02", "float32", b"1234"), "with 4 bytes"),
        (bad_array(b"\x91\xff", "float32", b"1234"), "shape"),
        (bad_array(b"\x91\x01", "object", b"1234"), "dtype 'object'"),
        (bad_array(b"\x91\x01", [1], b"1234"), r"dtype \[1\]"),
        (packed({"x\x1b[2J": numbers(2)}), "visible characters"),
        (packed({"a": {"\u202e": numbers(2)}}), "visible characters"),
        (bad_array(b"\x93" + b"\xce\xff\xff\xff\xff" * 3, "int8", b""), "shape"),
        (packed({"x": numbers(2)}) + b"\x00", "1 bytes follow"),
    ],
)
def test_damaged_files_are_refused(content: bytes, message: str, tmp_path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as raised:
        read_flax(path)
    assert path.name in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"layers/FlaxBartEncoderLayers/x": torch.empty(2**40, 0)}, "at most 1000 layers"),
        ({"layers/FlaxBartEncoderLayers/x": torch.zeros(())}, "at most 1000 layers"),
        ({"a/kernel": torch.zeros(1), "a/weight": torch.zeros(1)}, "two tensors"),
    ],
)
def test_names_that_fit_no_network_are_refused(tree: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch_names(tree)


def test_errors_of_names_name_the_file(tmp_path) -> None:
    path = write(tmp_path, {"a": {"kernel": numbers(1), "weight": numbers(1)}})
    with pytest.raises(ValueError, match=r"flax_model.msgpack.*two tensors"):
        read_tensors(path)


def test_long_names_are_refused_before_they_are_joined(tmp_path) -> None:
    """30 nested keys of 1,000 characters before 60,000 leaves: each leaf's name has 30,000 characters."""
    content = b"\xde\xea\x60" + b"".join(b"\xa5%05d\x00" % i for i in range(60_000))
    for _ in range(30):
        content = b"\x81\xda\x03\xe8" + b"k" * 1000 + content
    path = write(tmp_path, content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="short names"):
        read_flax(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_cut_files_are_refused(tmp_path) -> None:
    whole = packed({"a": {"kernel": numbers(2, 3)}, "b": numbers(4)})
    for end in range(1, len(whole)):
        with pytest.raises(ValueError, match="damaged"):
            read_flax(write(tmp_path, whole[:end]))
