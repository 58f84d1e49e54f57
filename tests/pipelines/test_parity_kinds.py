"""Compare further kinds of pipelines at reduced width with those of diffusers, within 1/255 per pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

PROMPT, NEGATIVE = "a red apple on a table, oil painting", "blurry"
OURS: dict[str, Any] = {"progress": False}


def test_distilled_models_without_guidance(tmp_path: Path) -> None:
    pipe, side = random_pipeline("sd-turbo", "reduced", tmp_path)
    theirs, z = diffusers_pipeline(pipe, "StableDiffusionPipeline", tmp_path), seeded_noise(pipe, 32)
    expected = theirs(
        PROMPT,
        num_inference_steps=1,
        guidance_scale=0.0,
        height=side,
        width=side,
        latents=z,
        output_type="pt",
    ).images
    # sampler and guidance are the defaults of the card
    got = pipe.text_to_image(PROMPT, steps=1, latents=z, **OURS)
    assert got.recipe["sampler"] == "euler_a" and got.recipe["guidance"] == 1.0
    assert_equal(got.tensor, expected)


def test_consistency_models_with_guidance_as_an_input(tmp_path: Path) -> None:
    pipe, side = random_pipeline("lcm-sd-v1-5", "reduced", tmp_path)
    theirs, z = diffusers_pipeline(pipe, "LatentConsistencyModelPipeline", tmp_path), seeded_noise(pipe, 32)
    results = {}
    for scale in (8.5, 3.0):
        expected = theirs(
            PROMPT,
            num_inference_steps=1,
            guidance_scale=scale,
            height=side,
            width=side,
            latents=z,
            output_type="pt",
        ).images
        results[scale] = pipe.text_to_image(PROMPT, steps=1, guidance=scale, latents=z, **OURS).tensor
        assert_equal(results[scale], expected)
    assert differ(results[8.5], results[3.0])


def test_instructions(tmp_path: Path) -> None:
    pipe, side = random_pipeline("instruct-pix2pix", "reduced", tmp_path)
    theirs, z = (
        diffusers_pipeline(pipe, "StableDiffusionInstructPix2PixPipeline", tmp_path),
        seeded_noise(pipe, 32),
    )
    for sampler in ("ddim", "euler"):
        theirs.scheduler = diffusers_scheduler(pipe, sampler)
        expected = theirs(
            "make it blue",
            image=gradient_image(side),
            num_inference_steps=5,
            guidance_scale=6.0,
            image_guidance_scale=1.5,
            negative_prompt=NEGATIVE,
            latents=z,
            output_type="pt",
        ).images
        options = {
            "steps": 5,
            "guidance": 6.0,
            "negative": NEGATIVE,
            "latents": z,
            "sampler": sampler,
            **OURS,
        }
        assert_equal(
            pipe.instruct("make it blue", gradient_image(side), image_guidance=1.5, **options).tensor,
            expected,
        )
        assert differ(
            pipe.instruct("make it blue", gradient_image(side), image_guidance=1.0, **options).tensor,
            expected,
        )


def test_the_refiner_with_its_aesthetic_scores(tmp_path: Path) -> None:
    pipe, side = random_pipeline("sdxl-refiner", "reduced", tmp_path)
    theirs = diffusers_pipeline(pipe, "StableDiffusionXLImg2ImgPipeline", tmp_path)
    generator, shape = torch.Generator().manual_seed(5), seeded_noise(pipe, side).shape
    # diffusers first draws for the posterior, which has almost no variance
    torch.randn(shape, generator=generator)
    z = torch.randn(shape, generator=generator)
    expected = theirs(
        PROMPT,
        image=gradient_image(side),
        strength=0.6,
        num_inference_steps=5,
        guidance_scale=5.0,
        negative_prompt=NEGATIVE,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    options = {"strength": 0.6, "steps": 5, "guidance": 5.0, "negative": NEGATIVE, "latents": z, **OURS}
    assert_equal(pipe.image_to_image(PROMPT, gradient_image(side), **options).tensor, expected)
    assert differ(
        pipe.image_to_image(
            PROMPT, gradient_image(side), sizes={"negative_aesthetic": 6.0}, **options
        ).tensor,
        expected,
    )


def test_sdxl_inpainting(tmp_path: Path) -> None:
    pipe, side = random_pipeline("sdxl-inpainting", "reduced", tmp_path)
    theirs, z = diffusers_pipeline(pipe, "StableDiffusionXLInpaintPipeline", tmp_path), seeded_noise(pipe, 32)
    expected = theirs(
        PROMPT,
        image=gradient_image(side),
        mask_image=rectangle_mask(side),
        strength=1.0,
        num_inference_steps=5,
        guidance_scale=5.0,
        negative_prompt=NEGATIVE,
        latents=z,
        height=side,
        width=side,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    options = {"steps": 5, "guidance": 5.0, "negative": NEGATIVE, "latents": z, **OURS}
    assert_filled(
        pipe.inpaint(PROMPT, gradient_image(side), rectangle_mask(side), seam=0, **options).tensor,
        expected,
        gradient_image(side),
        rectangle_mask(side),
    )


def test_the_upscaler_with_its_level_of_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = random_pipeline("sd-x4-upscaler", "reduced", tmp_path)
    theirs, low = diffusers_pipeline(pipe, "StableDiffusionUpscalePipeline", tmp_path), gradient_image(8)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    # the noise on the small image is that of diffusers, whose generator draws it first
    drawn = torch.randn(low.shape, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr("ldm.pipelines.tasks.upscale.keyed_normal", lambda seed, k, shape: drawn[0])
    results = {}
    for level in (20, 200):
        expected = theirs(
            PROMPT,
            image=low,
            noise_level=level,
            num_inference_steps=5,
            guidance_scale=5.0,
            negative_prompt=NEGATIVE,
            latents=z,
            generator=torch.Generator().manual_seed(5),
            output_type="pt",
        ).images
        options = {"steps": 5, "guidance": 5.0, "negative": NEGATIVE, "latents": z, **OURS}
        results[level] = pipe.upscale(low, PROMPT, noise_level=level, **options).tensor
        assert_equal(results[level], expected)
    assert differ(results[20], results[200])
