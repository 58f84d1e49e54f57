"""`Images`: rounding, grids, captions, animations and checks."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.diffusion.seeds import check_seeds
from ldm.images.files import read_recipe
from ldm.images.result import Images


def images(n=3, **recipe):
    tensor = torch.linspace(0, 1, n * 3 * 8 * 16).reshape(n, 3, 8, 16)
    return Images(
        tensor=tensor, seeds=tuple(range(n)), prompts=("x",) * n, recipe={"prompt": "ein Apfel 🍎", **recipe}
    )


def test_pixels_are_rounded_to_nearest():
    tensor = torch.tensor([0.0, 0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, 1.0]).expand(1, 3, 1, 4)
    assert Images(tensor=tensor, seeds=(0,), prompts=("",)).numpy()[0, 0, :, 0].tolist() == [0, 0, 1, 255]


def test_a_grid_holds_every_image_in_order():
    made = images(5)
    sheet = np.asarray(made.grid(columns=2))
    assert sheet.shape == (24, 32, 3)
    for i, image in enumerate(made.numpy()):
        top, left = 8 * (i // 2), 16 * (i % 2)
        assert (sheet[top : top + 8, left : left + 16] == image).all()
    assert (sheet[16:, 16:] == 255).all()


def test_save_writes_a_grid_or_a_file_for_each_image(tmp_path):
    made = images(2)
    assert made.save(tmp_path / "a.png") == [tmp_path / "a.png"]
    assert read_recipe(tmp_path / "a.png") == made.recipe
    paths = made.save(tmp_path / "b.png", separate=True)
    assert [p.name for p in paths] == ["b-0.png", "b-1.png"]
    assert read_recipe(paths[1])["index"] == 1
    assert (np.asarray(Image.open(paths[1])) == made.numpy()[1]).all()
    same_seeds = replace(made, seeds=(7, 7))
    paths = same_seeds.save(tmp_path / "c.jpg", separate=True, quality=80)
    assert [p.name for p in paths] == ["c-0.jpg", "c-1.jpg"]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".jpg"] * 2 + [".png"] * 3


def test_a_notebook_shows_the_images():
    made = images(2)
    assert made._repr_png_().startswith(b"\x89PNG") and "seeds [0, 1]" in repr(made)
    assert json.dumps(dict(made.recipe))


def test_a_notebook_shows_prompt_and_seed_below_each_image():
    made = Images(tensor=torch.zeros(2, 3, 128, 128), seeds=(3, 4), prompts=("red apple", "a " * 200))
    sheet = np.asarray(made.captioned(columns=2))
    assert sheet.shape[1] == 256 and (sheet[:128] == 0).all()
    below = sheet[128:] < 128
    assert below[:14, :128].any() and below[14:28, :128].any()  # a line with the prompt, a line with the seed
    other = Images(tensor=made.tensor, seeds=(5, 4), prompts=made.prompts).captioned(columns=2)
    changed = (np.asarray(other) != sheet).any(-1)
    assert (
        changed[142:156, :128].any() and not changed[:, 128:].any() and not changed[:142].any()
    )  # only the seed of the first
    for prompt in ("", "🍎 שלום", "x" * 500, "\x00\n"):
        assert Images(tensor=torch.zeros(1, 3, 8, 8), seeds=(0,), prompts=(prompt,)).captioned().width == 120


def test_an_animation_has_a_frame_for_each_step_and_ends_with_the_images(tmp_path):
    steps = torch.stack([torch.full((2, 3, 8, 8), v) for v in (0.0, 0.5, 0.5)])
    made = Images(tensor=torch.ones(2, 3, 8, 8), seeds=(0, 1), prompts=("a", "b"), steps=steps)
    assert made.animate(tmp_path / "a.gif", seconds=0.1, hold=1.0) == tmp_path / "a.gif"
    with Image.open(tmp_path / "a.gif") as gif:
        frames, times = [], []
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append(int(np.asarray(gif.convert("RGB"))[0, 0, 0]))
            times.append(gif.info["duration"])
    assert (
        sum(times) == 1300
        and frames[0] == 0
        and frames[-1] == 255
        and abs(frames[1] - 128) <= 1
        and times[-1] == 1000
    )
    with pytest.raises(ValueError, match="keep_steps=True"):
        images().animate(tmp_path / "b.gif")
    with pytest.raises(ValueError, match=r"ends in \.gif"):
        made.animate(tmp_path / "b.png")
    with pytest.raises(ValueError, match="seconds: expected 0.02 to 600, got 0"):
        made.animate(tmp_path / "b.gif", seconds=0)
    with pytest.raises(ValueError, match=r"steps have shape \(3, 1, 3, 8, 8\), expected \(N, 2, 3, 8, 8\)"):
        Images(tensor=made.tensor, seeds=(0, 1), prompts=("a", "b"), steps=steps[:, :1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif"]


def test_shapes_and_nan_are_checked():
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        Images(tensor=torch.zeros(1, 4, 8, 8), seeds=(0,), prompts=("",))
    with pytest.raises(ValueError, match="2 seeds"):
        Images(tensor=torch.zeros(1, 3, 8, 8), seeds=(0, 1), prompts=("",))
    with pytest.raises(ValueError, match="NaN"):
        Images(tensor=torch.full((1, 3, 8, 8), float("nan")), seeds=(0,), prompts=("",))


def test_seeds():
    assert check_seeds(5, 3) == (5, 6, 7) and check_seeds([4, 4], 2) == (4, 4)
    with pytest.raises(ValueError, match="got -2"):
        check_seeds(-2, 1)
