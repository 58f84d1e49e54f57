"""Compare complete unCLIP pipelines at reduced width with those of diffusers, over the same noise.

ldm reads the folders that diffusers writes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import diffusers_unclip_pipelines as peers
import pytest
import torch
from tiny_unclip import E, tiny_kandinsky, tiny_kandinsky21, tiny_karlo, tiny_stable

from ldm.pipelines.stages.stage import AUGMENT, DRAWS_PER_STAGE, PRIOR, UPSAMPLE, first_noise, stage_noise

SEEDS, PROMPT = (3, 4), "a red apple"
PATCHED = (
    "pipelines.deprecated.unclip.pipeline_unclip",
    "schedulers.scheduling_unclip",
    "schedulers.scheduling_ddpm",
    "pipelines.stable_diffusion.pipeline_stable_unclip",
    "pipelines.kandinsky2_2.pipeline_kandinsky2_2",
    "pipelines.kandinsky2_2.pipeline_kandinsky2_2_prior",
    "pipelines.kandinsky2_2.pipeline_kandinsky2_2_inpainting",
    "pipelines.kandinsky.pipeline_kandinsky",
    "pipelines.kandinsky.pipeline_kandinsky_prior",
    "pipelines.stable_diffusion.pipeline_stable_unclip_img2img",
)
PICTURE = torch.nn.functional.interpolate(
    torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(2)), size=(32, 32), mode="bilinear"
)


def feed(monkeypatch, noises: Iterator[torch.Tensor]) -> None:
    """Make diffusers draw the given noise, in the order in which it asks for it."""

    def draw(shape, **_) -> torch.Tensor:
        noise = next(noises)
        assert tuple(noise.shape) == tuple(shape)
        return noise

    for module in PATCHED:
        if hasattr(loaded := importlib.import_module(f"diffusers.{module}"), "randn_tensor"):
            monkeypatch.setattr(loaded, "randn_tensor", draw)


def draws(stage: int, shape: tuple[int, ...], steps: int) -> Iterator[torch.Tensor]:
    """Yield the first state of a stage and the noise of each step except the last, which adds none."""
    yield first_noise(SEEDS, stage, shape)
    noise = stage_noise(SEEDS, stage)
    for k in range(steps - 1):
        yield noise(k, torch.empty(len(SEEDS), *shape))


def compare(images: torch.Tensor, expected, least: float = 0.02) -> None:
    """Assert that pixels agree within 2/255, and that the images are neither flat nor equal."""
    theirs = torch.as_tensor(expected).permute(0, 3, 1, 2).float()
    assert images.shape == theirs.shape
    assert float((images - theirs).abs().max()) <= 2 / 255
    assert float(theirs.std()) > least and float((theirs[0] - theirs[1]).abs().max()) > 10 / 255


def test_karlo(monkeypatch, tmp_path):
    made = tiny_karlo()
    peer = peers.karlo(made, tmp_path)
    peer.save_pretrained(tmp_path / "karlo")
    pipe = peers.load_folder(made, tmp_path / "karlo")
    stages = ((PRIOR, (E,), 4), (0, (3, 16, 16), 4), (UPSAMPLE, (3, 32, 32), 3))
    noises = (noise for stage in stages for noise in draws(*stage))
    feed(monkeypatch, noises)
    steps = {
        "prior_num_inference_steps": 4,
        "decoder_num_inference_steps": 4,
        "super_res_num_inference_steps": 3,
    }
    expected = peer(
        [PROMPT],
        num_images_per_prompt=2,
        prior_guidance_scale=2.0,
        decoder_guidance_scale=3.0,
        output_type="np",
        **steps,
    ).images
    assert next(noises, None) is None
    ours = pipe.text_to_image(PROMPT, n=2, seed=SEEDS, progress=False)
    compare(ours.tensor, expected)
    assert (
        float((pipe.text_to_image("a cat", n=2, seed=SEEDS, progress=False).tensor - ours.tensor).abs().max())
        > 10 / 255
    )


def test_stable_unclip(monkeypatch, tmp_path):
    made = tiny_stable()
    peer = peers.stable_unclip(made, tmp_path)
    peer.save_pretrained(tmp_path / "stable" / "texts")
    peers.stable_unclip_img2img(made, tmp_path).save_pretrained(tmp_path / "stable" / "pictures")
    pipe = peers.load_folder(made, tmp_path / "stable")

    def noises() -> Iterator[torch.Tensor]:
        yield from draws(PRIOR, (E,), 4)
        yield stage_noise(SEEDS, AUGMENT)(0, torch.empty(2, E))
        yield first_noise(SEEDS, 0, (4, 16, 16))

    left = noises()
    feed(monkeypatch, left)
    expected = peer(
        PROMPT,
        num_images_per_prompt=2,
        prior_num_inference_steps=4,
        prior_guidance_scale=2.0,
        num_inference_steps=4,
        guidance_scale=3.0,
        noise_level=300,
        height=32,
        width=32,
        output_type="np",
    ).images
    assert next(left, None) is None
    ours = pipe.text_to_image(PROMPT, n=2, seed=SEEDS, progress=False, noise_level=300)
    compare(ours.tensor, expected)
    other = pipe.text_to_image(PROMPT, n=2, seed=SEEDS, progress=False, noise_level=0)
    assert float((other.tensor - ours.tensor).abs().max()) > 2 / 255
    assert DRAWS_PER_STAGE > 1000  # the draws of two stages do not overlap


def test_stable_unclip_variations(monkeypatch, tmp_path):
    """The folder of the image pipeline has no prior and no text tower of CLIP: it only makes variations."""
    made = tiny_stable()
    peer = peers.stable_unclip_img2img(made, tmp_path)
    peer.save_pretrained(tmp_path / "pictures")
    pipe = peers.load_folder(made, tmp_path / "pictures")
    embedding = pipe.clip.image_embedding(PICTURE)
    feed(
        monkeypatch,
        iter([stage_noise(SEEDS, AUGMENT)(0, torch.empty(2, E)), first_noise(SEEDS, 0, (4, 16, 16))]),
    )
    expected = peer(
        prompt=["a cat"] * 2,
        image_embeds=embedding.vector.expand(2, -1),
        num_inference_steps=4,
        guidance_scale=3.0,
        height=32,
        width=32,
        output_type="np",
    ).images
    compare(pipe.variations(PICTURE, n=2, prompt="a cat", seed=list(SEEDS), progress=False).tensor, expected)
    with pytest.raises(ValueError, match="has no prior"):
        pipe.text_to_image("a cat", progress=False)


def kandinsky22_prior(pipe, monkeypatch, tmp_path) -> Any:
    first = peers.kandinsky_prior(pipe, tmp_path)
    first.save_pretrained(tmp_path / "kandinsky" / "prior")
    feed(monkeypatch, draws(PRIOR, (E,), 4))
    return first(PROMPT, num_images_per_prompt=2, num_inference_steps=4, guidance_scale=2.0)


def halving(monkeypatch, module: int, name: str = "downscale_height_and_width") -> None:
    """Make diffusers halve the size of the image, for an autoencoder of factor 2 instead of 8."""
    monkeypatch.setattr(
        importlib.import_module(f"diffusers.{PATCHED[module]}"), name, lambda h, w, _: (h // 2, w // 2)
    )


def test_kandinsky_22(monkeypatch, tmp_path):
    made = tiny_kandinsky()
    embeds = kandinsky22_prior(made, monkeypatch, tmp_path)
    second = peers.kandinsky22(made)
    second.save_pretrained(tmp_path / "kandinsky" / "decoder")
    pipe = peers.load_folder(made, tmp_path / "kandinsky")
    again = pipe.imagine(PROMPT, n=2, seed=SEEDS, progress=False)
    assert torch.allclose(again.vector, embeds.image_embeds, atol=1e-4)  # the values are of order 1
    assert torch.allclose(pipe.clip.black().vector, embeds.negative_image_embeds[:1], atol=1e-5)
    halving(monkeypatch, 4)
    noises = draws(0, (4, 16, 16), 4)
    feed(monkeypatch, noises)
    expected = second(
        embeds.image_embeds,
        embeds.negative_image_embeds,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).images
    assert next(noises, None) is None
    compare(pipe.text_to_image(PROMPT, n=2, seed=SEEDS, progress=False).tensor, expected)


def test_kandinsky_22_inpainting_has_the_channels_of_diffusers(monkeypatch, tmp_path):
    """Compare the nine channels of the first step.

    The images differ: diffusers replaces the known part of the state by a noised latent, ldm that of x0 by
    the latent itself.
    """
    made = tiny_kandinsky(9)
    embeds = kandinsky22_prior(made, monkeypatch, tmp_path)
    second = peers.kandinsky22(made, diffusers.KandinskyV22InpaintPipeline)
    second.save_pretrained(tmp_path / "kandinsky" / "decoder")
    pipe = peers.load_folder(made, tmp_path / "kandinsky")
    halving(monkeypatch, 6)
    feed(monkeypatch, draws(0, (4, 16, 16), 2))
    hole = torch.zeros(1, 1, 32, 32)
    hole[..., 8:20, 12:] = 1
    told: list[torch.Tensor] = []
    hook = second.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["sample"]), with_kwargs=True
    )
    second(
        embeds.image_embeds,
        image=(2 * PICTURE - 1).expand(2, -1, -1, -1),
        mask_image=hole.repeat(2, 1, 1, 1),
        negative_image_embeds=embeds.negative_image_embeds,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="np",
    )
    hook.remove()
    pipe.decoder.denoiser.net.unet.register_forward_pre_hook(
        lambda _, args: told.append(torch.cat([args[0], args[2].concat], dim=1))
    )
    ends, decode = [], pipe.decoder.space.decode
    monkeypatch.setattr(pipe.decoder.space, "decode", lambda z: ends.append(z) or decode(z))
    pipe.inpaint(PROMPT, PICTURE, hole, n=2, seed=SEEDS, steps=2, progress=False)
    # the two steps of diffusers come first; the channels do not depend on the embedding
    theirs, ours = (told[0].chunk(2)[0], told[2])
    assert torch.allclose(ours[:2], theirs, atol=1e-5) and 0 < float(ours[:, 8].mean()) < 1
    known, kept = pipe.decoder.space.encode(PICTURE, pipe.device), ours[:1, 8:] == 1
    assert (
        torch.allclose(ends[0] * kept, (known * kept).expand(2, -1, -1, -1), atol=1e-5)
        and float((ends[0] - known).abs().max()) > 0.1
    )


def test_kandinsky_21(monkeypatch, tmp_path):
    made = tiny_kandinsky21()
    first = peers.kandinsky_prior(made, tmp_path, diffusers.KandinskyPriorPipeline)
    second = peers.kandinsky21(made, peers.learned_range())
    for name, peer in (("prior", first), ("decoder", second)):
        peer.save_pretrained(tmp_path / "kandinsky" / name)
    pipe = peers.load_folder(made, tmp_path / "kandinsky")
    noises = (noise for stage in ((PRIOR, (E,), 4), (0, (4, 16, 16), 4)) for noise in draws(*stage))
    feed(monkeypatch, noises)
    embeds = first(PROMPT, num_images_per_prompt=2, num_inference_steps=4, guidance_scale=2.0)
    assert torch.allclose(
        pipe.imagine(PROMPT, n=2, seed=SEEDS, progress=False).vector, embeds.image_embeds, atol=1e-4
    )
    halving(monkeypatch, 7, "get_new_h_w")
    # the scheduler of diffusers has leading spacing, the card that of the authors' code
    expected = second(
        [PROMPT] * 2,
        embeds.image_embeds,
        embeds.negative_image_embeds,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="np",
    ).images
    assert next(noises, None) is None
    ours = pipe.text_to_image(PROMPT, n=2, seed=SEEDS, progress=False, spacing="leading")
    compare(ours.tensor, expected)
    assert (
        float(
            (
                pipe.text_to_image("a pear", n=2, seed=SEEDS, progress=False, spacing="leading").tensor
                - ours.tensor
            )
            .abs()
            .max()
        )
        > 10 / 255
    )


@pytest.mark.parametrize("make", [tiny_karlo, tiny_stable, tiny_kandinsky, tiny_kandinsky21])
def test_an_image_depends_on_its_seed_alone(make: Callable[[], Any]):
    pipe = make()
    both, alone = (pipe.text_to_image(PROMPT, n=len(s), seed=list(s), progress=False) for s in ((3, 4), (4,)))
    # the noise is bit-identical, but matrix products of another batch size round differently, over the steps
    # of all stages
    assert float((both.tensor[1] - alone.tensor[0]).abs().max()) < 1e-3
