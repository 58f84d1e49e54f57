"""Test the tasks of unCLIP on tiny models: closed forms, invariants, wrong input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_unclip import PRIOR, E, clip_pair, random_network, tiny_kandinsky, tiny_karlo, tiny_stable

from ldm.conditioning.image_embedding import ImageEmbedding, slerp
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.unclip.embedding_codes import EmbeddingCodes
from ldm.pipelines.stages.prior import PriorStage
from ldm.pipelines.stages.upsampler import enlarge
from ldm.pipelines.tasks.rerank import rerank
from ldm.pipelines.unclip import UnCLIP
from ldm.pipelines.windows import tiled, window_starts


@pytest.fixture(scope="module")
def karlo() -> UnCLIP:
    return tiny_karlo()


@pytest.fixture(scope="module")
def kandinsky() -> UnCLIP:
    return tiny_kandinsky()


PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL = F.interpolate(
    torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(2)), size=(16, 16), mode="bilinear"
)
FAST = {"steps": 2, "prior_steps": 2, "progress": False, "upsample": False}


def test_the_default_is_four_images_of_the_upsamplers_size(karlo):
    images = karlo.text_to_image("a cat", steps=2, prior_steps=2, upsampler_steps=2, progress=False)
    assert (
        images.tensor.shape == (4, 3, 32, 32) and images.seeds == (0, 1, 2, 3) and images.recipe["replayable"]
    )
    assert images.recipe["prior_steps"] == 2 and images.recipe["model"] == "karlo-v1-alpha"
    assert karlo.text_to_image("a cat", **FAST).tensor.shape == (4, 3, 16, 16)


def test_a_given_embedding_replaces_that_of_the_prior(karlo):
    made = karlo.imagine("a cat", seed=5, prior_steps=2, progress=False)
    given = karlo.text_to_image("a cat", n=1, seed=5, embedding=made, **FAST)
    assert (
        torch.equal(given.tensor, karlo.text_to_image("a cat", n=1, seed=5, **FAST).tensor)
        and not given.recipe["replayable"]
    )
    other = karlo.text_to_image("a cat", n=1, seed=5, embedding=replace(made, vector=-made.vector), **FAST)
    assert not torch.allclose(other.tensor, given.tensor, atol=0.02)


def test_options_that_no_stage_has_are_refused(karlo):
    with pytest.raises(ValueError, match="the prior has no option 'stepz'; did you mean 'steps'"):
        karlo.text_to_image("a cat", prior_stepz=3, progress=False)
    with pytest.raises(ValueError, match="sampler 'ddpm' has no option 'prior'"):
        karlo.text_to_image("a cat", prior=3, progress=False)


def test_best_of_k_is_the_largest_dot_product_of_k_draws(karlo):
    text = karlo.clip.text_embedding(["a cat"]).vector[0]
    scores = [
        float(karlo.imagine("a cat", candidates=k, prior_steps=2, progress=False).vector[0] @ text)
        for k in (1, 2, 6)
    ]
    assert scores[0] <= scores[1] <= scores[2] and scores[2] > scores[0]


def test_embeddings_of_another_clip_width_or_length_are_refused(karlo):
    good = karlo.clip.image_embedding(PICTURE)
    run = {"n": 1, **FAST}
    with pytest.raises(ValueError, match="reads embeddings of 'openai/ViT-L-14', got those of 'laion"):
        karlo.text_to_image("a", embedding=replace(good, clip="laion/ViT-L-14"), **run)
    with pytest.raises(ValueError, match=f"{E} wide, got 7"):
        karlo.text_to_image("a", embedding=replace(good, vector=torch.zeros(1, 7)), **run)
    with pytest.raises(ValueError, match="got ones of length 1"):
        karlo.text_to_image("a", embedding=good.unit(), **run)
    with pytest.raises(ValueError, match="2 embeddings for 1 images"):
        karlo.text_to_image("a", embedding=good[[0, 0]], **run)
    with pytest.raises(ValueError, match="NaN"):
        ImageEmbedding(vector=torch.full((1, E), float("nan")), clip="x")


def test_prior_and_decoder_of_different_clips_are_refused(karlo):
    stranger = PriorStage(random_network(PRIOR, 3), karlo.card.prior, clip="laion/ViT-L-14")
    with pytest.raises(ValueError, match="its prior on those of 'laion/ViT-L-14'"):
        UnCLIP(clip=karlo.clip, prior=stranger, decoder=karlo.decoder, card=karlo.card)
    narrow = PriorStage(
        random_network(replace(PRIOR, embed_dim=8), 3), karlo.card.prior, clip=karlo.card.clip
    )
    with pytest.raises(ValueError, match="one width, got"):
        UnCLIP(clip=karlo.clip, prior=narrow, decoder=karlo.decoder, card=karlo.card)
    with pytest.raises(ValueError, match="the texts are read by"):
        stranger(clip_pair("openai/ViT-L-14"), stranger.settle("a", progress=False))
    alone = UnCLIP(clip=karlo.clip, prior=None, decoder=karlo.decoder, card=karlo.card)
    with pytest.raises(ValueError, match="has no prior"):
        alone.text_to_image("a", **FAST)
    assert alone.variations(PICTURE, n=1, **FAST).tensor.shape == (1, 3, 16, 16)


def test_inverted_noise_and_the_embedding_reconstruct_the_image():
    """If eps is smooth in x_t, iterating the fixed point makes DDIM return to the inverted image."""
    pipe = tiny_kandinsky()
    with torch.no_grad():
        pipe.decoder.denoiser.net.unet.conv_out.weight.mul_(0.01)
    card = replace(pipe.decoder.card, clip_x0=None)
    pipe.decoder.card = card
    expected = pipe.decoder.space.decode(pipe.decoder.space.encode(PICTURE, torch.device("cpu")))
    options = {"steps": 10, "iterations": 12, "progress": False}
    again = pipe.reconstruct(PICTURE, **options)
    assert float((again.tensor - expected).abs().max()) < 1 / 255
    with pytest.raises(ValueError, match="sampler 'euler': inversion runs ddim backwards"):
        pipe.reconstruct(PICTURE, sampler="euler")
    varied = pipe.variations(PICTURE, n=2, invert=True, eta=1.0, **options)
    assert float((varied.tensor[0] - varied.tensor[1]).abs().max()) > 4 / 255


def test_interpolation_starts_and_ends_at_its_arguments(kandinsky):
    options = {"steps": 2, "prior_steps": 2, "progress": False}
    path = kandinsky.interpolate("a cat", PICTURE, n=3, seed=4, **options)
    first = kandinsky.text_to_image(
        "", n=1, seed=4, embedding=kandinsky.embed("a cat", seed=4, prior_steps=2, progress=False), **options
    )
    last = kandinsky.text_to_image(
        "", n=1, seed=4, embedding=kandinsky.clip.image_embedding(PICTURE), **options
    )
    assert torch.allclose(path.tensor[0], first.tensor[0], atol=1e-3) and torch.allclose(
        path.tensor[2], last.tensor[0], atol=1e-3
    )
    assert path.seeds == (4, 4, 4) and not torch.allclose(path.tensor[1], path.tensor[0], atol=0.01)
    with pytest.raises(ValueError, match="n: expected at least 2"):
        kandinsky.interpolate("a", "b", n=1)
    inverted = kandinsky.interpolate(PICTURE, PICTURE.flip(-1), n=2, invert=True, **options)
    assert inverted.tensor.shape == (2, 3, 32, 32)


def test_slerp_keeps_the_length_and_turns_at_a_constant_rate():
    a, b = torch.tensor([[2.0, 0, 0]]), torch.tensor([[0.0, 2, 0]])
    path = slerp(a, b, torch.linspace(0, 1, 5))
    assert torch.allclose(path.norm(dim=1), torch.full((5,), 2.0))
    assert torch.allclose(torch.atan2(path[:, 1], path[:, 0]), torch.linspace(0, torch.pi / 2, 5), atol=1e-6)
    assert torch.allclose(slerp(a, a, 0.3), a) and torch.isfinite(slerp(a, -a, 0.5)).all()


def test_a_text_difference_starts_at_the_image(kandinsky):
    options = {"steps": 2, "progress": False, "invert": False}
    images = kandinsky.text_difference(PICTURE, "a photo", "a drawing", n=3, most=0.4, seed=4, **options)
    plain = kandinsky.variations(PICTURE, n=1, seed=4, steps=2, progress=False)
    assert torch.allclose(images.tensor[0], plain.tensor[0], atol=1e-3) and not torch.allclose(
        images.tensor[2], plain.tensor[0], atol=0.01
    )
    with pytest.raises(ValueError, match="one embedding"):
        kandinsky.text_difference(PICTURE, "a photo", "a photo", **options)


def test_truncated_embeddings_converge_to_the_full_one(kandinsky):
    codes = EmbeddingCodes(E, E, 16)
    codes.fit(torch.randn(100, E, generator=torch.Generator().manual_seed(0)))
    images = kandinsky.truncated(PICTURE, codes, [0, 5, E], steps=2, progress=False)
    whole = kandinsky.variations(PICTURE, n=1, steps=2, progress=False)
    assert torch.allclose(images.tensor[2], whole.tensor[0], atol=1e-3) and not torch.allclose(
        images.tensor[0], whole.tensor[0], atol=0.01
    )


HOLE = F.pad(torch.ones(1, 1, 16, 8), (8, 0))
PAINT = {"n": 2, "steps": 3, "prior_steps": 2, "progress": False}


@pytest.mark.parametrize("name", ["karlo", "kandinsky"])
def test_inpainting_keeps_every_pixel_that_is_not_masked(name, request):
    pipe = request.getfixturevalue(name)
    images = pipe.inpaint("a cat", SMALL, HOLE, seed=3, **PAINT)
    assert torch.equal(images.tensor[..., :8], SMALL[..., :8].expand(2, -1, -1, -1))
    assert (
        float((images.tensor[..., 8:] - SMALL[..., 8:]).abs().max()) > 0.1
        and images.recipe["task"] == "inpaint"
    )
    hidden = torch.where(HOLE > 0, 1 - SMALL, SMALL)  # pixels below the mask have no effect
    assert torch.allclose(
        pipe.inpaint("a cat", hidden, HOLE, seed=3, **PAINT).tensor, images.tensor, atol=1e-3
    )
    again = pipe.inpaint("a cat", SMALL, HOLE, seed=3, resample=2, jump=2, **PAINT)
    assert torch.equal(again.tensor[..., :8], images.tensor[..., :8]) and not torch.allclose(
        again.tensor, images.tensor, atol=0.01
    )
    with pytest.raises(ValueError, match="black everywhere"):
        pipe.inpaint("a cat", SMALL, 0 * HOLE, **PAINT)
    with pytest.raises(ValueError, match="3 images for 2 to be made"):
        pipe.inpaint("a cat", SMALL.expand(3, -1, -1, -1), HOLE, **PAINT)


def test_outpainting_keeps_the_image_and_paints_around_it(kandinsky):
    images = kandinsky.outpaint("a cat", SMALL, left=6, bottom=20, seam=0, **PAINT)
    assert images.tensor.shape == (2, 3, 36, 22) and torch.equal(
        images.tensor[..., :16, 6:], SMALL.expand(2, -1, -1, -1)
    )
    assert (images.recipe["left"], images.recipe["bottom"], images.recipe["window"]) == (6, 20, 32)
    whole = kandinsky.outpaint("a cat", SMALL, left=6, bottom=20, seam=0, window=64, **PAINT)
    assert not torch.allclose(images.tensor, whole.tensor, atol=0.01)  # 36 rows, in windows of 32
    with pytest.raises(ValueError, match="nothing to outpaint"):
        kandinsky.outpaint("a cat", SMALL, **PAINT)
    with pytest.raises(ValueError, match="height 16: the image has 26"):
        kandinsky.outpaint("a cat", SMALL, top=10, height=16, **PAINT)


def test_reranking_keeps_the_most_similar(karlo):
    images = karlo.text_to_image(["a cat", "a dog"], n=3, **FAST)
    scores = karlo.clip.similarity(images.tensor, images.prompts)
    best = rerank(images, karlo.clip, keep=2)
    assert best.prompts == ("a cat", "a cat", "a dog", "a dog") and best.seeds[0] == int(scores[:3].argmax())
    assert not best.recipe["replayable"]
    with pytest.raises(ValueError, match="keep: expected 1 to 3"):
        rerank(images, karlo.clip, keep=4)


def test_stable_unclip_has_a_noise_level():
    pipe = tiny_stable()
    with pytest.raises(ValueError, match="noise_level: expected 0 to 999, got 1000"):
        pipe.text_to_image("a", n=1, noise_level=1000, steps=2, prior_steps=2, progress=False)


class Pointwise(torch.nn.Module):
    """A network that maps every pixel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        return (self.weight * x + cond.concat).tanh()


def test_tiles_change_nothing_for_a_pointwise_network():
    denoiser = Denoiser(Pointwise(), NoiseSchedule.cosine(), "eps")
    x, low = torch.randn(2, 3, 20, 33), torch.randn(2, 3, 20, 33)
    whole, parts = (
        denoiser(x, 500, Cond(concat=low)),
        tiled(denoiser, Cond(concat=low), 12, overlap=4)(x, torch.tensor(500)),
    )
    assert torch.allclose(parts.x0, whole.x0, atol=1e-5) and torch.allclose(parts.eps, whole.eps, atol=1e-5)
    for side, tile, overlap in ((33, 12, 4), (12, 12, 3), (100, 13, 12)):
        starts = window_starts(side, tile, overlap)
        assert (
            starts[0] == 0
            and starts[-1] == side - tile
            and all(b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))
        )


def test_a_residual_upsampler_adds_to_the_enlarged_image(karlo):
    stage = karlo.upsamplers[0]
    call = stage.settle("", seed=[0], steps=2, height=48, width=64, progress=False)
    low = enlarge(2 * SMALL - 1, (48, 64))
    card, whole = stage.card, 2 * stage(SMALL, call) - 1
    try:
        stage.card = replace(card, residual=1e-3)
        made = 2 * stage(SMALL, call) - 1
    finally:
        stage.card = card
    inside = (low.abs() < 0.99) & (whole.abs() < 1)  # pixels that are not clamped
    assert (
        float((made - low - 1e-3 * whole)[inside].abs().max()) < 1e-5 and float(inside.float().mean()) > 0.1
    )


def test_tiled_upsampling_runs_at_any_size(karlo):
    stage = karlo.upsamplers[0]
    call = stage.settle("", seed=[0], steps=2, height=48, width=64, progress=False)
    assert stage(SMALL, call, tile=16).shape == (1, 3, 48, 64)
