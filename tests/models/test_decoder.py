"""unCLIP decoders, upsamplers and MoVQ: published counts and keys, and parity of small networks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from shared_weights import TOLERANCE, VISIBLE, error, fill, rotate_qkv, twins

from ldm.catalog.shapes import DECODERS, KANDINSKY21, KANDINSKY22, MOVQ, UPSAMPLERS
from ldm.diffusion.cond import Cond
from ldm.models.movq import MoVQ, MoVQConfig
from ldm.models.unclip.decoder import Decoder, DecoderConfig, ImageCondition, ImageConditionConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.weights.keymap import file_shapes, from_file, to_file
from ldm.weights.parts import build_network, part_table, shapes_of
from ldm.weights.rules.decoder import decoder_table
from ldm.weights.rules.vae import vae_table

COUNTS = {
    "karlo": (893_318_086, 595),
    "kandinsky21": (1_228_661_768, 594),
    "kandinsky21-inpaint": (1_228_679_048, 594),
    "kandinsky22": (1_253_057_288, None),
    "kandinsky22-inpaint": (1_253_074_568, None),
}
TYPES = (
    "ResnetDownsampleBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "SimpleCrossAttnDownBlock2D",
)
FULL = {
    "down_block_types": TYPES,
    "up_block_types": tuple(name.replace("Down", "Up") for name in TYPES[::-1]),
    "layers_per_block": 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
}
KANDINSKY = FULL | {
    "in_channels": 4,
    "out_channels": 8,
    "block_out_channels": (384, 768, 1152, 1536),
    "cross_attention_dim": 768,
}
TEXT_IMAGE = {
    "encoder_hid_dim": 1024,
    "encoder_hid_dim_type": "text_image_proj",
    "addition_embed_type": "text_image",
    "addition_embed_type_num_heads": 64,
}
IMAGE = {
    "encoder_hid_dim": 1280,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
    "addition_embed_type_num_heads": 64,
}


def peers(name: str) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of diffusers' classes at full size, Karlo's with a prefix per folder."""
    with torch.device("meta"):
        if name == "karlo":
            unet = UNet2DConditionModel(
                **FULL,
                in_channels=3,
                out_channels=6,
                block_out_channels=(320, 640, 960, 1280),
                cross_attention_dim=1536,
                class_embed_type="identity",
            )
            return {f"decoder.{k}": v for k, v in shapes_of(unet).items()} | {
                f"text_proj.{k}": v
                for k, v in shapes_of(
                    UnCLIPTextProjModel(time_embed_dim=1280, cross_attention_dim=1536)
                ).items()
            }
        extra = TEXT_IMAGE if name.startswith("kandinsky21") else IMAGE
        return shapes_of(
            UNet2DConditionModel(**KANDINSKY | extra | {"in_channels": 9 if name.endswith("inpaint") else 4})
        )


def test_every_shape_is_counted():
    assert DECODERS.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_have_the_published_parameters_and_keys(name):
    config, (parameters, keys) = DECODERS[name], COUNTS[name]
    network = build_network(config)
    native = shapes_of(network)
    assert sum(map(math.prod, native.values())) == parameters
    assert file_shapes(decoder_table(config, native, "diffusers"), native) == peers(name)
    if keys is None:
        with pytest.raises(ValueError, match="the only layout of Kandinsky 2.2"):
            decoder_table(config, native)
        return
    original = file_shapes(decoder_table(config, native), native)
    assert len(original) == keys and sum(map(math.prod, original.values())) == parameters
    for key, shape in ORIGINAL[name.removesuffix("-inpaint")].items():
        assert original.pop(f"{key}.weight" if key != "cf_param" else key) == shape
        assert key == "cf_param" or original.pop(f"{key}.bias") == shape[:1]
    assert all(
        key.startswith(("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out."))
        for key in original
    )


# the keys of the projections in the original formats; those of the UNet are tested with its rules
ORIGINAL = {
    "karlo": {
        "cf_param": (768,),
        "clip_emb": (1280, 768),
        "text_feat_proj": (1280, 768),
        "clip_tok_proj": (6144, 768),
        "text_seq_proj.0": (1536, 768),
        "text_seq_proj.1": (1536,),
    },
    "kandinsky21": {
        "to_model_dim_n": (768, 1024),
        "clip_to_seq": (7680, 768),
        "proj_n": (1536, 768),
        "ln_model_n": (1536,),
        "img_layer": (1536, 768),
    },
}


def test_upsampler_and_movq_have_the_published_parameters_and_keys():
    sr = build_network(UPSAMPLERS["karlo-sr"])
    assert sum(p.numel() for p in sr.parameters()) == 691_579_523
    assert len(file_shapes(part_table(sr, "original", ()), shapes_of(sr))) == 408
    with torch.device("meta"):
        theirs = UNet2DModel(
            in_channels=6,
            out_channels=3,
            block_out_channels=(320, 640, 960, 1280),
            layers_per_block=3,
            add_attention=False,
            down_block_types=("ResnetDownsampleBlock2D",) * 4,
            up_block_types=("ResnetUpsampleBlock2D",) * 4,
        )
        movq = VQModel(
            block_out_channels=(128, 256, 256, 512),
            layers_per_block=2,
            latent_channels=4,
            num_vq_embeddings=16384,
            norm_type="spatial",
            down_block_types=(*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3),
        )
    assert shapes_of(sr) == shapes_of(theirs)
    ours = shapes_of(build_network(MOVQ))
    assert ours == shapes_of(movq)
    assert sum(map(math.prod, ours.values())) == 67_832_495
    original = file_shapes(vae_table(ours), ours)
    assert len(original) == 431 and original["decoder.mid.attn_1.norm.conv_y.weight"] == (512, 4, 1, 1)
    assert original["decoder.norm_out.norm_layer.weight"] == (128,) and original[
        "encoder.norm_out.weight"
    ] == (512,)


SMALL_UNET = UNetConfig(
    in_channels=3,
    out_channels=6,
    channels=(32, 64),
    depth=(0, 1),
    blocks=1,
    heads=None,
    head_dim=16,
    context_dim=40,
    attention="block",
    resample="resblock",
    scale_shift=True,
    embedded=True,
)
SMALL_PEER = FULL | {
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (32, 64),
    "down_block_types": TYPES[:2],
    "layers_per_block": 1,
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_dim": 40,
    "attention_head_dim": 16,
}
SMALL = DecoderConfig(
    unet=SMALL_UNET, condition=ImageConditionConfig(embed_dim=24, text_dim=24, pooled_dim=24)
)
G = torch.Generator().manual_seed(2)
COND = Cond(
    context=torch.randn(2, 7, 24, generator=G),
    context_mask=torch.arange(7) < torch.tensor([[7], [3]]),
    pooled=torch.randn(2, 24, generator=G),
    image_emb=torch.randn(2, 24, generator=G),
)
X, T = torch.randn(2, 3, 16, 8, generator=G), torch.tensor([3.0, 977.0])


def karlo_twins() -> tuple[UNet2DConditionModel, UnCLIPTextProjModel, Decoder]:
    """Return diffusers' two networks, and ours with the same weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SMALL_PEER, class_embed_type="identity")
        project = UnCLIPTextProjModel(time_embed_dim=128, cross_attention_dim=40, clip_embeddings_dim=24)
    fill(unet), fill(project)
    ours = Decoder(SMALL).eval()
    state = {f"decoder.{k}": v for k, v in unet.state_dict().items()} | {
        f"text_proj.{k}": v for k, v in project.state_dict().items()
    }
    ours.load_state_dict(
        from_file(decoder_table(SMALL, shapes_of(ours), "diffusers"), state, shapes_of(ours), source="peer")
    )
    return unet, project, ours


@torch.inference_mode()
def test_karlos_decoder_equals_the_peers_and_its_token_axis_matters():
    unet, project, ours = karlo_twins()
    context, vector = project(
        image_embeddings=COND.image_emb,
        prompt_embeds=COND.pooled,
        text_encoder_hidden_states=COND.context,
        do_classifier_free_guidance=False,
    )
    mask = torch.nn.functional.pad(COND.context_mask, (4, 0), value=True)
    expected = unet(X, T, encoder_hidden_states=context, class_labels=vector, attention_mask=mask).sample
    assert error(ours(X, T, COND), expected) < TOLERANCE
    for name, value in COND.items():
        other = replace(COND, **{name: value.flip(0) if name != "context_mask" else torch.ones_like(value)})
        assert error(ours(X, T, other), expected) > VISIBLE, name
    transposed = Decoder(replace(SMALL, condition=replace(SMALL.condition, interleaved=False))).eval()
    transposed.load_state_dict(ours.state_dict())
    assert error(transposed(X, T, COND), expected) > VISIBLE  # consecutive instead of interleaved tokens
    assert torch.equal(ours.condition.nothing()[0], project.learned_classifier_free_guidance_embeddings)
    # conversion to Karlo's layout and back is bit-identical
    native = shapes_of(ours)
    there = to_file(decoder_table(SMALL, native), ours.state_dict())
    back = from_file(decoder_table(SMALL, native), there, native, source="x")
    assert all(torch.equal(back[key], value) for key, value in ours.state_dict().items())
    rotate_qkv(ours, "unet.mid_block.attentions.0")
    assert error(ours(X, T, COND), expected) > VISIBLE


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@torch.inference_mode()
def test_kandinskys_decoders_equal_the_peers(version):
    first = version == "2.1"
    full = KANDINSKY21 if first else KANDINSKY22
    extra = (TEXT_IMAGE if first else IMAGE) | {
        "encoder_hid_dim": 20 if first else 24,
        "cross_attention_dim": 768 if first else 40,
    }
    with torch.device("meta"):
        # in the peer, the image embedding and the pooled text of 2.1 are as wide as the context
        theirs = UNet2DConditionModel(**SMALL_PEER | extra)
    fill(theirs)
    embed = 768 if first else 24
    config = DecoderConfig(
        unet=replace(SMALL_UNET, context_dim=extra["cross_attention_dim"]),
        condition=replace(
            full.condition, embed_dim=embed, text_dim=20 if first else None, pooled_dim=768 if first else None
        ),
    )
    ours = Decoder(config).eval()
    ours.load_state_dict(
        from_file(
            decoder_table(config, shapes_of(ours), "diffusers"),
            theirs.state_dict(),
            shapes_of(ours),
            source="peer",
        )
    )
    image = torch.randn(2, embed, generator=G)
    cond = Cond(image_emb=image)
    given = {"image_embeds": image}
    if first:
        cond = replace(
            cond, context=torch.randn(2, 7, 20, generator=G), pooled=torch.randn(2, 768, generator=G)
        )
        given["text_embeds"] = cond.pooled
    expected = theirs(X, T, encoder_hidden_states=cond.context, added_cond_kwargs=given).sample
    assert error(ours(X, T, cond), expected) < TOLERANCE
    for name, value in cond.items():
        assert error(ours(X, T, replace(cond, **{name: value.flip(0)})), expected) > VISIBLE, name
    with pytest.raises(ValueError, match="no learned embedding for no image"):
        ours.condition.nothing()


@torch.inference_mode()
def test_a_small_upsampler_equals_the_peers():
    def peer() -> UNet2DModel:
        return UNet2DModel(
            in_channels=6,
            out_channels=3,
            block_out_channels=(32, 64),
            layers_per_block=2,
            add_attention=False,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
        )

    config = replace(UPSAMPLERS["karlo-sr"], channels=(32, 64), depth=(0, 0), blocks=2)
    low = torch.randn(2, 3, 16, 8, generator=G)
    with twins(peer, lambda: UNet(config)) as (theirs, ours):
        expected = theirs(torch.cat([X, low], 1), T).sample
        assert error(ours(X, T, Cond(concat=low)), expected) < TOLERANCE
        assert error(ours(low, T, Cond(concat=X)), expected) > VISIBLE


@torch.inference_mode()
def test_movq_equals_the_peers_and_decodes_without_quantization():
    config = MoVQConfig(channels=(32, 64), blocks=1, latent_channels=4, attention_levels=(1,), codes=50)

    def peer() -> VQModel:
        return VQModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            latent_channels=4,
            num_vq_embeddings=50,
            norm_type="spatial",
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        )

    x, z = torch.randn(1, 3, 16, 24, generator=G), torch.randn(1, 4, 8, 12, generator=G)
    with twins(peer, lambda: MoVQ(config)) as (theirs, ours):
        assert error(ours.encode(x).mode(), theirs.encode(x).latents) < TOLERANCE
        expected = theirs.decode(z, force_not_quantize=True).sample
        assert error(ours.decode(z), expected) < TOLERANCE
        quantised = theirs.decode(z).sample
        assert (
            error(ours.decode_indices(ours.indices(z)), quantised) < TOLERANCE
            and error(quantised, expected) > VISIBLE
        )
        other = ours.decoder(ours.post_quant_conv(z), z.flip(-1))  # with a mirrored latent in the norms
        assert error(other, expected) > VISIBLE


def test_conditions_that_do_not_fit_are_named():
    net = ImageCondition(SMALL.condition, emb_dim=16, context_dim=8)
    with pytest.raises(ValueError, match="Cond.image_emb: this decoder takes width 24, got width 25"):
        net(replace(COND, image_emb=torch.zeros(2, 25)))
    with pytest.raises(ValueError, match="Cond.pooled: this decoder takes width 24, got none"):
        net(replace(COND, pooled=None))
    with pytest.raises(ValueError, match="norms: 'text' of a decoder that reads none"):
        ImageConditionConfig(text_dim=None)
    with pytest.raises(ValueError, match="embedded=True"):
        DecoderConfig(unet=UNetConfig())
    with pytest.raises(ValueError, match="takes a pooled condition of width 128"):
        UNet(SMALL_UNET)(X, T, Cond(context=torch.zeros(2, 3, 40)))
