"""A full disk: every writer raises an error that names its file, and leaves what was there as it was."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.analysis.journal import write_journal
from ldm.diffusion.interfaces import Denoised
from ldm.speed.kernels.shared_library import write_cached
from ldm.training.caches.rows import cached_rows
from ldm.training.checkpoint import save_checkpoint
from ldm.training.metrics import append_row
from ldm.weights.adapters.originals import Originals
from ldm.weights.formats.safetensors import write_safetensors

LIMIT = 4096  # bytes that a file may have


@contextmanager
def small_disk() -> Iterator[None]:
    """Let no file grow beyond `LIMIT` bytes inside a `with` block, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_image(path: Path) -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ldm.Images(tensor=noise, seeds=(0,), prompts=("",)).save(path)


WIDE = torch.arange(10_000.0)
WRITERS: dict[str, Callable[[Path], object]] = {
    "image.png": save_image,
    "image.jpg": save_image,
    "weights.safetensors": lambda path: write_safetensors(path, {"x": WIDE}),
    "checkpoint.pt": lambda path: save_checkpoint(path, {"x": WIDE}),
    "latents.npy": lambda path: cached_rows(
        path, [None] * 8, (1000,), lambda part: torch.ones(len(part), 1000)
    ),  # type: ignore[list-item]
    "journal.pt": lambda path: write_journal(path, [(torch.tensor(1), Denoised(WIDE, WIDE))]),
    "metrics.jsonl": lambda path: append_row(path, {"x" * 5000: 1.0}),
    "kernels.so": lambda path: write_cached(path, "key", bytes(5000)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"old\n")
    with small_disk(), pytest.raises(OSError) as caught:
        WRITERS[name](path)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert path.read_bytes().startswith(b"old\n")
    if name != "metrics.jsonl":  # a row that is cut short is removed when the run is resumed
        assert path.read_bytes() == b"old\n"


@pytest.mark.parametrize("there", [False, True])
def test_a_model_that_does_not_fit_leaves_the_old_one(tmp_path: Path, there: bool) -> None:
    model, folder = tiny_model(), tmp_path / "model"
    if there:
        ldm.save(model, folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with small_disk(), pytest.raises(OSError) as caught:
        ldm.save(model, folder)
    named = Path(caught.value.filename)
    assert caught.value.errno == errno.EFBIG and named.parent == folder and named.suffix == ".safetensors"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"] * there


def test_originals_of_adapters_that_do_not_fit_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    originals = Originals()
    with small_disk(), pytest.raises(OSError) as caught:
        originals.keep({("unet", "weight"): WIDE})
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "home")
    assert len(originals) == 0


def test_weights_at_rest_that_do_not_fit_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_HOME", str(tmp_path))
    model = tiny_model().requires_grad_(False)
    with small_disk(), pytest.raises(OSError) as caught:
        ldm.optimize(model, kernels=False, memory=True)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "kernels")
    assert not list((tmp_path / "kernels").iterdir())


def test_the_limit_is_one(tmp_path: Path) -> None:
    """Otherwise the tests above would show nothing."""
    with small_disk():
        (tmp_path / "a").write_bytes(bytes(LIMIT))
        with pytest.raises(OSError):
            (tmp_path / "b").write_bytes(bytes(LIMIT + 1))
    assert os.path.getsize(tmp_path / "b") == LIMIT
