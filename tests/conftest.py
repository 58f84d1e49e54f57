"""Fixtures of all tests: a drawn data set of six shapes in three styles at 64×64, and a clean registry.

`python -m pytest -m "not slow"` runs in several processes (pytest-xdist). Chosen files and the slow tests,
which need much memory, run in one.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.catalog.lookup import REGISTERED
from ldm.data import EmojiData, ImageIndex, ImageRecord, held_out_image

SIDE = 64
SHAPES = ("red-disc", "blue-box", "green-bar", "ring", "cat-face", "old-cross")
COLOURS = ((200, 30, 30), (30, 60, 210), (20, 150, 60), (240, 200, 20), (250, 170, 60), (90, 20, 120))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of processes for `-n auto`: one per core, at most four; 0 turns pytest-xdist off."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return min(os.cpu_count() or 1, 4) if whole and config.option.markexpr == "not slow" else 0


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among the processes: in this process, and in those that tests start."""
    if hasattr(config, "workerinput"):
        threads = max(1, (os.cpu_count() or 1) // config.workerinput["workercount"])
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def draw(shape: str, style: str) -> np.ndarray:
    """Return a shape with a soft edge as RGBA (64, 64, 4) uint8; the style sets its darkness and size."""
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    k = ("noto", "fluent", "twemoji").index(style)
    r = 28 - 3 * k
    inside = {
        "red-disc": r - np.hypot(x, y),
        "blue-box": r - np.maximum(abs(x), abs(y)),
        "green-bar": np.minimum(r - abs(x), 8 - abs(y)),
        "ring": 6 - abs(np.hypot(x, y) - r + 6),
        "cat-face": np.minimum(r - abs(x) - abs(y), y + 12),
        "old-cross": np.minimum(r - np.maximum(abs(x), abs(y)), 7 - np.minimum(abs(x), abs(y))),
    }[shape]
    rgba = np.empty((SIDE, SIDE, 4), dtype=np.uint8)
    rgba[..., :3] = [c * (10 - k) // 10 for c in COLOURS[SHAPES.index(shape)]]
    rgba[..., 3] = (np.clip(inside + 0.5, 0, 1) * 255).round()
    return rgba


@pytest.fixture(scope="session")
def drawn() -> EmojiData:
    kinds = [(shape, style) for style in ("noto", "fluent", "twemoji") for shape in SHAPES]
    tags = {"cat-face": ("kitty", "cat"), "red-disc": ("round", "cat-face")}
    labels = {"ring": "hoop", "cat-face": "cat face"}
    rows = [
        ImageRecord(
            name=name,
            style=style,
            label=labels.get(name),
            tags=tags.get(name, ()),
            held_out=(name, style) == ("ring", "fluent"),
        )
        for name, style in kinds
    ]
    return EmojiData(images=np.stack([draw(*kind) for kind in kinds]), index=ImageIndex(rows), manifest={})


@pytest.fixture(scope="session")
def many() -> ImageIndex:
    """Return an index of 600 invented names in three styles, held out by the rule of the data set."""
    names = [f"thing-{i}" for i in range(600)]
    return ImageIndex(
        ImageRecord(name=name, style=style, held_out=held_out_image(name, style))
        for style in ("noto", "fluent", "twemoji")
        for name in names
    )


def write_data_set(data: EmojiData, folder: Path) -> Path:
    np.save(folder / "pictures.npy", data.images)
    rows = [{**vars(row), "tags": list(row.tags)} for row in data.index]
    (folder / "index.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def folder(drawn, tmp_path):
    """Write the drawn data set as files, and return the folder."""
    return write_data_set(drawn, tmp_path)


@pytest.fixture(scope="session")
def shared_folder(drawn, tmp_path_factory):
    """Write the drawn data set once for all tests, which must not change it."""
    return write_data_set(drawn, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def _forget_registered_cards() -> Iterator[None]:
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


@pytest.fixture(scope="module", autouse=True)
def gradients() -> Iterator[None]:
    """Compute gradients again after a module that has switched them off."""
    yield
    torch.set_grad_enabled(True)
