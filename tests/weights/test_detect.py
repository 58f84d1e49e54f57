"""Detection of the family of a file, for all published models in both layouts."""

from __future__ import annotations

import original_keys
import pytest
from original_keys import UNETS, VAES
from test_rules import peer_unet, peer_vae

from ldm.catalog.families import FAMILIES
from ldm.weights.detection import detect, require

NAMES = {
    "sd1": "sd1",
    "sd1-inpaint": "sd1-inpainting",
    "instruct-pix2pix": "instruct-pix2pix",
    "sd2": "sd2",
    "sd2-inpaint": "sd2-inpainting",
    "sd2-depth": "sd2-depth",
    "unclip-h": "sd21-unclip-h",
    "unclip-l": "sd21-unclip-l",
    "x4": "sd-x4-upscaler",
    "sdxl": "sdxl",
    "sdxl-inpaint": "sdxl-inpainting",
    "sdxl-refiner": "sdxl-refiner",
    "text2img-large": "ldm-text2img-large",
    "text2img256": "ldm-text2img256",
    "cin256": "ldm-cin256",
    "cin256-v2": "ldm-cin256-v2",
    "layout2img": "ldm-layout2img",
    "rdm": "rdm768",
    "celebahq": "ldm-uncond256",
    "bsr_sr": "ldm-bsr-sr",
    "semantic": "ldm-semantic",
    "lsun_churches": "ldm-churches256",
    "inpainting_big": "ldm-inpainting-big",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_unet_is_distinguished_from_the_others(name: str) -> None:
    spec, _, _, _, kind = UNETS[name]
    keys = original_keys.unet(spec)
    for prefix in ("model.diffusion_model.", ""):
        found = detect(original_keys.prefixed(prefix, keys))
        assert (found.name, found.layout) == (NAMES[name], "original")
    found = detect(peer_unet(spec, kind))
    assert (found.name, found.layout) == (NAMES[name], "diffusers")


@pytest.mark.parametrize(("base", "name"), [("sd1", "sd1-lcm"), ("sdxl", "sdxl-lcm")])
def test_latent_consistency_models(base: str, name: str) -> None:
    keys = peer_unet(UNETS[base][0], UNETS[base][4]) | {"time_embedding.cond_proj.weight": (320, 256)}
    assert detect(keys).name == name


@pytest.mark.parametrize("name", VAES)
def test_first_stages(name: str) -> None:
    wanted = "first-stage-vq" if VAES[name][0].codes else "first-stage-kl"
    for keys, layout in (
        (original_keys.vae(VAES[name][0]), "original"),
        (peer_vae(VAES[name][0]), "diffusers"),
    ):
        found = detect(keys)
        assert (found.name, found.layout) == (wanted, layout)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("control_model.time_embed.0.weight", "controlnet"),
        ("controlnet_cond_embedding.conv_in.weight", "controlnet"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora"),
        ("unet.x.attn1.to_q.lora_A.weight", "lora"),
        ("unet.x.attn1.processor.to_q_lora.down.weight", "lora"),
        ("emb_params", "textual-inversion"),
        ("concept_embeds", "safety-checker"),
        ("model.prd_emb", "karlo-prior"),
        ("prd_emb", "karlo-prior"),
        ("model.cf_param", "karlo-decoder"),
        ("clip_to_seq.weight", "kandinsky21"),
        ("model_first_steps.time_embed.0.weight", "karlo-sr"),
        ("ema_model.net.learned_query", "dalle2-prior"),
        ("net.learned_query", "dalle2-prior"),
        ("unets.0.to_out.weight", "dalle2-decoder"),
        ("layers.0.glu.fc0.weight", "dalle-mini-encoder"),
        ("model.decoder.layers.0.glu.fc0.weight", "dalle-mini"),
        ("blocks.group_1.block_1.res_path.conv_1.w", "dalle-dvae-encoder"),
        ("decoder.up.0.block.0.norm1.conv_y.weight", "movq"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "clip"),
    ],
)
def test_other_families_by_their_key(key: str, name: str) -> None:
    assert detect({key: (3, 3), "something.else": (1, 2, 3)}).name == name


def test_a_lora_in_a_file_with_a_model_is_found_first() -> None:
    assert detect(original_keys.unet(UNETS["sd1"][0]) | {"x.lora_down.weight": (4, 4)}).name == "lora"


def test_what_cannot_be_loaded_is_named_with_the_reason() -> None:
    for key, words in (
        ("control_model.time_embed.0.weight", "ControlNet.*added to a model"),
        ("layers.0.glu.fc0.weight", "one part of a model: pass the folder"),
    ):
        with pytest.raises(ValueError, match=rf"thing\.ckpt.*{words}"):
            require(detect({key: (1,), "b": (1,)}), source="thing.ckpt")
    assert require(detect(original_keys.unet(UNETS["sd1"][0])), source="x") is FAMILIES["sd1"]


def test_unknown_files_say_what_they_hold() -> None:
    with pytest.raises(ValueError, match=r"odd\.ckpt.*no family.*2 tensors below foo, zip"):
        detect({"foo.a": (1,), "zip": (2,)}, source="odd.ckpt")
    odd = original_keys.unet(UNETS["sd1"][0]) | {"input_blocks.0.0.weight": (320, 12, 3, 3)}
    with pytest.raises(ValueError, match="channels in 12, width 320, context 768"):
        detect(odd)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_tensors_without_dimensions_are_no_facts(prefix: str) -> None:
    """The shapes that decide may be those of single numbers; the file is then of no known family."""
    stem = {f"{prefix}input_blocks.0.0.weight": (320, 4, 3, 3)}
    for name in (
        "label_emb.weight",
        "label_emb.0.0.weight",
        "add_embedding.linear_1.weight",
        "a.attn2.to_k.weight",
    ):
        with pytest.raises(ValueError, match=r"a\.ckpt.*no family that is known"):
            detect(stem | {f"{prefix}{name}": ()}, source="a.ckpt")
    for shape in ((), (320,)):
        with pytest.raises(ValueError, match=r"a\.ckpt.*no family that is known"):
            detect({f"{prefix}input_blocks.0.0.weight": shape, "b": (1, 2)}, source="a.ckpt")
