"""Build diffusers pipelines that share their weights with `UnCLIP` pipelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from diffusers_pipelines import diffusers_network
from tiny_unclip import MOVQ, PIECES, PIXELS, SR, VISION, E

import ldm
from ldm.catalog.lookup import REGISTERED
from ldm.catalog.unclip_cards import UnCLIPNetworks
from ldm.diffusion.schedule import NoiseSchedule
from ldm.pipelines.stages.stage import Stage
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.latent.writing import write_clip_tokenizer
from ldm.weights.keymap import to_file
from ldm.weights.parts import shapes_of, to_layout
from ldm.weights.rules.decoder import decoder_table

TYPES = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
UNET = {
    "block_out_channels": PIXELS.channels,
    "down_block_types": TYPES,
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 16,
    "cross_attention_dim": 40,
}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}


def card_of(pipe: UnCLIP) -> str:
    """Register a card with the shapes and settings of a pipeline, and return its name."""
    configs: dict[str, Any] = {part: network.config for part, network in pipe.networks().items()}
    upsamplers = tuple(
        configs.pop(part)
        for part in list(configs)
        if part.startswith("upsampler") and not part.endswith("-last")
    )
    last = configs.pop("upsampler-last", None) is not None
    name = f"tiny-{pipe.card.name}"
    REGISTERED[name] = replace(
        pipe.card, name=name, networks=UnCLIPNetworks(**configs, upsamplers=upsamplers, last=last)
    )
    return name


def load_folder(pipe: UnCLIP, folder: Path) -> UnCLIP:
    """Load a folder that holds the weights of `pipe` with `ldm.load`."""
    return ldm.load(card_of(pipe), weights=folder, device="cpu", dtype="float32")


def load_state(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Load a state into a module of diffusers or transformers, and return the module."""
    lost = module.load_state_dict(state, strict=False)
    assert not lost.unexpected_keys and all(
        key.endswith(("position_ids", "token_type_ids")) for key in lost.missing_keys
    ), lost
    return module.eval()


def prior_of(pipe: UnCLIP) -> diffusers.PriorTransformer:
    c = pipe.prior.net.config
    theirs = diffusers.PriorTransformer(
        num_attention_heads=c.heads,
        attention_head_dim=c.head_dim,
        num_layers=c.layers,
        embedding_dim=c.embed_dim,
    )
    return load_state(theirs, to_layout(pipe.prior.net, "diffusers"))


def text_of(pipe: UnCLIP, folder) -> dict[str, object]:
    write_clip_tokenizer(folder, 0, 77)
    return {
        "text_encoder": diffusers_network(pipe.clip.text.tower),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(folder),
    }


def vision_of(pipe: UnCLIP) -> transformers.CLIPVisionModelWithProjection:
    v = VISION
    config = transformers.CLIPVisionConfig(
        hidden_size=v.width,
        image_size=v.image_size,
        patch_size=v.patch_size,
        num_hidden_layers=v.layers,
        num_attention_heads=v.heads,
        intermediate_size=4 * v.width,
        projection_dim=E,
        hidden_act="quick_gelu",
    )
    return load_state(
        transformers.CLIPVisionModelWithProjection(config), to_layout(pipe.clip.vision, "diffusers")
    )


def decoder_of(stage: Stage, **extra) -> tuple[diffusers.UNet2DConditionModel, dict[str, torch.Tensor]]:
    net = stage.denoiser.net
    state = to_file(decoder_table(net.config, shapes_of(net), "diffusers"), net.state_dict())
    return diffusers.UNet2DConditionModel(**UNET | extra), state


def exact(scheduler):
    """Give a diffusers scheduler its tables in float64, and return it.

    In float32, 1 − ᾱ[0] has a relative error of 5e-4. At t = 999, x0 is eps times 2e4 and then clamped, so
    this error changes single pixels from one end of the range to the other.
    """
    betas = scheduler.betas.double()
    if scheduler.config.beta_schedule == "squaredcos_cap_v2":
        betas = NoiseSchedule.cosine().betas
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = betas, 1 - betas, (1 - betas).cumprod(0)
    scheduler.one = torch.ones((), dtype=torch.float64)
    return scheduler


def karlo(pipe: UnCLIP, folder: Path) -> diffusers.UnCLIPPipeline:
    unet, state = decoder_of(
        pipe.decoder, in_channels=3, out_channels=6, class_embed_type="identity", sample_size=16
    )
    project = UnCLIPTextProjModel(clip_embeddings_dim=E, time_embed_dim=128, cross_attention_dim=40)
    load_state(unet, {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")})
    load_state(
        project, {k.removeprefix("text_proj."): v for k, v in state.items() if k.startswith("text_proj.")}
    )

    def sr(net) -> diffusers.UNet2DModel:
        theirs = diffusers.UNet2DModel(
            sample_size=32,
            in_channels=6,
            out_channels=3,
            block_out_channels=SR.channels,
            layers_per_block=1,
            add_attention=False,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
        )
        return load_state(theirs, net.state_dict())

    return without_progress(
        diffusers.UnCLIPPipeline(
            prior=prior_of(pipe),
            decoder=unet,
            text_proj=project,
            super_res_first=sr(pipe.upsamplers[0].denoiser.net),
            super_res_last=sr(pipe.upsamplers[0].last.net),
            prior_scheduler=exact(diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)),
            decoder_scheduler=exact(diffusers.UnCLIPScheduler(variance_type="learned_range")),
            super_res_scheduler=exact(diffusers.UnCLIPScheduler()),
            **text_of(pipe, folder),
        )
    )


def stable_unclip(pipe: UnCLIP, folder: Path) -> diffusers.StableUnCLIPPipeline:
    normalizer = diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(E)
    load_state(normalizer, {"mean": pipe.decoder.augmentation.mean, "std": pipe.decoder.augmentation.std})
    text = text_of(pipe, folder)
    betas = {"beta_schedule": "squaredcos_cap_v2"}
    return without_progress(
        diffusers.StableUnCLIPPipeline(
            prior_tokenizer=text["tokenizer"],
            prior_text_encoder=text["text_encoder"],
            prior=prior_of(pipe),
            prior_scheduler=exact(
                diffusers.DDPMScheduler(
                    variance_type="fixed_small_log",
                    prediction_type="sample",
                    clip_sample=True,
                    clip_sample_range=5.0,
                    **betas,
                )
            ),
            image_normalizer=normalizer,
            image_noising_scheduler=exact(diffusers.DDPMScheduler(**betas)),
            tokenizer=text["tokenizer"],
            text_encoder=diffusers_network(pipe.decoder.text.tower),
            unet=diffusers_network(pipe.decoder.denoiser.net),
            vae=diffusers_network(pipe.decoder.space.vae, 0.18215),
            scheduler=diffusers.DDIMScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                prediction_type="v_prediction",
                set_alpha_to_one=False,
                steps_offset=1,
                clip_sample=False,
            ),
        )
    )


def stable_unclip_img2img(pipe: UnCLIP, folder: Path) -> diffusers.StableUnCLIPImg2ImgPipeline:
    whole = stable_unclip(pipe, folder)
    parts = (
        "image_normalizer",
        "image_noising_scheduler",
        "tokenizer",
        "text_encoder",
        "unet",
        "vae",
        "scheduler",
    )
    return without_progress(
        diffusers.StableUnCLIPImg2ImgPipeline(
            feature_extractor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
            image_encoder=vision_of(pipe),
            **{part: getattr(whole, part) for part in parts},
        )
    )


def movq_of(pipe: UnCLIP) -> diffusers.VQModel:
    movq = diffusers.VQModel(
        block_out_channels=MOVQ.channels,
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=50,
        norm_type="spatial",
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    return load_state(movq, pipe.decoder.space.vae.state_dict())


def kandinsky_prior(pipe: UnCLIP, folder: Path, kind: type = diffusers.KandinskyV22PriorPipeline) -> Any:
    scheduler = exact(diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0))
    parts = {
        "prior": prior_of(pipe),
        "image_encoder": vision_of(pipe),
        "scheduler": scheduler,
        **text_of(pipe, folder),
    }
    return without_progress(kind(image_processor=transformers.CLIPImageProcessor(), **parts))


def learned_range() -> diffusers.DDPMScheduler:
    return diffusers.DDPMScheduler(
        **LINEAR, variance_type="learned_range", clip_sample=True, clip_sample_range=2.0
    )


def kandinsky22(pipe: UnCLIP, kind: type = diffusers.KandinskyV22Pipeline) -> Any:
    unet, state = decoder_of(
        pipe.decoder,
        in_channels=pipe.decoder.denoiser.net.config.unet.in_channels,
        out_channels=8,
        encoder_hid_dim=E,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        addition_embed_type_num_heads=16,
    )
    return without_progress(kind(unet=load_state(unet, state), movq=movq_of(pipe), scheduler=learned_range()))


def kandinsky_text_parts(pipe: UnCLIP) -> dict[str, Any]:
    c = pipe.decoder.text.encoder.config
    config = MCLIPConfig(
        transformerDimSize=c.width,
        imageDimSize=c.embed_dim,
        vocab_size=c.vocabulary,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp_width,
        max_position_embeddings=c.positions,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    encoder = MultilingualCLIP(config)
    pooler = {key: value for key, value in encoder.state_dict().items() if "pooler" in key}
    return {
        "text_encoder": load_state(encoder, {**to_layout(pipe.decoder.text.encoder, "diffusers"), **pooler}),
        "tokenizer": transformers.XLMRobertaTokenizer(vocab=PIECES, model_max_length=77),
    }


def kandinsky21(pipe: UnCLIP, scheduler: Any) -> diffusers.KandinskyPipeline:
    unet, state = decoder_of(
        pipe.decoder,
        in_channels=4,
        out_channels=8,
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_image_proj",
        cross_attention_dim=E,
        addition_embed_type="text_image",
        addition_embed_type_num_heads=16,
    )
    return without_progress(
        diffusers.KandinskyPipeline(
            unet=load_state(unet, state),
            movq=movq_of(pipe),
            scheduler=scheduler,
            **kandinsky_text_parts(pipe),
        )
    )


def without_progress(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
