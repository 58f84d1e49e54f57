"""Compare complete pipelines with those of diffusers over the same random weights and noise.

Every pixel agrees within 1/255. The models have reduced width. At full size (one image of 64×64, 5 steps):
`python -m pytest tests/pipelines/test_parity.py -m slow`. The full-size SDXL needs 14 GB of memory, which
both pipelines share.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers_pipelines import (
    assert_equal,
    assert_filled,
    differ,
    diffusers_pipeline,
    diffusers_scheduler,
    gradient_image,
    random_pipeline,
    rectangle_mask,
    seeded_noise,
)

import ldm

STEPS = 5
PROMPT, NEGATIVE = "a red apple on a table, oil painting", "blurry"


SIZES = ["reduced", pytest.param("full", marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("base", "kind"),
    [
        ("sd-v1-5", "StableDiffusionPipeline"),
        ("sd-v2-1", "StableDiffusionPipeline"),
        ("sdxl-base", "StableDiffusionXLPipeline"),
    ],
)
def test_text_to_image_equals_diffusers(base: str, kind: str, size: str, tmp_path: Path) -> None:
    pipe, side = random_pipeline(base, size, tmp_path)
    theirs = diffusers_pipeline(pipe, kind, tmp_path)
    z = seeded_noise(pipe, side)
    results = {}
    for sampler in ("ddim", "euler"):
        theirs.scheduler = diffusers_scheduler(pipe, sampler)
        for negative in (NEGATIVE, ""):
            # without a negative prompt SDXL uses zeros, the others the empty text
            words = negative or (None if "XL" in kind else "")
            expected = theirs(
                PROMPT,
                negative_prompt=words,
                num_inference_steps=STEPS,
                guidance_scale=5.0,
                height=side,
                width=side,
                latents=z,
                output_type="pt",
            ).images
            got = pipe.text_to_image(
                PROMPT,
                negative=negative,
                steps=STEPS,
                guidance=5.0,
                height=side,
                width=side,
                latents=z,
                sampler=sampler,
                progress=False,
            ).tensor
            assert_equal(got, expected)
            results[sampler, negative] = got
    assert differ(results["ddim", NEGATIVE], results["ddim", ""])  # the negative prompt has an effect
    if size == "reduced":  # the prompt has an effect
        other = pipe.text_to_image(
            "a green apple",
            steps=STEPS,
            guidance=5.0,
            height=side,
            width=side,
            latents=z,
            sampler="ddim",
            progress=False,
        )
        assert differ(other.tensor, results["ddim", ""])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_image_to_image_equals_diffusers(sampler: str, size: str, tmp_path: Path) -> None:
    pipe, side = random_pipeline("sd-v1-5", size, tmp_path)
    theirs = diffusers_pipeline(pipe, "StableDiffusionImg2ImgPipeline", tmp_path)
    theirs.scheduler = diffusers_scheduler(pipe, sampler)
    generator = torch.Generator().manual_seed(5)
    shape = seeded_noise(pipe, side).shape
    # diffusers first draws for the posterior (which has almost no variance), then the noise
    torch.randn(shape, generator=generator)
    z = torch.randn(shape, generator=generator)
    expected = theirs(
        PROMPT,
        image=gradient_image(side),
        strength=0.6,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        negative_prompt=NEGATIVE,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    got = pipe.image_to_image(
        PROMPT,
        gradient_image(side),
        strength=0.6,
        steps=STEPS,
        guidance=5.0,
        negative=NEGATIVE,
        latents=z,
        sampler=sampler,
        progress=False,
    )
    assert (
        len(
            pipe.image_to_image(PROMPT, gradient_image(side), strength=0.6, steps=STEPS, progress=False).seeds
        )
        == 1
    )
    assert got.recipe["steps"] == 3
    assert_equal(got.tensor, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_nine_channel_inpainting_equals_diffusers(sampler: str, size: str, tmp_path: Path) -> None:
    pipe, side = random_pipeline("sd-v1-5-inpainting", size, tmp_path)
    theirs = diffusers_pipeline(pipe, "StableDiffusionInpaintPipeline", tmp_path)
    theirs.scheduler = diffusers_scheduler(pipe, sampler)
    z = seeded_noise(pipe, side)
    expected = theirs(
        PROMPT,
        image=gradient_image(side),
        mask_image=rectangle_mask(side),
        strength=1.0,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        negative_prompt=NEGATIVE,
        latents=z,
        height=side,
        width=side,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    options = {
        "steps": STEPS,
        "guidance": 5.0,
        "negative": NEGATIVE,
        "latents": z,
        "sampler": sampler,
        "progress": False,
    }
    options["seam"] = 0  # diffusers does not correct the border
    assert_filled(
        pipe.inpaint(PROMPT, gradient_image(side), rectangle_mask(side), **options).tensor,
        expected,
        gradient_image(side),
        rectangle_mask(side),
    )
    other = pipe.inpaint(NEGATIVE, gradient_image(side), rectangle_mask(side), **options).tensor
    assert differ(other * rectangle_mask(side), expected * rectangle_mask(side))


def test_diffusers_reads_a_folder_that_ldm_writes(tmp_path: Path) -> None:
    import diffusers

    pipe, side = random_pipeline("sd-v1-5", "reduced", tmp_path)
    folder = ldm.save(pipe, tmp_path / "folder", layout="diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    z = seeded_noise(pipe, side)
    expected = theirs(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        height=side,
        width=side,
        latents=z,
        output_type="pt",
    ).images
    # plms and 7.5 are the defaults of the card
    got = pipe.text_to_image(PROMPT, steps=STEPS, height=side, width=side, latents=z, progress=False)
    assert_equal(got.tensor, expected)
