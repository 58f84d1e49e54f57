"""Parity of full-size networks with the peers', with random weights, in float32.

Run all, including the slow ones, with `python -m pytest tests/models/test_parity_full.py -m ""`. A network
shares its weights with its peer, so that the largest (SDXL, 10.3 GB) are in memory once. Inputs are small,
because the tests compare parameters, not images.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from shared_weights import TOLERANCE, VISIBLE, error, rotate_qkv, twins

import ldm.models.vae
import ldm.models.vq
from ldm.catalog.shapes import BERTS, UNETS, VAES
from ldm.diffusion.cond import Cond
from ldm.models.layers.embeddings import vector_condition
from ldm.models.text.bert import LDMBert
from ldm.models.unet import UNet


def up(types: tuple[str, ...]) -> tuple[str, ...]:
    """Return the block types of the way up for those of the way down."""
    return tuple(name.replace("Down", "Up") for name in types[::-1])


DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
SD = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": DOWN,
    "up_block_types": up(DOWN),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD2 = SD | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
X4 = {
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": DOWN[::-1],
    "up_block_types": up(DOWN[::-1]),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "only_cross_attention": (True, True, True, False),
    "num_class_embeds": 1000,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": DOWN[:0:-1],
    "up_block_types": up(DOWN[:0:-1]),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CELEBA = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    "attention_head_dim": 32,
}
# name: configuration of the peer, tokens of its context, and the attention whose q, k and v are permuted
UNET_PEERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "sd1": (SD, 77, "down_blocks.1.attentions.0.transformer_blocks.0.attn1"),
    "sd1-inpaint": (SD | {"in_channels": 9}, 77, "up_blocks.1.attentions.2.transformer_blocks.0.attn1"),
    "sd2": (SD2, 77, "down_blocks.0.attentions.1.transformer_blocks.0.attn1"),
    "x4": (X4, 77, "mid_block.attentions.0.transformer_blocks.0.attn1"),
    "text2img-large": (
        SD | {"cross_attention_dim": 1280},
        77,
        "mid_block.attentions.0.transformer_blocks.0.attn1",
    ),
    "sdxl": (SDXL, 77, "up_blocks.0.attentions.0.transformer_blocks.5.attn1"),
}


def conditions(name: str, tokens: int) -> tuple[Cond, dict[str, Any]]:
    """Return the same conditions as a `Cond` and as arguments of the peer."""
    config, generator = UNETS[name], torch.Generator().manual_seed(2)
    assert config.context_dim is not None
    context = torch.randn(2, tokens, config.context_dim, generator=generator)
    if config.classes:
        levels = torch.tensor([20, 349])
        return Cond(context=context, pooled=levels), {
            "encoder_hidden_states": context,
            "class_labels": levels,
        }
    if config.pooled_dim:
        text, sizes = (
            torch.randn(2, 1280, generator=generator),
            torch.tensor([[1024.0, 768, 0, 16, 1024, 1024], [512, 512, 8, 0, 768, 1344]]),
        )
        pooled = vector_condition(text, sizes)
        return Cond(context=context, pooled=pooled), {
            "encoder_hidden_states": context,
            "added_cond_kwargs": {"text_embeds": text, "time_ids": sizes},
        }
    return Cond(context=context), {"encoder_hidden_states": context}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNET_PEERS)
def test_unets_equal_the_peers(name: str) -> None:
    peer, tokens, attention = UNET_PEERS[name]
    config = UNETS[name]
    cond, theirs_cond = conditions(name, tokens)
    x = torch.randn(2, config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1.0, 981.0])
    with twins(lambda: UNet2DConditionModel(**peer), lambda: UNet(config)) as (theirs, ours):
        expected = theirs(x, t, **theirs_cond).sample
        # the additional channels of inpainting and upscaling models are in Cond.concat
        extra = config.in_channels - 4
        given = cond if extra == 0 else Cond(**dict(cond.items()), concat=x[:, 4:])
        assert error(ours(x[:, :4], t, given), expected) < TOLERANCE
        rotate_qkv(ours, attention)
        assert error(ours(x[:, :4], t, given), expected) > VISIBLE


@pytest.mark.slow
def test_an_unconditional_unet_equals_the_peers() -> None:
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 981.0])
    with twins(lambda: UNet2DModel(**CELEBA), lambda: UNet(UNETS["celebahq"])) as (theirs, ours):
        expected = theirs(x, t).sample
        assert error(ours(x, t, Cond()), expected) < TOLERANCE
        rotate_qkv(ours, "down_blocks.1.attentions.0")
        assert error(ours(x, t, Cond()), expected) > VISIBLE


@pytest.mark.slow
def test_kl_f8_equals_the_peers() -> None:
    config = VAES["kl-f8"]

    def peer() -> AutoencoderKL:
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )

    generator = torch.Generator().manual_seed(1)
    x, z = torch.rand(1, 3, 64, 48, generator=generator) * 2 - 1, torch.randn(1, 4, 6, 8, generator=generator)
    with twins(peer, lambda: ldm.models.vae.AutoencoderKL(config)) as (theirs, ours):
        posterior, images = theirs.encode(x).latent_dist, theirs.decode(z).sample
        assert error(ours.encode(x).mean, posterior.mean) < TOLERANCE
        assert error(ours.encode(x).logvar, posterior.logvar) < TOLERANCE
        assert error(ours.decode(z), images) < TOLERANCE
        rotate_qkv(ours, "encoder.mid_block.attentions.0")
        rotate_qkv(ours, "decoder.mid_block.attentions.0")
        assert error(ours.encode(x).mean, posterior.mean) > VISIBLE
        assert error(ours.decode(z), images) > VISIBLE


def test_vq_f4_equals_the_peers() -> None:
    config = VAES["vq-f4"]

    def peer() -> VQModel:
        return VQModel(
            block_out_channels=(128, 256, 512),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            latent_channels=3,
            num_vq_embeddings=8192,
        )

    generator = torch.Generator().manual_seed(1)
    x, z = (
        torch.rand(1, 3, 64, 48, generator=generator) * 2 - 1,
        torch.randn(1, 3, 12, 16, generator=generator),
    )
    with twins(peer, lambda: ldm.models.vq.VQModel(config)) as (theirs, ours):
        latents, images = theirs.encode(x).latents, theirs.decode(z).sample
        assert error(ours.encode(x).mean, latents) < TOLERANCE
        assert error(ours.decode(z), images) < TOLERANCE
        rotate_qkv(ours, "encoder.mid_block.attentions.0")
        rotate_qkv(ours, "decoder.mid_block.attentions.0")
        assert error(ours.encode(x).mean, latents) > VISIBLE
        assert error(ours.decode(z), images) > VISIBLE


@pytest.mark.slow
def test_the_text_encoder_of_text2img_large_equals_the_peers() -> None:
    module = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")

    def peer() -> torch.nn.Module:
        network = module.LDMBertModel(module.LDMBertConfig())
        del network.to_logits  # unused
        return network

    ids = torch.randint(0, 30522, (2, 77), generator=torch.Generator().manual_seed(1))
    with twins(peer, lambda: LDMBert(BERTS["text2img-large"])) as (theirs, ours):
        expected = theirs.model(ids, position_ids=torch.arange(77)[None])[0]
        assert error(ours(ids), expected) < TOLERANCE
        rotate_qkv(ours, "model.layers.3.self_attn")
        assert error(ours(ids), expected) > VISIBLE
