"""Variants of the UNet: parity of small networks, conditions, and errors."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from shared_weights import TOLERANCE, VISIBLE, error, rotate_qkv, twins

from ldm.diffusion.cond import Cond
from ldm.models.layers.embeddings import guidance_sinusoid, sinusoid, vector_condition
from ldm.models.unet import UNet, UNetConfig

CROSS = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
OURS = {"channels": (32, 64, 64), "depth": (0, 1, 1), "heads": 4, "context_dim": 24}
TEXT, VECTOR, SIZES = (
    torch.randn(2, 7, 24),
    torch.randn(2, 20),
    torch.tensor([[64.0, 48, 0, 3, 64, 64], [32, 32, 1, 0, 40, 56]]),
)


def compare(peer, config: dict, cond: Cond, swapped: str, **theirs_cond) -> None:
    """Check that outputs equal the peer's, and that permuted q, k and v and other conditions change them."""
    x, t = (
        torch.randn(2, config.get("in_channels", 4), 16, 24, generator=torch.Generator().manual_seed(1)),
        torch.tensor([1.0, 981.0]),
    )
    with twins(peer, lambda: UNet(UNetConfig(**config))) as (theirs, ours):
        expected = theirs(x, t, **theirs_cond).sample
        assert error(ours(x, t, cond), expected) < TOLERANCE
        for name, value in cond.items():
            other = Cond(
                **{**dict(cond.items()), name: value.flip(0) if name != "context" else value.flip(-1)}
            )
            assert error(ours(x, t, other), expected) > VISIBLE, name
        rotate_qkv(ours, swapped)
        assert error(ours(x, t, cond), expected) > VISIBLE


@pytest.mark.parametrize("resnet", [False, True])
def test_self_attention_alone(resnet):
    """The UNet of celebahq; with sizes changed in residual blocks, that of inpainting_big."""
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnet else ("DownBlock2D", "UpBlock2D")
    how = "resnet" if resnet else "conv"

    def peer() -> UNet2DModel:
        return UNet2DModel(
            in_channels=4,
            out_channels=3,
            block_out_channels=(32, 64, 64),
            down_block_types=(plain[0], "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", plain[1]),
            attention_head_dim=16,
            downsample_type=how,
            upsample_type=how,
        )

    ours = dict(
        OURS,
        out_channels=3,
        heads=None,
        head_dim=16,
        context_dim=None,
        attention="block",
        resample="resblock" if resnet else None,
    )
    compare(peer, ours, Cond(), "down_blocks.1.attentions.0")


def test_attention_blocks_with_a_context_and_scale_and_shift():
    """The UNet of Karlo's decoder, with three blocks per level."""
    types = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D")

    def peer() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            **CROSS
            | {
                "down_block_types": types,
                "up_block_types": tuple(name.replace("Down", "Up") for name in types[::-1]),
                "attention_head_dim": 16,
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                "resnet_time_scale_shift": "scale_shift",
                "layers_per_block": 3,
            }
        )

    ours = dict(
        OURS, heads=None, head_dim=16, attention="block", resample="resblock", scale_shift=True, blocks=3
    )
    compare(peer, ours, Cond(context=TEXT), "mid_block.attentions.0", encoder_hidden_states=TEXT)


def test_levels_without_self_attention_and_a_level_of_noise():
    """The UNet of the x4 upscaler."""
    levels = torch.tensor([20, 349])
    peer = CROSS | {
        "only_cross_attention": (True, True, False),
        "num_class_embeds": 400,
        "use_linear_projection": True,
    }
    ours = dict(OURS, only_cross=(True, True, False), classes=400, linear_projection=True)
    cond = Cond(context=TEXT, pooled=levels)
    at = "down_blocks.2.attentions.0.transformer_blocks.0.attn1"
    compare(
        lambda: UNet2DConditionModel(**peer), ours, cond, at, encoder_hidden_states=TEXT, class_labels=levels
    )


def test_a_vector_and_depths_that_differ():
    """The UNet of SDXL: pooled text and six numbers, and a different depth at every level."""
    extra = {
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 68,
    }
    cond = Cond(context=TEXT, pooled=vector_condition(VECTOR, SIZES, dim=8))
    ours = dict(OURS, depth=(0, 2, 3), mid_depth=3, linear_projection=True, pooled_dim=68)
    given = {"text_embeds": VECTOR, "time_ids": SIZES}
    at = "mid_block.attentions.0.transformer_blocks.2.attn1"
    compare(
        lambda: UNet2DConditionModel(**CROSS | extra),
        ours,
        cond,
        at,
        encoder_hidden_states=TEXT,
        added_cond_kwargs=given,
    )


def test_a_vector_under_the_name_of_a_class():
    """The UNet of Stable unCLIP."""
    extra = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20}
    at = "mid_block.attentions.0.transformer_blocks.0.attn1"
    cond = Cond(context=TEXT, pooled=VECTOR)
    compare(
        lambda: UNet2DConditionModel(**CROSS | extra),
        dict(OURS, class_dim=20),
        cond,
        at,
        encoder_hidden_states=TEXT,
        class_labels=VECTOR,
    )


def test_an_embedded_guidance_scale():
    """The UNet of latent consistency models; the peer takes the scale minus one."""
    module = pytest.importorskip(
        "diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img"
    )
    scale = torch.tensor([8.5, 1.0])
    theirs = module.LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, scale - 1, embedding_dim=256
    )
    # a few roundings of arguments up to 7500 rad in float32, where half an ulp is 2.4e-4 rad
    assert torch.allclose(guidance_sinusoid(scale), theirs, atol=2e-3)
    at = "mid_block.attentions.0.transformer_blocks.0.attn1"
    cond = Cond(context=TEXT, guidance=scale)
    peer = CROSS | {"time_cond_proj_dim": 256}
    compare(
        lambda: UNet2DConditionModel(**peer),
        dict(OURS, guidance_dim=256),
        cond,
        at,
        encoder_hidden_states=TEXT,
        timestep_cond=guidance_sinusoid(scale),
    )


def test_no_guidance_is_the_embedding_of_zero():
    assert torch.equal(guidance_sinusoid(torch.tensor([1.0]), 8), torch.tensor([[0.0, 0, 0, 0, 1, 1, 1, 1]]))
    # w = 0.001: the first frequency is 1, the last one 1/10000
    rows = guidance_sinusoid(torch.tensor([1.001]), 8)
    assert torch.allclose(
        rows[0, [0, 3]], torch.tensor([1.0, 1e-4]).sin(), rtol=1e-2
    )  # 1.001 − 1 in float32 has 4 digits


def test_the_vector_condition_is_text_then_numbers_in_order():
    vector = vector_condition(VECTOR, SIZES, dim=8)
    assert vector.shape == (2, 20 + 6 * 8) and torch.equal(vector[:, :20], VECTOR)
    for i in range(6):
        assert torch.equal(vector[:, 20 + 8 * i : 28 + 8 * i], sinusoid(SIZES[:, i], 8))
    with pytest.raises(ValueError, match=r"expected shape \(B, K\) with B = 2"):
        vector_condition(VECTOR, SIZES[:1])


@torch.no_grad()
def test_attention_blocks_exclude_masked_tokens():
    torch.manual_seed(0)
    net = UNet(
        UNetConfig(channels=(16, 32), depth=(1, 1), blocks=1, heads=2, context_dim=8, attention="block")
    )
    x, t, context = torch.randn(2, 4, 8, 8), torch.full((2,), 10.0), torch.randn(2, 5, 8)
    padded = torch.cat([context, torch.randn(2, 3, 8)], dim=1)
    mask = (torch.arange(8) < 5).expand(2, 8)
    assert torch.allclose(
        net(x, t, Cond(context=padded, context_mask=mask)), net(x, t, Cond(context=context)), atol=1e-5
    )
    assert not torch.allclose(net(x, t, Cond(context=padded)), net(x, t, Cond(context=context)), atol=1e-4)


def test_missing_and_unused_conditions_are_refused():
    x, t, context = torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 2, 8)
    small = {"channels": (8, 16), "depth": (0, 1), "blocks": 1, "heads": 2, "context_dim": 8}
    plain, classes = UNet(UNetConfig(**small)), UNet(UNetConfig(**small, classes=10))
    for name, value in (("pooled", torch.zeros(1, 8)), ("guidance", torch.ones(1))):
        with pytest.raises(ValueError, match=rf"takes no Cond\.{name}"):
            plain(x, t, Cond(context=context, **{name: value}))
    alone = UNet(UNetConfig(**small | {"context_dim": None}, attention="block", resample="resblock"))
    with pytest.raises(ValueError, match=r"takes no Cond\.context"):
        alone(x, t, Cond(context=context))
    with pytest.raises(ValueError, match="size 7×8: .* multiples of 2"):
        alone(x[:, :, :7], t, Cond())
    with pytest.raises(ValueError, match=r"one of 10 classes: Cond\.pooled is None"):
        classes(x, t, Cond(context=context))
    with pytest.raises(ValueError, match=r"expected integers of shape \(B,\), got torch\.float32"):
        classes(x, t, Cond(context=context, pooled=torch.ones(1)))
    with pytest.raises(ValueError, match=r"expected classes from 0 to 9, got \[10\]"):
        classes(x, t, Cond(context=context, pooled=torch.tensor([10])))
    with pytest.raises(ValueError, match=r"Cond\.guidance is None"):
        UNet(UNetConfig(**small, guidance_dim=8))(x, t, Cond(context=context))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"context_dim": None}, "context_dim"),
        ({"attention": "block", "depth": (2, 1, 1, 0)}, "do not stack"),
        ({"attention": "blocks"}, "attention: expected None or"),
        ({"resample": "conv"}, "resample: expected None or"),
        ({"only_cross": (True,)}, "only_cross: expected 4"),
        ({"only_cross": (True,) * 4, "attention": "block"}, "only_cross"),
        ({"pooled_dim": 8, "classes": 10}, "one of pooled_dim, class_dim, classes and embedded"),
        ({"heads": None, "head_dim": 48}, "level 0: 320 channels cannot be split into 6 heads of 48"),
    ],
)
def test_invalid_configurations_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**wrong)
