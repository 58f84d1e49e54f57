"""Test the conditions besides text and their tasks, on models of reduced width with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reduced_families
import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.guidance import cfg
from ldm.images.canvas import Canvas
from ldm.images.pixels import to_depth, to_mask, to_pixels
from ldm.pipelines.call import SizeCondition
from ldm.pipelines.tasks.border import latent_then_mask, mask_then_latent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from the name of a published model to its reduced copy, which is made once."""
    folder, made = tmp_path_factory.mktemp("cards"), {}

    def get(base: str) -> Any:
        if base not in made:
            made[base] = reduced_families.load(reduced_families.register(base, folder).name)
        return made[base]

    return get


def random_image(seed: int = 0, side: int = 32) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def rectangle_mask(side: int = 32) -> Tensor:
    mask = torch.zeros(side, side)
    mask[8:16, 4:20] = 1
    return mask


OPTIONS: dict[str, Any] = {"progress": False, "sampler": "ddim"}


def differ(a: Any, b: Any) -> bool:
    return bool((a.tensor - b.tensor).abs().max() > 1e-3)


def test_strength_one_is_text_to_image_and_zero_the_reconstruction(models: Any) -> None:
    pipe = models("sd-v1-5")
    text = pipe.text_to_image("a cat", n=2, **OPTIONS)
    assert torch.equal(
        pipe.image_to_image("a cat", random_image(), strength=1.0, n=2, **OPTIONS).tensor, text.tensor
    )
    again = pipe.image_to_image("a cat", random_image(), strength=0.0, **OPTIONS)
    assert torch.equal(again.tensor, pipe.decode(pipe.encode(random_image())))
    some = pipe.image_to_image("a cat", random_image(), strength=0.5, steps=4, **OPTIONS)
    assert some.recipe["steps"] == 2 and some.recipe["strength"] == 0.5 and not some.recipe["replayable"]
    assert differ(some, pipe.image_to_image("a cat", random_image(1), strength=0.5, steps=4, **OPTIONS))
    batch = pipe.image_to_image(
        "a cat", torch.cat([random_image(), random_image(1)]), n=2, strength=0.5, steps=4, **OPTIONS
    )
    # matrix products of a batch round differently
    assert torch.allclose(batch.tensor[:1], some.tensor, atol=1e-4)


def test_a_model_without_mask_channels_keeps_the_known_latent(models: Any) -> None:
    pipe, last = models("sd-v1-5"), []
    pipe.inpaint(
        "a cat", random_image(), rectangle_mask(), on_step=lambda i, x, d: last.append(d.x0), **OPTIONS
    )
    z = pipe.encode(Canvas.masked(random_image(), rectangle_mask()).filled())
    small = torch.nn.functional.adaptive_max_pool2d(rectangle_mask()[None, None], z.shape[-2:])
    assert 0 < small.mean() < 1
    assert torch.allclose(last[-1] * (1 - small), z * (1 - small), atol=1e-5)
    assert not torch.allclose(last[-1] * small, z * small, atol=1e-1)


@pytest.mark.parametrize("base", ["sd-v1-5-inpainting", "sdxl-inpainting", "ldm-inpainting-big"])
def test_inpainting_models_see_the_mask_and_the_image(models: Any, base: str) -> None:
    pipe = models(base)
    prompt = "" if base.startswith("ldm") else "a cat"
    image = random_image()
    one = pipe.inpaint(prompt, image, rectangle_mask(), **OPTIONS)
    beyond = image.clone()
    beyond[..., 8:16, 4:20] = 0.9
    # pixels below the mask have no effect
    assert torch.equal(pipe.inpaint(prompt, beyond, rectangle_mask(), **OPTIONS).tensor, one.tensor)
    assert differ(pipe.inpaint(prompt, random_image(1), rectangle_mask(), **OPTIONS), one)
    assert differ(pipe.inpaint(prompt, image, 1 - rectangle_mask(), **OPTIONS), one)
    with pytest.raises(ValueError, match="takes an image beside the latent: call inpaint"):
        pipe.text_to_image(prompt, **OPTIONS)


def test_the_order_and_values_of_the_extra_channels(models: Any) -> None:
    image, mask = random_image(), to_mask(rectangle_mask(), (32, 32))
    sd, big = models("sd-v1-5-inpainting"), models("ldm-inpainting-big")
    grey, black = image * (1 - mask) + 0.5 * mask, image * (1 - mask)
    canvas = Canvas.masked(image, mask)
    extra, known = mask_then_latent(sd.stage, canvas, 1.0)
    assert known is None
    assert torch.equal(extra[:, :1], mask[..., ::2, ::2]) and torch.equal(extra[:, 1:], sd.encode(grey))
    extra, known = latent_then_mask(big.stage, canvas, 1.0)
    assert known is None
    assert torch.equal(extra[:, 3:], 2 * mask[..., ::2, ::2] - 1) and torch.equal(
        extra[:, :3], big.encode(black)
    )


def test_classes(models: Any) -> None:
    pipe = models("ldm-cin256-v2")
    two = pipe.class_to_image([3, 7], n=2, **OPTIONS)
    assert two.prompts == ("3", "3", "7", "7") and two.recipe["prompt"] == [3, 3, 7, 7]
    assert differ(pipe.class_to_image(3, **OPTIONS), pipe.class_to_image(7, **OPTIONS))
    null = pipe.class_to_image(1000, **OPTIONS)
    assert torch.allclose(pipe.class_to_image(3, guidance=0.0, **OPTIONS).tensor, null.tensor, atol=1e-5)
    with pytest.raises(
        ValueError, match="conditioned on classes: expected a number from 0 to 1000, got 'cat'"
    ):
        pipe.text_to_image("cat", **OPTIONS)
    with pytest.raises(ValueError, match="class 1001: expected 0 to 1000"):
        pipe.class_to_image(1001, **OPTIONS)
    with pytest.raises(ValueError, match="knows no unconditional class: expected guidance 1, got 2.0"):
        models("ldm-cin256").class_to_image(1, guidance=2.0, **OPTIONS)
    assert len(models("ldm-cin256").class_to_image(1, **OPTIONS)) == 1
    with pytest.raises(ValueError, match="not conditioned on classes"):
        models("sd-v1-5").class_to_image(1, **OPTIONS)


def test_unconditional(models: Any) -> None:
    pipe = models("ldm-celebahq")
    images = pipe.unconditional(2, seed=4, **OPTIONS)
    assert images.seeds == (4, 5) and images.recipe["task"] == "unconditional" and images.recipe["replayable"]
    for options in ({"prompt": "a face"}, {"prompt": "", "guidance": 2.0}):
        with pytest.raises(ValueError, match="conditioned on no text"):
            pipe.text_to_image(**options, **OPTIONS)
    assert models("ldm-lsun-churches").unconditional(**OPTIONS).tensor.isfinite().all()


def test_upscalers(models: Any) -> None:
    pipe, low = models("sd-x4-upscaler"), random_image(side=8)
    big = pipe.upscale(low, "a cat", **OPTIONS)
    assert big.tensor.shape == (1, 3, 32, 32) and big.recipe["noise_level"] == 20
    assert differ(big, pipe.upscale(low, "a cat", noise_level=200, **OPTIONS)) and differ(
        big, pipe.upscale(random_image(1, 8), "a cat", **OPTIONS)
    )
    pair = pipe.upscale(low, "a cat", n=2, **OPTIONS)
    # the noise of an image depends on its seed alone
    assert torch.allclose(pair.tensor[:1], big.tensor, atol=1e-4)
    with pytest.raises(ValueError, match="noise_level: expected 0 to 349, got 350"):
        pipe.upscale(low, noise_level=350)
    sr = models("ldm-bsr-sr").upscale(low, **(OPTIONS | {"sampler": None}))
    assert sr.tensor.shape == (1, 3, 32, 32) and sr.recipe["sampler"] == "ddim"
    with pytest.raises(ValueError, match="no input channels for this task; what it does: instruct"):
        models("instruct-pix2pix").upscale(low)


def test_depth(models: Any) -> None:
    pipe = models("sd-v2-depth")
    near = torch.linspace(0, 9, 20 * 30).view(20, 30)
    one = pipe.depth_to_image("a cat", random_image(), near, strength=1.0, **OPTIONS)
    assert torch.allclose(
        pipe.depth_to_image("a cat", random_image(), 5 * near - 3, strength=1.0, **OPTIONS).tensor,
        one.tensor,
        atol=1e-3,
    )
    assert differ(pipe.depth_to_image("a cat", random_image(), near.flip(0), strength=1.0, **OPTIONS), one)
    small = to_depth(near, (4, 6))
    assert small.shape == (1, 1, 4, 6) and small.min() == -1 and small.max() == 1
    with pytest.raises(ValueError, match="call depth_to_image"):
        pipe.text_to_image("a cat")


def test_instructions_have_two_guidance_scales(models: Any) -> None:
    pipe, z = models("instruct-pix2pix"), random_image()
    equal = {"guidance": 3.0, "image_guidance": 3.0, "steps": 3, **OPTIONS}
    got = pipe.instruct("make it blue", z, **equal)
    # with equal scales the two differences add up to one: e(0) + s·(e(image, text) − e(0))
    concat = pipe.encode(z) / pipe.latent_scale
    cond, nothing = pipe.text(["make it blue"]), pipe.text([""])
    pair = (
        Cond(context=cond.context, concat=concat),
        Cond(context=nothing.context, concat=torch.zeros_like(concat)),
    )
    call = pipe.settle("make it blue", guidance=3.0, steps=3, height=32, width=32, **OPTIONS)
    call, x = pipe.stage.begin(call)
    expected = pipe.decode(pipe.stage.solve(call, cfg(pipe.denoiser, *pair, 3.0), x))
    assert torch.allclose(got.tensor, expected, atol=1e-3)
    assert differ(got, pipe.instruct("make it blue", z, **{**equal, "image_guidance": 1.0}))


@pytest.mark.parametrize("base", ["lcm-sd-v1-5", "lcm-sdxl"])
def test_consistency_models_have_the_guidance_as_an_input(models: Any, base: str) -> None:
    pipe, sizes = models(base), []
    hook = pipe.denoiser.net.register_forward_hook(lambda net, inputs, output: sizes.append(len(inputs[0])))
    one = pipe.text_to_image("a cat", guidance=8.0, steps=2, progress=False)
    hook.remove()
    assert sizes == [1, 1] and one.recipe["sampler"] == "lcm"
    assert differ(one, pipe.text_to_image("a cat", guidance=2.0, steps=2, progress=False))
    assert Cond(guidance=torch.tensor([7.51]), context=torch.ones(1, 1, 1)).to(
        dtype=torch.bfloat16
    ).guidance == torch.tensor([7.51])


def test_sizes_condition_sdxl(models: Any) -> None:
    pipe = models("sdxl-base")
    plain = pipe.text_to_image("a cat", **OPTIONS)
    assert torch.equal(
        pipe.text_to_image(
            "a cat", sizes=SizeCondition(original=(32, 32), target=(32, 32)), **OPTIONS
        ).tensor,
        plain.tensor,
    )
    cropped = pipe.text_to_image("a cat", sizes={"crop": [200, 0]}, **OPTIONS)
    assert (
        differ(cropped, plain) and cropped.recipe["sizes"]["crop"] == [200, 0] and "sizes" not in plain.recipe
    )
    assert differ(pipe.text_to_image("a cat", sizes={"crop": [0, 200]}, **OPTIONS), cropped)
    with pytest.raises(ValueError, match="did you mean 'crop'"):
        pipe.text_to_image("a cat", sizes={"crops": [0, 0]}, **OPTIONS)
    refiner = models("sdxl-refiner")
    scores = [
        refiner.image_to_image("a cat", random_image(), sizes={"aesthetic": score}, strength=0.7, **OPTIONS)
        for score in (6.0, 1.0)
    ]
    assert differ(*scores)


def test_turbo_starts_at_the_noisiest_timestep(models: Any) -> None:
    seen: list[float] = []
    pipe = models("sd-turbo")
    hook = pipe.denoiser.net.register_forward_hook(
        lambda net, inputs, output: seen.append(float(inputs[1][0]))
    )
    pipe.text_to_image("a cat", steps=4, progress=False)
    hook.remove()
    # the trailing grid of diffusers with four steps, and no unconditional branch
    assert seen == [
        999,
        749,
        499,
        249,
    ]


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    wanted = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    for form in (
        pixels,
        Image.fromarray(pixels),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        wanted,
        wanted[0],
    ):
        assert torch.allclose(to_pixels(form), wanted)
    assert to_pixels([pixels, pixels]).shape == (2, 3, 6, 5)
    # transparent pixels are composed with white
    assert torch.equal(to_pixels(np.zeros((2, 2, 4), dtype=np.uint8)), torch.ones(1, 3, 2, 2))
    mask = (pixels[..., 0] >= 128).astype(np.uint8) * 255
    for form in (mask, Image.fromarray(mask), torch.from_numpy(mask) / 255):
        assert torch.equal(to_mask(form, (6, 5))[0, 0], torch.from_numpy(mask) / 255)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_pixels(torch.zeros(3, 4, 4, dtype=torch.int64)), "expected uint8, .* got int64"),
        (lambda: to_pixels(torch.full((3, 4, 4), 255.0)), r"expected \[0, 1\], got \[255, 255\]"),
        (lambda: to_pixels([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)]), "images of one size"),
        (lambda: to_pixels(np.zeros((4, 4, 2), dtype=np.uint8)), r"\(4, 4, 2\)"),
        (lambda: to_mask(torch.zeros(4, 4), (4, 5)), "image's size 4×5, got 4×4"),
        (lambda: to_depth(torch.arange(96.0).reshape(2, 3, 4, 4), (2, 2)), "depth: .* one channel"),
        (lambda: to_depth(torch.full((4, 4), float("nan")), (2, 2)), "finite"),
    ],
)
def test_wrong_images_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_files_wrong_sizes_and_strengths_are_refused(models: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        models("sd-v1-5").image_to_image("a cat", tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.png.*not a readable image"):
        to_pixels(tmp_path / "text.png")
    with pytest.raises(ValueError, match="height 64: the image has 32"):
        models("sd-v1-5").image_to_image("a cat", random_image(), height=64)
    with pytest.raises(ValueError, match="3 images for 2 to be made"):
        models("sd-v1-5").image_to_image("a cat", torch.rand(3, 3, 32, 32), n=2)
    for strength in (-0.1, 1.1):
        with pytest.raises(ValueError, match="strength: expected 0 to 1"):
            models("sd-v1-5").image_to_image("a cat", random_image(), strength=strength)
