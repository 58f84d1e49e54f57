"""Masks of every kind of file mean the same in every pipeline that inpaints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dalle import tiny_dalle
from tiny_latent_diffusion import tiny_model
from tiny_unclip import tiny_kandinsky, tiny_karlo

QUIET: dict[str, Any] = {"progress": False, "seed": 3, "n": 1}
# pipeline, side of its images, options
PIPES: dict[str, tuple[Callable[[], Any], int, dict[str, Any]]] = {
    "latent": (tiny_model, 32, {"steps": 2}),
    "karlo": (tiny_karlo, 16, {"steps": 2, "prior_steps": 2}),
    "kandinsky": (tiny_kandinsky, 16, {"steps": 2, "prior_steps": 2}),
    "dalle": (tiny_dalle, 64, {"guidance": 1.0}),
}


def masks(inside: np.ndarray, image: np.ndarray) -> dict[str, Image.Image]:
    """Return images that mean the mask `inside` (H, W) of bool; `image` is (H, W, 3) uint8."""
    opaque = np.where(inside, 255, 0).astype(np.uint8)[..., None]
    white = np.full_like(image, 255)
    gray = np.where(inside, 0.8, 0.2) * 65_535
    return {
        "sixteen bits": Image.fromarray(gray.astype(np.uint16)),
        "brush layer": Image.fromarray(np.concatenate([white, opaque], -1)),
        "hole": Image.fromarray(np.concatenate([image, 255 - opaque], -1)),
        "opaque": Image.fromarray(np.concatenate([opaque.repeat(3, -1), white[..., :1]], -1)),
    }


@pytest.mark.parametrize("name", PIPES)
def test_masks_with_alpha_or_sixteen_bits_are_those_of_every_task(name: str, tmp_path: Path) -> None:
    make, side, options = PIPES[name]
    pipe = make()
    image = np.random.default_rng(0).integers(0, 200, (side, side, 3), dtype=np.uint8)
    inside = np.zeros((side, side), dtype=bool)
    inside[side // 4 : side // 2 + 2, side // 3 :] = True
    expected = pipe.inpaint("a cat", image, torch.from_numpy(inside), **QUIET, **options).tensor
    known = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    outside = torch.from_numpy(~inside)
    assert torch.equal(expected[..., outside], known[..., outside])
    assert not torch.allclose(expected[..., ~outside], known[..., ~outside], atol=0.05)
    for kind, mask in masks(inside, image).items():
        path = tmp_path / "mask.png"
        mask.save(path)
        assert torch.equal(pipe.inpaint("a cat", image, path, **QUIET, **options).tensor, expected), kind
