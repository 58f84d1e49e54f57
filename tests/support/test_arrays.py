"""NumPy files that are written in parts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from ldm.support.arrays import read_sealed, write_array


@pytest.mark.parametrize("shape", [(5, 2, 3), (5,), (0, 4), (1, 0)])
def test_an_array_in_parts_is_the_file_that_numpy_writes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    whole = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    np.save(tmp_path / "whole.npy", whole)
    parts = [whole[:2].astype(np.float64), whole[2:]] if shape[0] else []
    write_array(tmp_path / "parts.npy", shape, np.float16, parts)
    assert (tmp_path / "parts.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_blocks_of_another_shape_leave_nothing(tmp_path: Path) -> None:
    for blocks, message in (
        ([np.zeros((2, 3))], "expected 3 rows, got 2"),
        ([np.zeros((4, 3))], "expected 3 rows, got 4"),
        ([np.zeros((3, 2))], r"expected rows of shape \(3,\), got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=f"a.npy'.*{message}"):
            write_array(tmp_path / "a.npy", (3, 3), np.float32, blocks)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot allocate first")
def test_a_full_disk_is_noticed_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, begin: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.npy'"):
        write_array(tmp_path / "a.npy", (3,), np.float32, (pytest.fail("computed") for _ in range(3)))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_allocate_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(handle: int, begin: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", unsupported)
    write_array(tmp_path / "a.npy", (3,), np.float32, [np.arange(3.0)])
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_a_sealed_array_is_read_only_if_it_is_intact(tmp_path: Path) -> None:
    path, array = tmp_path / "a.npy", np.arange(12, dtype=np.float16).reshape(4, 3)
    write_array(path, (4, 3), np.float16, [array], sealed=True)
    whole = path.read_bytes()
    found = read_sealed(path, (4, 3), np.float16)
    assert found is not None and np.array_equal(found, array) and np.array_equal(np.load(path), array)
    assert read_sealed(path, (3, 4), np.float16) is None and read_sealed(path, (4, 3), np.int16) is None
    assert read_sealed(tmp_path / "none.npy", (4, 3), np.float16) is None
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert read_sealed(path, (4, 3), np.float16) is None
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read_sealed(path, (4, 3), np.float16) is None
    path.write_bytes(whole + b"x")
    assert read_sealed(path, (4, 3), np.float16) is None
