"""Test inpainting and outpainting: known pixels are exact, hidden pixels have no effect, windows blend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reduced_families
import torch
from PIL import Image
from tiny_latent_diffusion import tiny_model
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.images.canvas import Padded
from ldm.pipelines.drafts import window_start, with_known_draft
from ldm.pipelines.latent import DRAFTED

OPTIONS: dict[str, Any] = {"progress": False, "steps": 3, "sampler": "ddim"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_model()


def random_image(h: int = 32, w: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(seed))


def rectangle_mask(h: int = 32, w: int = 32) -> Tensor:
    mask = torch.zeros(h, w)
    mask[5:17, 6:21] = 1
    return mask


def outside(x: Tensor, mask: Tensor) -> Tensor:
    return x * (1 - mask)


@pytest.mark.parametrize(
    "options",
    [{}, {"seam": 0}, {"feather": 3}, {"resample": 2, "jump": 2}, {"strength": 0.5}, {"window": 16}],
)
def test_known_pixels_are_exact(pipe: Any, options: dict[str, Any]) -> None:
    image, mask = random_image(), rectangle_mask()
    made = pipe.inpaint("cat", image, mask, n=2, **OPTIONS, **options)
    assert made.tensor.shape == (2, 3, 32, 32)
    assert torch.equal(outside(made.tensor, mask), outside(image, mask).expand(2, -1, -1, -1))
    assert float((made.tensor - image).mul(mask).abs().max()) > 0.05
    for key, value in options.items():
        assert made.recipe[key] == value
    assert not made.recipe["replayable"]


@pytest.mark.parametrize("base", ["sd-v1-5", "sd-v1-5-inpainting", "ldm-inpainting-big", "ldm-celebahq"])
def test_known_pixels_are_exact_in_published_families(base: str, tmp_path: Any) -> None:
    model = reduced_families.load(reduced_families.register(base, tmp_path).name)
    image, mask = random_image(), rectangle_mask()
    prompt = "a cat" if base.startswith("sd") else ""
    for made in (
        model.inpaint(prompt, image, mask, **OPTIONS),
        model.inpaint(prompt, image, mask, **OPTIONS, seam=0),
    ):
        assert torch.equal(outside(made.tensor, mask), outside(image, mask))
    wide = model.outpaint(prompt, image, right=24, top=7, **OPTIONS)
    assert wide.tensor.shape == (1, 3, 39, 56) and torch.equal(wide.tensor[..., 7:, :32], image)


def test_pixels_below_the_mask_have_no_effect(pipe: Any) -> None:
    image, mask = random_image(), rectangle_mask()
    other = outside(image, mask) + mask * 0.9
    one, two = (pipe.inpaint("cat", given, mask, **OPTIONS) for given in (image, other))
    assert torch.equal(one.tensor, two.tensor)
    begun = [pipe.inpaint("cat", given, mask, strength=0.5, **OPTIONS) for given in (image, other)]
    assert not torch.equal(begun[0].tensor, begun[1].tensor)


def test_files_arrays_and_images_give_the_same_result(pipe: Any, tmp_path: Any) -> None:
    array = (random_image()[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    mask = (rectangle_mask().numpy() * 255).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    kinds = [
        (array, mask),
        (Image.fromarray(array), Image.fromarray(mask)),
        (tmp_path / "a.png", str(tmp_path / "m.png")),
    ]
    made = [pipe.inpaint("cat", *kind, **OPTIONS).tensor for kind in kinds]
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    known = (made[0] * 255).round().byte()[0].permute(1, 2, 0).numpy()[mask == 0]
    assert (known == array[mask == 0]).all()


def test_a_size_that_does_not_fit_is_padded_with_a_warning_and_cropped(pipe: Any) -> None:
    image, mask = random_image(31, 29), rectangle_mask(31, 29)
    with pytest.warns(Padded, match="29×31 is not a multiple of 4: padded to 32×32"):
        made = pipe.inpaint("cat", image, mask, **OPTIONS).tensor
    assert made.shape == image.shape and torch.equal(outside(made, mask), outside(image, mask))
    with pytest.warns(Padded):
        assert pipe.image_to_image("cat", image, **OPTIONS).tensor.shape == image.shape


@pytest.mark.parametrize(
    "margins", [{"right": 32}, {"left": 5, "bottom": 3}, {"left": 40, "right": 41, "top": 33}]
)
def test_outpainting_keeps_the_image_in_place(pipe: Any, margins: dict[str, int]) -> None:
    image = random_image()
    made = pipe.outpaint("cat", image, n=2, **margins, **OPTIONS)
    left, top = margins.get("left", 0), margins.get("top", 0)
    h, w = 32 + top + margins.get("bottom", 0), 32 + left + margins.get("right", 0)
    assert made.tensor.shape == (2, 3, h, w)
    assert torch.equal(made.tensor[..., top : top + 32, left : left + 32], image.expand(2, -1, -1, -1))
    assert all(made.recipe[side] == width for side, width in margins.items())


def test_one_window_over_the_whole_canvas_changes_nothing(pipe: Any) -> None:
    image, sizes = random_image(32, 16), []
    hook = pipe.denoiser.net.register_forward_hook(
        lambda net, inputs, output: sizes.append(tuple(inputs[0].shape[-2:]))
    )
    one = pipe.outpaint("cat", image, right=16, **OPTIONS)
    again = pipe.outpaint("cat", image, right=16, window=32, **OPTIONS)
    assert torch.equal(one.tensor, again.tensor) and set(sizes) == {(8, 8)}
    sizes.clear()
    pipe.outpaint("cat", image, right=48, **OPTIONS)
    hook.remove()
    assert set(sizes) == {(8, 8)}  # the model sees a canvas of 8×16 in windows of its own size


def test_known_latents_replace_the_draft_which_is_placed_once() -> None:
    draft = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 2, 4, 4)  # increases from left to right
    known, empty = torch.full((1, 2, 4, 10), 9.0), torch.ones(1, 1, 4, 10)
    empty[..., :2] = 0  # the two columns at the left are known
    cond, uncond = with_known_draft((Cond(concat=draft), Cond(context=torch.zeros(1, 1, 1))), known, empty)
    assert cond.concat is not None and uncond.concat is None
    # known, then the draft, then its last column repeated
    assert torch.equal(cond.concat[0, 0, 0], torch.tensor([9.0, 9, 2, 3, 3, 3, 3, 3, 3, 3]))
    same = with_known_draft((Cond(concat=draft), Cond()), known[..., :4], torch.ones(1, 1, 4, 4))[0].concat
    assert torch.equal(same, draft)


@pytest.mark.parametrize(
    ("known", "side", "tile", "begin"),
    [
        ((0, 4), 10, 6, 0),
        ((6, 10), 10, 6, 4),
        ((4, 6), 10, 6, 2),
        ((1, 9), 10, 6, 2),
        ((0, 8), 16, 6, 2),
        ((0, 0), 10, 6, 2),
        ((0, 10), 10, 10, 0),
    ],
)
def test_the_draft_is_placed_over_the_known_part_nearest_to_the_middle(
    known: tuple[int, int], side: int, tile: int, begin: int
) -> None:
    where = torch.zeros(side, dtype=torch.bool)
    where[known[0] : known[1]] = True
    assert window_start(where, tile) == begin


def test_a_white_mask_repaints_the_whole_image(pipe: Any) -> None:
    made = pipe.inpaint("cat", random_image(), torch.ones(32, 32), seam=0, **OPTIONS)
    # eps is derived from x0 again, which rounds
    assert torch.allclose(made.tensor, pipe.text_to_image("cat", **OPTIONS).tensor, atol=1e-4)


def test_inpainting_starts_from_a_draft_that_covers_the_image(pipe: Any) -> None:
    seen: dict[str, list[Tensor]] = {}

    def made(name: str, task: Any, *args: Any, **options: Any) -> Any:
        seen[name] = []
        return task(
            "cat",
            *args,
            **{**OPTIONS, "steps": 10, **options},
            on_step=lambda i, x, d: seen[name].append(x.clone()),
        )

    one = made("one", pipe.inpaint, random_image(), rectangle_mask())
    made("other noise", pipe.inpaint, random_image(), rectangle_mask(), seed=1)
    made("text", pipe.text_to_image)
    made("other text", pipe.text_to_image, seed=1)
    made("all", pipe.inpaint, random_image(), torch.ones(32, 32))
    made("wide", pipe.outpaint, random_image(), right=16)
    taken = round(10 * DRAFTED)
    assert {name: len(states) for name, states in seen.items()} == {
        "one": taken,
        "other noise": taken,
        "text": 10,
        "other text": 10,
        "all": 10,
        "wide": 10,
    }
    repainted = pipe.encode(torch.zeros(1, 3, 32, 32)).new_zeros(1, 1, 8, 8)
    # the latent positions below the mask: the noise has less effect there than on an image from pure noise
    repainted[..., 1:5, 1:6] = 1
    by_noise = [
        ((a[-1] - b[-1]) * repainted).square().mean()
        for a, b in ((seen["one"], seen["other noise"]), (seen["text"], seen["other text"]))
    ]
    assert 0 < float(by_noise[0]) < 0.6 * float(by_noise[1])
    assert one.recipe["strength"] == 1 and one.recipe["steps"] == taken


def test_kept_steps_have_the_known_pixels_and_the_size_of_the_image(pipe: Any) -> None:
    image = random_image()
    made = pipe.outpaint("cat", image, right=6, keep_steps=True, **OPTIONS)
    assert made.steps.shape == (3, *made.tensor.shape) and torch.equal(
        made.steps[..., :32], image.expand(3, 1, -1, -1, -1)
    )


def test_seeds_and_one_mask_per_image(pipe: Any) -> None:
    image, mask = random_image(), rectangle_mask()
    four = pipe.inpaint("cat", image, mask, n=3, seed=5, **OPTIONS)
    assert torch.allclose(
        four.tensor[2:], pipe.inpaint("cat", image, mask, seed=7, **OPTIONS).tensor, atol=1e-4
    )
    masks = torch.stack([mask, mask.T])[:, None]
    two = pipe.inpaint("cat", image, masks, n=2, **OPTIONS).tensor
    assert torch.equal(outside(two[:1], mask), outside(image, mask)) and torch.equal(
        outside(two[1:], mask.T), outside(image, mask.T)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.inpaint("cat", random_image(), torch.zeros(32, 32)), "black everywhere"),
        (lambda p: p.inpaint("cat", random_image(), torch.ones(32, 30)), "image's size 32×32, got 32×30"),
        (
            lambda p: p.inpaint("cat", random_image(), torch.ones(3, 1, 32, 32), n=2),
            "3 masks for 2 images to be made",
        ),
        (
            lambda p: p.inpaint("cat", random_image(), rectangle_mask(), strength=2),
            "strength: expected 0 to 1, got 2",
        ),
        (
            lambda p: p.inpaint("cat", random_image(), rectangle_mask(), resample=0),
            "expected 1 to 1000, got 0",
        ),
        (lambda p: p.inpaint("cat", random_image(), rectangle_mask(), feather=-3), "feather: expected"),
        (lambda p: p.inpaint("cat", random_image(), rectangle_mask(), window=0), "window: expected"),
        (lambda p: p.inpaint("cat", np.zeros((4, 4, 2), dtype=np.uint8), rectangle_mask()), r"\(4, 4, 2\)"),
        (lambda p: p.inpaint("cat", random_image(), "absent.png"), "mask: no such file"),
        (
            lambda p: p.outpaint("cat", random_image(), left=-4),
            "left: expected a whole number of pixels, at least 0, got -4",
        ),
        (lambda p: p.outpaint("cat", random_image()), "nothing to outpaint"),
        (lambda p: p.outpaint("cat", random_image(), left=4, width=64), "width 64: the image has 36"),
        (lambda p: p.outpaint("cat", __file__, left=4), "is not a readable image"),
    ],
)
def test_wrong_input_is_refused(pipe: Any, call: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(pipe)
