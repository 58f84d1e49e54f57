"""The rules by which trained adapters are judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trained_adapters as bench
from PIL import Image

from ldm.data import PALETTE
from ldm.images.hints import canny


def squares() -> torch.Tensor:
    """Return two images of a square on white, (2, 3, 32, 32)."""
    images = torch.ones(2, 3, 32, 32)
    images[0, :, 8:24, 8:24] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    images[1, :, 4:12, 8:24] = torch.tensor([0.1, 0.3, 0.9])[:, None, None]
    return images


def test_images_in_two_inks_have_the_style_and_others_have_not() -> None:
    plain = squares()
    inked = bench.in_two_inks(plain)
    assert bench.ink_distance(inked).max() < 0.01 and bench.ink_distance(plain).min() > bench.INK
    assert bool(bench.has_style(inked, plain).all()) and not bool(bench.has_style(plain, plain).any())
    assert not bool(bench.has_style(inked, plain.flip(0)).any())  # they show something else
    flat = torch.ones_like(plain) * torch.tensor(bench.LIGHT).view(3, 1, 1) / 255
    assert not bool(bench.has_style(flat, plain).any())


def test_the_ends_of_the_inks_are_black_and_white() -> None:
    ends = torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)])
    found = (255 * bench.in_two_inks(ends)).round().flatten(1)
    assert found.tolist() == [list(map(float, bench.DARK)), list(map(float, bench.LIGHT))]


def test_the_distance_from_the_line_is_that_of_the_nearest_mixture() -> None:
    dark, light = (torch.tensor(ink, dtype=torch.float32) for ink in (bench.DARK, bench.LIGHT))
    across = torch.linalg.cross(light - dark, torch.tensor([0.0, 0.0, 1.0]))
    off = (dark + light) / 2 + 7 * across / across.norm()
    assert float(bench.ink_distance((off / 255).view(1, 3, 1, 1))) == pytest.approx(7, abs=1e-3)


def test_edges_overlap_wholly_with_their_own_and_not_with_those_elsewhere() -> None:
    images = squares()
    hints = canny(images)
    torch.testing.assert_close(bench.edge_overlap(images, hints), torch.ones(2))
    moved = images.roll(1, -1)
    assert bool((bench.edge_overlap(moved, hints) > 0.4).all())
    assert bool((bench.edge_overlap(images.roll(16, -1), hints) < 0.3).all())
    assert bench.edge_overlap(torch.ones(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)).tolist() == [0]


def test_a_thing_is_asked_for_on_each_background_whole_and_small() -> None:
    prompts, backgrounds = bench.thing_prompts("zorb")
    assert len(prompts) == len(set(prompts)) == len(backgrounds) == 2 * len(PALETTE) == 20
    assert prompts[0] == "a zorb" and "a small zorb on the left on a red background" in prompts
    for prompt, background in zip(prompts, backgrounds, strict=True):
        assert (background or "zorb") in prompt


@pytest.mark.parametrize(
    ("task", "figures", "met"),
    [
        ("style", {"with": 80.0, "without": 20.0}, True),
        ("style", {"with": 79.0, "without": 0.0}, False),
        ("thing", {"with": 100.0, "without": 21.0}, False),
        ("edges", {"ratio": 2.0}, True),
        ("edges", {"ratio": 1.99}, False),
    ],
)
def test_bars(task: str, figures: dict[str, float], met: bool) -> None:
    assert bench.is_met(task, figures) is met
    assert ("NOT MET" in bench.table(task, figures)) is not met


def test_images_are_written_as_trainings_read_them(tmp_path: Path) -> None:
    images = squares()
    bench.write_images(tmp_path / "a", images, ["one", "two"])
    assert [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "a").glob("*.txt"))] == [
        "one",
        "two",
    ]
    read = np.asarray(Image.open(tmp_path / "a/001.png"))
    assert np.array_equal(read, bench.to_bytes(images)[1])
    bench.save(tmp_path / "b", "row", ["one", "two"], images, images)
    assert Image.open(tmp_path / "b/row.png").size == (64, 64)


@pytest.mark.parametrize("options", [["--prompts", "0"], ["--prompts", "21"], ["--work", "."]])
def test_impossible_options_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(options)
    assert json.dumps(bench.RUNS) and bench.parse([]).tasks == list(bench.TASKS)
