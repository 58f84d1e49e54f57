"""Rule tables and original layouts: all keys at full size, exact round trips, outputs of fused q, k, v."""

from __future__ import annotations

import math
from dataclasses import replace

import original_keys
import pytest
import torch
from original_keys import UNETS, VAES, UNetSpec, VAESpec

from ldm.weights.keymap import Shape, Table, file_shapes, fit_table, from_file, to_file
from ldm.weights.rules.bert import bert_table
from ldm.weights.rules.unet import unet_table
from ldm.weights.rules.vae import DIFFUSERS, vae_table


def shapes_of(module: torch.nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def peer_unet(spec: UNetSpec, kind: str) -> dict[str, Shape]:
    """Return the names and shapes of the same network in diffusers."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    levels = range(len(spec.mult))
    attends = [2**level in spec.attend for level in levels]
    down = "ResnetDownsampleBlock2D" if spec.updown else "DownBlock2D"
    common = {
        "in_channels": spec.io[0],
        "out_channels": spec.io[1],
        "layers_per_block": spec.n,
        "block_out_channels": [m * spec.ch for m in spec.mult],
        "resnet_time_scale_shift": "scale_shift" if spec.scale_shift else "default",
    }
    if kind == "plain":
        types = ["AttnDownBlock2D" if a else down for a in attends]
        common["resnet_time_scale_shift"] = (
            "default"  # with scale_shift the peer's middle attention gets another norm: widened below
        )
        resample = "resnet" if spec.updown else "conv"
        with torch.device("meta"):
            found = shapes_of(
                UNet2DModel(
                    **common,
                    down_block_types=types,
                    up_block_types=[t.replace("Down", "Up") for t in types[::-1]],
                    add_attention=spec.mid,
                    attention_head_dim=32,
                    downsample_type=resample,
                    upsample_type=resample,
                )
            )
        wide = {
            name: (2 * shape[0], *shape[1:])
            for name, shape in found.items()
            if ".time_emb_proj." in name and spec.scale_shift
        }
        return found | wide
    types = [
        ("SimpleCrossAttnDownBlock2D" if kind == "karlo" else "CrossAttnDownBlock2D") if a else down
        for a in attends
    ]
    depth = [spec.depth] * len(levels) if isinstance(spec.depth, int) else [max(d, 1) for d in spec.depth]
    extra: dict[str, object] = {
        "xl": {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": spec.adm,
        },
        "unclip": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": spec.adm},
        "karlo": {"class_embed_type": "identity", "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        "cond": {"num_class_embeds": spec.classes},
    }[kind]  # type: ignore[assignment]
    with torch.device("meta"):
        return shapes_of(
            UNet2DConditionModel(
                **common,
                **extra,
                down_block_types=types,
                up_block_types=[t.replace("Down", "Up") for t in types[::-1]],
                cross_attention_dim=spec.kv or spec.context,
                transformer_layers_per_block=depth,
                use_linear_projection=spec.linear,
                attention_head_dim=64 if kind == "karlo" else 8,
                only_cross_attention=list(spec.cross_only) or False,
            )
        )


def peer_vae(spec: VAESpec) -> dict[str, Shape]:
    from diffusers import AutoencoderKL, VQModel

    attends = [256 >> i in spec.attend for i in range(len(spec.mult))]
    common = {
        "block_out_channels": [m * spec.ch for m in spec.mult],
        "layers_per_block": 2,
        "latent_channels": spec.z,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in attends[::-1]],
    }
    with torch.device("meta"):
        if spec.codes:
            return shapes_of(
                VQModel(**common, num_vq_embeddings=spec.codes, mid_block_add_attention=spec.mid)
            )
        return shapes_of(AutoencoderKL(**common))


def small_unet(spec: UNetSpec) -> UNetSpec:
    return replace(
        spec,
        ch=64 if spec.kv else 32,
        context=spec.context and 24,
        kv=spec.kv and 24,
        adm=spec.adm and 40,
        classes=spec.classes and 10,
    )


def random_state(shapes: dict[str, Shape], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def check_round_trip(table: Table, native: dict[str, Shape], file: dict[str, Shape]) -> None:
    ours = random_state(native)
    there = to_file(table, ours)
    assert {key: tuple(value.shape) for key, value in there.items()} == file
    back = from_file(table, there, native, source="x")
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    theirs = random_state(file, seed=1)
    again = to_file(table, from_file(table, theirs, native, source="x"))
    assert all(torch.equal(again[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", UNETS)
def test_every_unet_key_has_its_place(name: str) -> None:
    spec, parameters, count, heads, kind = UNETS[name]
    original, native = original_keys.unet(spec), peer_unet(spec, kind)
    table = unet_table(native, **heads)
    assert file_shapes(table, native) == original
    assert fit_table(table, original, native)
    assert parameters is None or sum(map(math.prod, original.values())) == parameters
    assert parameters is None or sum(map(math.prod, native.values())) == parameters
    assert count is None or len(original) == count


@pytest.mark.parametrize("name", UNETS)
def test_unet_round_trip_is_exact(name: str) -> None:
    spec, _, _, heads, kind = UNETS[name]
    spec = small_unet(spec)
    native = peer_unet(spec, kind)
    table = unet_table(native, **heads)
    check_round_trip(table, native, original_keys.unet(spec))


@pytest.mark.parametrize("name", VAES)
def test_every_vae_key_has_its_place(name: str) -> None:
    spec, parameters, count = VAES[name]
    original, native = original_keys.vae(spec), peer_vae(spec)
    assert file_shapes(vae_table(native), native) == original
    assert sum(map(math.prod, native.values())) == parameters
    assert len(original) == count


@pytest.mark.parametrize("name", VAES)
def test_vae_round_trip_is_exact(name: str) -> None:
    spec = replace(VAES[name][0], ch=32, codes=VAES[name][0].codes and 16)
    native = peer_vae(spec)
    check_round_trip(vae_table(native), native, original_keys.vae(spec))


def native_bert(*, layers: int, width: int, inner: int, vocabulary: int = 30522) -> dict[str, Shape]:
    keys: dict[str, Shape] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.embed_positions.weight": (77, width),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        keys |= {f"{at}.self_attn.{x}_proj.weight": (inner, width) for x in "qkv"} | original_keys.affine(
            f"{at}.self_attn.out_proj", width, inner
        )
        keys |= original_keys.affine(f"{at}.fc1", 4 * width, width) | original_keys.affine(
            f"{at}.fc2", width, 4 * width
        )
        keys |= original_keys.affine(f"{at}.self_attn_layer_norm", width) | original_keys.affine(
            f"{at}.final_layer_norm", width
        )
    return keys | original_keys.affine("model.layer_norm", width)


def test_bert() -> None:
    original, native = original_keys.bert(), native_bert(layers=32, width=1280, inner=512)
    assert sum(map(math.prod, original.values())) == 581_994_042
    assert len(original) == 422
    assert sum(map(math.prod, native.values())) == 542_895_360
    assert fit_table(bert_table(native), original, native)  # the unused to_logits is dropped
    small = native_bert(layers=3, width=16, inner=8, vocabulary=9) | original_keys.affine("to_logits", 9, 16)
    check_round_trip(bert_table(small), small, original_keys.bert(layers=3, width=16, inner=8, vocabulary=9))


def test_bert_names_are_the_peers() -> None:
    module = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
    config = module.LDMBertConfig(
        vocab_size=50, encoder_layers=2, encoder_ffn_dim=64, d_model=16, head_dim=4, encoder_attention_heads=2
    )
    with torch.device("meta"):
        peer = module.LDMBertModel(config)
    wanted = native_bert(layers=2, width=16, inner=8, vocabulary=50) | original_keys.affine(
        "to_logits", 50, 16
    )
    assert {name: shape for name, shape in shapes_of(peer).items() if name != "model.position_ids"} == wanted


def test_older_diffusers_spellings_are_read() -> None:
    native = peer_vae(VAESpec(mult=(1, 2), z=4, ch=32))
    state = random_state(native)
    older = {}
    for key, value in state.items():
        for new, old in (
            ("to_q.", "query."),
            ("to_k.", "key."),
            ("to_v.", "value."),
            ("to_out.0.", "proj_attn."),
        ):
            key = key.replace(new, old)
        older[key] = value
    assert older.keys() != state.keys()
    for file in (state, older):
        back = from_file(DIFFUSERS, file, native, source="x")
        assert all(torch.equal(back[key], state[key]) for key in state)
    assert to_file(DIFFUSERS, state).keys() == state.keys()


def test_linear_and_pointwise_projections_are_the_same_numbers() -> None:
    """A file with 1×1 convolutions loads into linear layers, and the reverse."""
    conv = small_unet(UNETS["sd1"][0])
    files = {linear: original_keys.unet(replace(conv, linear=linear)) for linear in (False, True)}
    for linear in (False, True):
        native = peer_unet(replace(conv, linear=linear), "cond")
        state = random_state(files[not linear])
        back = from_file(unet_table(native), state, native, source="x")
        key, there = "down_blocks.0.attentions.0.proj_in.weight", "input_blocks.1.1.proj_in.weight"
        assert tuple(back[key].shape) == native[key]
        assert torch.equal(back[key].flatten(), state[there].flatten())


@pytest.mark.parametrize("heads", [1, 4])
def test_fused_qkv_gives_the_numbers_of_the_original_attention(heads: int) -> None:
    """Guided-diffusion's attention on (head, part, channel) rows equals the peer's on the mapped tensors."""
    from diffusers.models.attention_processor import Attention

    width, length = 32, 9
    peer = Attention(
        width,
        heads=heads,
        dim_head=width // heads,
        bias=True,
        norm_num_groups=8,
        residual_connection=True,
        eps=1e-5,
    )
    native = {f"mid_block.attentions.0.{name}": shape for name, shape in shapes_of(peer).items()}
    # the two residual blocks and the first level only determine the structure
    native |= {
        f"{at}.norm1.weight": (4,)
        for at in ("down_blocks.0.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1")
    }
    file = random_state(
        {
            **original_keys.attention_block("middle_block.1.", width),
            **{
                f"{at}.in_layers.0.weight": (4,)
                for at in ("input_blocks.1.0", "middle_block.0", "middle_block.2")
            },
        }
    )
    x = torch.randn(2, width, length, generator=torch.Generator().manual_seed(3))

    def original() -> torch.Tensor:
        p = {key.removeprefix("middle_block.1."): value for key, value in file.items()}
        h = torch.nn.functional.group_norm(x, 8, p["norm.weight"], p["norm.bias"], 1e-5)
        qkv = torch.nn.functional.conv1d(h, p["qkv.weight"], p["qkv.bias"])
        q, k, v = qkv.reshape(2 * heads, 3 * width // heads, length).split(width // heads, dim=1)
        scores = torch.einsum("bct,bcs->bts", q, k) * (width // heads) ** -0.5
        a = torch.einsum("bts,bcs->bct", scores.softmax(-1), v).reshape(2, width, length)
        return x + torch.nn.functional.conv1d(a, p["proj_out.weight"], p["proj_out.bias"])

    def ours(table: Table) -> torch.Tensor:
        state = from_file(table, file, native, source="x")
        peer.load_state_dict(
            {
                key.removeprefix("mid_block.attentions.0."): v
                for key, v in state.items()
                if "attentions" in key
            }
        )
        return peer(x[..., None])[..., 0].detach()

    wanted = original()
    error = (ours(unet_table(native, heads=heads)) - wanted).abs().max()
    assert error < 1e-4 * wanted.square().mean().sqrt()  # float32 sums of 32 terms in different orders
    if heads > 1:
        assert (ours(unet_table(native, heads=1)) - wanted).abs().max() > 0.1


def test_attention_blocks_need_the_number_of_heads() -> None:
    native = peer_unet(small_unet(UNETS["celebahq"][0]), "plain")
    with pytest.raises(ValueError, match="heads"):
        unet_table(native)


def test_our_networks_have_the_peers_names() -> None:
    from ldm.models.unet import UNet, UNetConfig
    from ldm.models.vae import AutoencoderKL, VAEConfig

    with torch.device("meta"):
        unet, vae = UNet(UNetConfig()), AutoencoderKL(VAEConfig())
    assert shapes_of(unet) == peer_unet(UNETS["sd1"][0], "cond")
    assert shapes_of(vae) == peer_vae(VAES["kl-f8"][0])
