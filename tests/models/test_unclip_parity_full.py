"""Parity of unCLIP's full-size networks with the peers', with random weights, in float32.

All tests are slow and take up to 5 GB: `python -m pytest tests/models/test_unclip_parity_full.py -m slow`.
A network shares its weights with its peer. Inputs are small, because the tests compare parameters, not
images.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from shared_weights import TOLERANCE, VISIBLE, error, fill, rotate_qkv, twins
from test_decoder import FULL, IMAGE, KANDINSKY
from test_parity_full import SD2
from torch import nn

from ldm.catalog.shapes import DECODERS, MOVQ, PRIORS, UNETS, UPSAMPLERS
from ldm.diffusion.cond import Cond
from ldm.models.movq import MoVQ
from ldm.models.unet import UNet
from ldm.weights.keymap import Table, from_file
from ldm.weights.parts import build_network, part_table, shapes_of

pytestmark = pytest.mark.slow
G = torch.Generator().manual_seed(1)
T = torch.tensor([1.0, 981.0])


@contextmanager
def renamed(
    peers: dict[str, Callable[[], nn.Module]], config: Any
) -> Iterator[tuple[list[nn.Module], nn.Module]]:
    """Yield peers, and our network with the same random weights, converted by the rules.

    Args:
        peers: Constructors of the peers by the prefix of their keys.
        config: Configuration of our network.
    """
    with torch.device("meta"):
        theirs = {prefix: make() for prefix, make in peers.items()}
    state = {}
    for prefix, module in theirs.items():
        state |= {f"{prefix}{key}": value for key, value in fill(module).state_dict().items()}
    ours = build_network(config)
    table: Table = part_table(ours, "diffusers", ())
    ours.load_state_dict(from_file(table, state, shapes_of(ours), source="peer"), assign=True)
    try:
        with torch.inference_mode():
            yield list(theirs.values()), ours.eval()
    finally:
        for module in (*theirs.values(), ours):
            module.to("meta")
        state.clear()
        gc.collect()


def test_karlos_prior() -> None:
    with renamed({"": PriorTransformer}, PRIORS["karlo"]) as ((theirs,), ours):
        causal = torch.full((81, 81), -10000.0).triu(1)[None]
        # `fill` allocates the buffer without setting it
        theirs.register_buffer("causal_attention_mask", causal, persistent=False)
        mask = torch.arange(77) < torch.tensor([[77], [9]])
        cond = Cond(
            context=torch.randn(2, 77, 768, generator=G),
            context_mask=mask,
            pooled=torch.randn(2, 768, generator=G),
        )
        x = torch.randn(2, 768, generator=G)
        expected = theirs(x, T, cond.pooled, cond.context, cond.context_mask).predicted_image_embedding
        assert error(ours(x, T, cond), expected) < TOLERANCE
        rotate_qkv(ours, "transformer.blocks.3.attn1")
        assert error(ours(x, T, cond), expected) > VISIBLE


def test_karlos_decoder() -> None:
    peers = {
        "decoder.": lambda: UNet2DConditionModel(
            **FULL,
            in_channels=3,
            out_channels=6,
            block_out_channels=(320, 640, 960, 1280),
            cross_attention_dim=1536,
            class_embed_type="identity",
        ),
        "text_proj.": lambda: UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536),
    }
    mask = torch.arange(77) < torch.tensor([[77], [9]])
    cond = Cond(
        context=torch.randn(2, 77, 768, generator=G),
        context_mask=mask,
        pooled=torch.randn(2, 768, generator=G),
        image_emb=torch.randn(2, 768, generator=G),
    )
    x = torch.randn(2, 3, 16, 16, generator=G)
    with renamed(peers, DECODERS["karlo"]) as ((unet, project), ours):
        context, vector = project(
            image_embeddings=cond.image_emb,
            prompt_embeds=cond.pooled,
            text_encoder_hidden_states=cond.context,
            do_classifier_free_guidance=False,
        )
        mask = torch.nn.functional.pad(mask, (4, 0), value=True)
        expected = unet(x, T, encoder_hidden_states=context, class_labels=vector, attention_mask=mask).sample
        assert error(ours(x, T, cond), expected) < TOLERANCE
        ours.condition.config = replace(
            ours.condition.config, interleaved=False
        )  # with a transposed token axis
        assert error(ours(x, T, cond), expected) > VISIBLE


def test_karlos_upsampler() -> None:
    def peer() -> UNet2DModel:
        return UNet2DModel(
            in_channels=6,
            out_channels=3,
            block_out_channels=(320, 640, 960, 1280),
            layers_per_block=3,
            add_attention=False,
            down_block_types=("ResnetDownsampleBlock2D",) * 4,
            up_block_types=("ResnetUpsampleBlock2D",) * 4,
        )

    x, low = torch.randn(2, 3, 16, 16, generator=G), torch.randn(2, 3, 16, 16, generator=G)
    with twins(peer, lambda: UNet(UPSAMPLERS["karlo-sr"])) as (theirs, ours):
        expected = theirs(torch.cat([x, low], 1), T).sample
        assert error(ours(x, T, Cond(concat=low)), expected) < TOLERANCE
        assert error(ours(low, T, Cond(concat=x)), expected) > VISIBLE


def test_stable_unclip_h() -> None:
    extra = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}
    cond = Cond(context=torch.randn(2, 77, 1024, generator=G), pooled=torch.randn(2, 2048, generator=G))
    x = torch.randn(2, 4, 16, 16, generator=G)
    with twins(lambda: UNet2DConditionModel(**SD2 | extra), lambda: UNet(UNETS["unclip-h"])) as (
        theirs,
        ours,
    ):
        expected = theirs(x, T, encoder_hidden_states=cond.context, class_labels=cond.pooled).sample
        assert error(ours(x, T, cond), expected) < TOLERANCE
        rotate_qkv(ours, "mid_block.attentions.0.transformer_blocks.0.attn1")
        assert error(ours(x, T, cond), expected) > VISIBLE


def test_kandinsky_22() -> None:
    image, x = torch.randn(2, 1280, generator=G), torch.randn(2, 4, 16, 16, generator=G)
    with renamed({"": lambda: UNet2DConditionModel(**KANDINSKY | IMAGE)}, DECODERS["kandinsky22"]) as (
        (theirs,),
        ours,
    ):
        expected = theirs(x, T, encoder_hidden_states=None, added_cond_kwargs={"image_embeds": image}).sample
        assert error(ours(x, T, Cond(image_emb=image)), expected) < TOLERANCE
        rotate_qkv(ours, "unet.mid_block.attentions.0")
        assert error(ours(x, T, Cond(image_emb=image)), expected) > VISIBLE


def test_movq() -> None:
    def peer() -> VQModel:
        return VQModel(
            block_out_channels=(128, 256, 256, 512),
            layers_per_block=2,
            latent_channels=4,
            num_vq_embeddings=16384,
            norm_type="spatial",
            down_block_types=(*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3),
        )

    x, z = torch.rand(1, 3, 64, 48, generator=G) * 2 - 1, torch.randn(1, 4, 8, 6, generator=G)
    with twins(peer, lambda: MoVQ(MOVQ)) as (theirs, ours):
        assert error(ours.encode(x).mean, theirs.encode(x).latents) < TOLERANCE
        expected = theirs.decode(z, force_not_quantize=True).sample
        assert error(ours.decode(z), expected) < TOLERANCE
        rotate_qkv(ours, "decoder.mid_block.attentions.0")
        assert error(ours.decode(z), expected) > VISIBLE
