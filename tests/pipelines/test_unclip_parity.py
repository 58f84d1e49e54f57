"""Whole unCLIP pipelines at reduced width against diffusers', over the same weights and the same noise."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import diffusers
import pytest
import torch
import transformers
from peer import twin
from tinyunclip import PIXELS, SR, VISION, E, tiny_kandinsky, tiny_karlo, tiny_stable

from ldm.pipelines.stage import STEPS, Stage, first_noise, stage_noise
from ldm.pipelines.unclip import UnCLIP
from ldm.pipelines.unclip_stages import AUGMENT, PRIOR, UPSAMPLE
from ldm.pipelines.write import write_clip_tokenizer
from ldm.schedule import NoiseSchedule
from ldm.weights.decoder_rules import decoder_table
from ldm.weights.keymap import to_file
from ldm.weights.parts import shapes_of, to_layout

SEEDS, PROMPT = (3, 4), "a red apple"
PATCHED = (
    "pipelines.deprecated.unclip.pipeline_unclip", "schedulers.scheduling_unclip", "schedulers.scheduling_ddpm",
    "pipelines.stable_diffusion.pipeline_stable_unclip", "pipelines.kandinsky2_2.pipeline_kandinsky2_2",
    "pipelines.kandinsky2_2.pipeline_kandinsky2_2_prior",
)  # fmt: skip
TYPES = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
UNET = {
    "block_out_channels": PIXELS.channels, "down_block_types": TYPES, "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 16,
    "cross_attention_dim": 40,
}  # fmt: skip


def feed(monkeypatch, noises: Iterator[torch.Tensor]) -> None:
    """The peers draw our noise, in the order in which they ask for it."""

    def draw(shape, **_) -> torch.Tensor:
        noise = next(noises)
        assert tuple(noise.shape) == tuple(shape)
        return noise

    for module in PATCHED:
        monkeypatch.setattr(importlib.import_module(f"diffusers.{module}"), "randn_tensor", draw)


def draws(stage: int, shape: tuple[int, ...], steps: int) -> Iterator[torch.Tensor]:
    """The first state of a stage and the noise of its steps, without the last one's, which adds none."""
    yield first_noise(SEEDS, stage, shape)
    noise = stage_noise(SEEDS, stage)
    for k in range(steps - 1):
        yield noise(k, torch.empty(len(SEEDS), *shape))


def given(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A peer's module holding a state."""
    lost = module.load_state_dict(state, strict=False)
    assert not lost.unexpected_keys and all(key.endswith("position_ids") for key in lost.missing_keys), lost
    return module.eval()


def prior_of(pipe: UnCLIP) -> diffusers.PriorTransformer:
    c = pipe.prior.net.config
    theirs = diffusers.PriorTransformer(
        num_attention_heads=c.heads, attention_head_dim=c.head_dim, num_layers=c.layers, embedding_dim=c.embed_dim
    )  # fmt: skip
    return given(theirs, to_layout(pipe.prior.net, "diffusers"))


def text_of(pipe: UnCLIP, folder) -> dict[str, object]:
    write_clip_tokenizer(folder, 0, 77)
    return {"text_encoder": twin(pipe.clip.text.tower), "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder)}


def decoder_of(stage: Stage, **extra) -> tuple[diffusers.UNet2DConditionModel, dict[str, torch.Tensor]]:
    net = stage.denoiser.net
    state = to_file(decoder_table(net.config, shapes_of(net), "diffusers"), net.state_dict())
    return diffusers.UNet2DConditionModel(**UNET | extra), state


def exact(scheduler):
    """A peer's scheduler with its tables in float64: in float32 its 1 − ᾱ[0] is off by 5e-4 of itself, and at t = 999, where x0 is eps times 2e4 and
    then clamped, what follows from that turns single pixels over."""
    betas = scheduler.betas.double()
    if scheduler.config.beta_schedule == "squaredcos_cap_v2":
        betas = NoiseSchedule.cosine().betas
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = betas, 1 - betas, (1 - betas).cumprod(0)
    scheduler.one = torch.ones((), dtype=torch.float64)
    return scheduler


def compare(images: torch.Tensor, expected, least: float = 0.02) -> None:
    """At most 2/255 a pixel; and the pictures are none that anything equals: they vary, and differ from one another."""
    theirs = torch.as_tensor(expected).permute(0, 3, 1, 2).float()
    assert images.shape == theirs.shape
    assert float((images - theirs).abs().max()) <= 2 / 255
    assert float(theirs.std()) > least and float((theirs[0] - theirs[1]).abs().max()) > 10 / 255


def test_karlo(monkeypatch, tmp_path):
    pipe = tiny_karlo()
    unet, state = decoder_of(pipe.decoder, in_channels=3, out_channels=6, class_embed_type="identity", sample_size=16)
    project = diffusers.pipelines.deprecated.unclip.text_proj.UnCLIPTextProjModel(
        clip_embeddings_dim=E, time_embed_dim=128, cross_attention_dim=40
    )  # fmt: skip
    given(unet, {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")})
    given(project, {k.removeprefix("text_proj."): v for k, v in state.items() if k.startswith("text_proj.")})

    def sr(net) -> diffusers.UNet2DModel:
        theirs = diffusers.UNet2DModel(
            sample_size=32, in_channels=6, out_channels=3, block_out_channels=SR.channels, layers_per_block=1, add_attention=False,
            down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
        )  # fmt: skip
        return given(theirs, net.state_dict())

    peer = diffusers.UnCLIPPipeline(
        prior=prior_of(pipe), decoder=unet, text_proj=project, super_res_first=sr(pipe.upsamplers[0].denoiser.net),
        super_res_last=sr(pipe.upsamplers[0].last.net),
        prior_scheduler=exact(diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)),
        decoder_scheduler=exact(diffusers.UnCLIPScheduler(variance_type="learned_range")),
        super_res_scheduler=exact(diffusers.UnCLIPScheduler()),
        **text_of(pipe, tmp_path),
    )  # fmt: skip
    peer.set_progress_bar_config(disable=True)
    stages = ((PRIOR, (E,), 4), (0, (3, 16, 16), 4), (UPSAMPLE, (3, 32, 32), 3))
    noises = (noise for stage in stages for noise in draws(*stage))
    feed(monkeypatch, noises)
    steps = {"prior_num_inference_steps": 4, "decoder_num_inference_steps": 4, "super_res_num_inference_steps": 3}
    expected = peer(
        [PROMPT], num_images_per_prompt=2, prior_guidance_scale=2.0, decoder_guidance_scale=3.0, output_type="np", **steps
    ).images  # fmt: skip
    assert next(noises, None) is None
    ours = pipe.text_to_image(PROMPT, n=2, seed=SEEDS, progress=False)
    compare(ours.tensor, expected)
    assert float((pipe.text_to_image("a cat", n=2, seed=SEEDS, progress=False).tensor - ours.tensor).abs().max()) > 10 / 255


def test_stable_unclip(monkeypatch, tmp_path):
    pipe = tiny_stable()
    normalizer = diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(E)
    given(normalizer, {"mean": pipe.decoder.augmentation.mean, "std": pipe.decoder.augmentation.std})
    text = text_of(pipe, tmp_path)
    betas = {"beta_schedule": "squaredcos_cap_v2"}
    peer = diffusers.StableUnCLIPPipeline(
        prior_tokenizer=text["tokenizer"], prior_text_encoder=text["text_encoder"], prior=prior_of(pipe),
        prior_scheduler=exact(
            diffusers.DDPMScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0, **betas)
        ),
        image_normalizer=normalizer, image_noising_scheduler=exact(diffusers.DDPMScheduler(**betas)), tokenizer=text["tokenizer"],
        text_encoder=twin(pipe.decoder.text.tower), unet=twin(pipe.decoder.denoiser.net), vae=twin(pipe.decoder.space.vae, 0.18215),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction", set_alpha_to_one=False,
            steps_offset=1, clip_sample=False,
        ),
    )  # fmt: skip
    peer.set_progress_bar_config(disable=True)

    def noises() -> Iterator[torch.Tensor]:
        yield from draws(PRIOR, (E,), 4)
        yield stage_noise(SEEDS, AUGMENT)(0, torch.empty(2, E))
        yield first_noise(SEEDS, 0, (4, 16, 16))

    left = noises()
    feed(monkeypatch, left)
    expected = peer(
        PROMPT, num_images_per_prompt=2, prior_num_inference_steps=4, prior_guidance_scale=2.0, num_inference_steps=4, guidance_scale=3.0,
        noise_level=300, height=32, width=32, output_type="np",
    ).images  # fmt: skip
    assert next(left, None) is None
    ours = pipe.text_to_image(PROMPT, n=2, seed=SEEDS, progress=False, noise_level=300)
    compare(ours.tensor, expected)
    other = pipe.text_to_image(PROMPT, n=2, seed=SEEDS, progress=False, noise_level=0)
    assert float((other.tensor - ours.tensor).abs().max()) > 2 / 255
    assert STEPS > 1000  # no stage's draws reach another's


def test_kandinsky_22(monkeypatch, tmp_path):
    pipe = tiny_kandinsky()
    v = VISION
    vision = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=v.width, image_size=v.image_size, patch_size=v.patch_size, num_hidden_layers=v.layers, num_attention_heads=v.heads,
            intermediate_size=4 * v.width, projection_dim=E, hidden_act="quick_gelu",
        )
    )  # fmt: skip
    given(vision, to_layout(pipe.clip.vision, "diffusers"))
    text = text_of(pipe, tmp_path)
    first = diffusers.KandinskyV22PriorPipeline(
        prior=prior_of(pipe), image_encoder=vision,
        scheduler=exact(diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0)),
        image_processor=transformers.CLIPImageProcessor(), **text,
    )  # fmt: skip
    unet, state = decoder_of(
        pipe.decoder, in_channels=4, out_channels=8, encoder_hid_dim=E, encoder_hid_dim_type="image_proj", addition_embed_type="image",
        addition_embed_type_num_heads=16,
    )  # fmt: skip
    movq = diffusers.VQModel(
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, num_vq_embeddings=50, norm_type="spatial",
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    second = diffusers.KandinskyV22Pipeline(
        unet=given(unet, state), movq=given(movq, pipe.decoder.space.vae.state_dict()),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="linear", beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample=True, clip_sample_range=2.0
        ),
    )  # fmt: skip
    for peer in (first, second):
        peer.set_progress_bar_config(disable=True)
    noises = (noise for stage in ((PRIOR, (E,), 4), (0, (4, 16, 16), 4)) for noise in draws(*stage))
    feed(monkeypatch, noises)
    embeds = first(PROMPT, num_images_per_prompt=2, num_inference_steps=4, guidance_scale=2.0)
    made = pipe.imagine(PROMPT, n=2, seed=SEEDS, progress=False)
    assert torch.allclose(made.vector, embeds.image_embeds, atol=1e-4)  # of order 1
    assert torch.allclose(pipe.clip.black().vector, embeds.negative_image_embeds[:1], atol=1e-5)
    # the peer rounds a latent's size up for an autoencoder of factor 8; ours here halves once
    monkeypatch.setattr(importlib.import_module(f"diffusers.{PATCHED[4]}"), "downscale_height_and_width", lambda h, w, _: (h // 2, w // 2))
    expected = second(
        embeds.image_embeds, embeds.negative_image_embeds, height=32, width=32, num_inference_steps=4, guidance_scale=3.0, output_type="np"
    ).images  # fmt: skip
    assert next(noises, None) is None
    compare(pipe.text_to_image(PROMPT, n=2, seed=SEEDS, progress=False).tensor, expected)


@pytest.mark.parametrize("make", [tiny_karlo, tiny_stable, tiny_kandinsky])
def test_a_picture_depends_on_its_seed_alone(make):
    pipe = make()
    both, alone = (pipe.text_to_image(PROMPT, n=len(s), seed=list(s), progress=False) for s in ((3, 4), (4,)))
    # the noise is the same to the bit; products of another batch size round differently, over the steps of all stages
    assert float((both.tensor[1] - alone.tensor[0]).abs().max()) < 1e-3
