"""CLIP's layouts: keys of published files at full size, exact round trips, and transformers' outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.models.clip.towers import CLIP, CLIPConfig, TextConfig, TextTower, VisionConfig, VisionTower
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.hugging_face_clip import (
    hf_text_config,
    hf_vision_config,
    hugging_face_network,
    load_hugging_face_clip,
)
from ldm.weights.keymap import fit_table, to_file
from ldm.weights.open_clip import load_open_clip, open_clip_config
from ldm.weights.rules.clip import clip_table, to_clip

TEXT = TextConfig(
    vocab_size=300,
    context_length=20,
    width=64,
    layers=2,
    heads=4,
    embed_dim=48,
    activation="gelu",
    bos_id=298,
    eot_id=299,
)
VISION = VisionConfig(
    image_size=32, patch_size=8, width=96, layers=2, heads=3, embed_dim=48, activation="gelu"
)
H_TEXT = TextConfig(width=1024, layers=24, heads=16, embed_dim=1024, activation="gelu")
G_TEXT = TextConfig(width=1280, layers=32, heads=20, embed_dim=1280, activation="gelu")
H_VISION = VisionConfig(width=1280, layers=32, heads=16, embed_dim=1024, activation="gelu")
G_VISION = VisionConfig(width=1664, layers=48, heads=16, mlp_width=8192, embed_dim=1280, activation="gelu")


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)


def tower_of(config: TextConfig | VisionConfig) -> TextTower | VisionTower:
    return TextTower(config) if isinstance(config, TextConfig) else VisionTower(config)


def hf_config(config: TextConfig | VisionConfig) -> dict[str, Any]:
    """Return the config.json of transformers for a configuration."""
    kind = "Text" if isinstance(config, TextConfig) else "Vision"
    common = {
        "model_type": f"clip_{kind.lower()}_model",
        "architectures": [f"CLIP{kind}Model" + ("WithProjection" if config.embed_dim else "")],
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width or 4 * config.width,
        "hidden_act": config.activation,
        "projection_dim": config.embed_dim or 512,
    }
    if isinstance(config, TextConfig):
        own = {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            "eos_token_id": config.eot_id,
        }
        return common | own | {"bos_token_id": config.bos_id}
    return common | {"image_size": config.image_size, "patch_size": config.patch_size}


def peer_of(config: TextConfig | VisionConfig) -> Any:
    """Return the model of transformers for a configuration."""
    transformers = pytest.importorskip("transformers")
    said = hf_config(config)
    kind = "Text" if isinstance(config, TextConfig) else "Vision"
    return getattr(transformers, said["architectures"][0])(
        getattr(transformers, f"CLIP{kind}Config")(**said)
    ).eval()


@pytest.mark.parametrize(
    "config",
    [
        TextConfig(embed_dim=None),
        TextConfig(),
        replace(H_TEXT, layers=23, embed_dim=None),
        G_TEXT,
        VisionConfig(),
        H_VISION,
        G_VISION,
    ],
    ids=[
        "L text",
        "L text projected",
        "H text, 23 layers",
        "bigG text",
        "L vision",
        "H vision",
        "bigG vision",
    ],
)
def test_hugging_face_files_fit_at_full_size(config):
    with torch.device("meta"):
        tower, peer = tower_of(config), peer_of(config)
    in_memory = shapes_of(peer)
    prefix = "text_model." if isinstance(config, TextConfig) else "vision_model."
    on_disk = {
        key if key.startswith(prefix) or "projection" in key else prefix + key: shape
        for key, shape in in_memory.items()
    }
    assert any(key.startswith(prefix + "encoder.layers.") for key in on_disk)
    for have in (in_memory, on_disk, on_disk | {f"{prefix}embeddings.position_ids": (1, 77)}):
        result = fit_table(clip_table(shapes_of(tower), have), have, shapes_of(tower))
        assert result, str(result)
    broken = dict(on_disk)
    broken.pop(f"{prefix}encoder.layers.3.self_attn.k_proj.bias")
    broken[f"{prefix}encoder.layers.99.layer_norm1.bias"] = (1,)
    result = fit_table(clip_table(shapes_of(tower), broken), broken, shapes_of(tower))
    assert result.missing == (f"{prefix}encoder.layers.3.self_attn.k_proj.bias",)
    assert result.extra == (f"{prefix}encoder.layers.99.layer_norm1.bias",)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_text_outputs_equal_transformers(activation, flat, projected):
    config = replace(TEXT, activation=activation, embed_dim=48 if projected else None)
    peer = peer_of(config)
    randomize(peer)
    state = {key.removeprefix("text_model."): value for key, value in peer.state_dict().items()}
    if not flat:
        state = {
            key if "text_projection" in key else f"text_model.{key}": value for key, value in state.items()
        }
    tower = TextTower(config).eval()
    tower.load_state_dict(to_clip(tower, state, source="peer"))
    ids = torch.randint(0, 298, (2, 20))
    ids[:, 7] = 299
    with torch.no_grad():
        theirs, ours = peer(ids), tower(ids)
    torch.testing.assert_close(ours.tokens, theirs.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.pooled, theirs.text_embeds if projected else theirs.pooler_output, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("projected", [False, True])
def test_image_outputs_equal_transformers(activation, projected):
    config = replace(VISION, activation=activation, embed_dim=48 if projected else None)
    peer = peer_of(config)
    randomize(peer)
    tower = VisionTower(config).eval()
    tower.load_state_dict(to_clip(tower, peer.state_dict(), source="peer"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs, ours = peer(x), tower(x)
    torch.testing.assert_close(ours.tokens, theirs.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.pooled, theirs.image_embeds if projected else theirs.pooler_output, rtol=1e-4, atol=1e-5
    )


def layouts(model: CLIP) -> dict[str, dict[str, Tensor]]:
    """Return the weights of one model in each layout."""
    own = model.state_dict()
    text = {name for name in own if not name.startswith("visual.") and name != "logit_scale"}
    hugging_face = to_file(clip_table(own, {"text_model.": 0}), own)
    return {
        "open_clip": own,
        "OpenAI": (
            own | {name: torch.tensor(32) for name in ("input_resolution", "context_length", "vocab_size")}
        ),
        "data-parallel": {f"module.{name}": value for name, value in own.items()},
        "custom text": {f"text.{name}" if name in text else name: value for name, value in own.items()},
        "one-dimensional scale": own | {"logit_scale": own["logit_scale"][None]},
        "Hugging Face": hugging_face | {"text_model.embeddings.position_ids": torch.arange(20)[None]},
    }


@pytest.mark.parametrize(
    "layout", ["open_clip", "OpenAI", "data-parallel", "custom text", "one-dimensional scale", "Hugging Face"]
)
def test_each_layout_gives_the_same_weights(layout):
    model = CLIP(CLIPConfig(text=TEXT, vision=VISION))
    randomize(model)
    own, state = model.state_dict(), layouts(model)[layout]
    found = to_clip(model, state, source=layout)
    assert list(found) == list(own) and all(torch.equal(found[name], own[name]) for name in own)
    parts = {name: value for name, value in state.items() if not name.startswith("module.")}
    if parts:  # single towers, from the file with both
        for tower, prefix in ((TextTower(TEXT), ""), (VisionTower(VISION), "visual.")):
            found = to_clip(tower, parts, source=layout)
            assert set(found) == set(tower.state_dict())
            assert all(torch.equal(value, own[prefix + name]) for name, value in found.items())


def test_whole_hugging_face_model():
    """The state dict of CLIPModel gives the same embeddings."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=hf_config(TEXT),
            vision_config=hf_config(VISION),
            projection_dim=48,
        )
    ).eval()
    randomize(peer)
    model = CLIP(CLIPConfig(text=TEXT, vision=VISION)).eval()
    model.load_state_dict(to_clip(model, peer.state_dict(), source="peer"))
    ids, x = torch.randint(0, 298, (2, 20)), torch.randn(2, 3, 32, 32)
    ids[:, 7] = 299
    with torch.no_grad():
        theirs = peer(input_ids=ids, pixel_values=x)
        image, text = model.visual(x).pooled, model.encode_text(ids, normalize=True)
    torch.testing.assert_close(text, theirs.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        image / image.norm(dim=-1, keepdim=True), theirs.image_embeds, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(model.logit_scale.data, peer.logit_scale.data)


def test_folders_of_hugging_face(tmp_path):
    """Each kind of folder that transformers saves gives the same embeddings."""
    transformers = pytest.importorskip("transformers")
    text, vision = hf_config(TEXT), hf_config(VISION)
    peers = {
        "text": peer_of(TEXT),
        "vision": peer_of(VISION),
        "both": transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
        ).eval(),
    }
    for name, peer in peers.items():
        randomize(peer)
        peer.save_pretrained(tmp_path / name)
    ids, pixels = torch.randint(0, 298, (2, 20)), torch.rand(2, 3, 32, 32)
    ids[:, 7] = 299
    (tmp_path / "vision" / "preprocessor_config.json").write_text(
        '{"image_mean": [0, 0, 0], "resample": 3}', encoding="utf-8"
    )
    tower, image, model = (load_hugging_face_clip(tmp_path / name) for name in peers)
    assert isinstance(tower, TextTower) and isinstance(image, VisionTower) and isinstance(model, CLIP)
    assert image.config.mean == (0, 0, 0) and model.config.text.embed_dim == 48
    with torch.no_grad():
        for own, peer in (
            (tower(ids).pooled, peers["text"](ids).text_embeds),
            (image(pixels).pooled, peers["vision"](pixels).image_embeds),
            (
                model.visual(pixels).pooled,
                peers["both"].visual_projection(peers["both"].vision_model(pixels).pooler_output),
            ),
        ):
            torch.testing.assert_close(own, peer, rtol=1e-4, atol=1e-5)
    (tmp_path / "vision" / "preprocessor_config.json").write_text('{"resample": 2}', encoding="utf-8")
    with pytest.raises(ValueError, match="resample 2, expected 3"):
        load_hugging_face_clip(tmp_path / "vision")
    (tmp_path / "text" / "config.json").write_text('{"model_type": "clips"}', encoding="utf-8")
    with pytest.raises(ValueError, match="model_type: 'clips'; did you mean 'clip'"):
        load_hugging_face_clip(tmp_path / "text")


def test_towers_inside_diffusion_models():
    """The keys below `cond_stage_model.model.` of SD 2, and below `embedder.model.` of Stable unCLIP."""
    model = CLIP(CLIPConfig(text=TEXT, vision=VISION))
    own = model.state_dict()
    sd2 = {name: value for name, value in own.items() if not name.startswith("visual.")} | {
        "attn_mask": torch.zeros(20, 20)
    }
    assert set(to_clip(TextTower(TEXT), sd2, source="SD 2")) == set(TextTower(TEXT).state_dict())
    unclip = {name: value for name, value in own.items() if not name.startswith("transformer.")}
    assert set(to_clip(VisionTower(VISION), unclip, source="unCLIP")) == set(VisionTower(VISION).state_dict())


def test_what_does_not_fit_is_named():
    model = CLIP(CLIPConfig(text=TEXT, vision=VISION))
    state = dict(model.state_dict())
    state["extra.weight"], state["visual.proj"] = torch.zeros(1), torch.zeros(3, 48)
    state.pop("ln_final.bias")
    with pytest.raises(
        ValueError,
        match=r"'file.pt'.*ln_final\.bias.*extra\.weight.*visual\.proj: \(3, 48\), expected \(96, 48\)",
    ):
        to_clip(model, state, source="file.pt")


# Configurations and loading


@pytest.mark.parametrize(
    ("name", "text", "vision"),
    [
        ("ViT-L-14-quickgelu", TextConfig(), VisionConfig()),
        ("ViT-H-14", H_TEXT, H_VISION),
        ("ViT-bigG-14", G_TEXT, G_VISION),
    ],
)
def test_open_clip_configurations(name, text, vision):
    config = open_clip_config(name)
    assert config.text == replace(text, mlp_width=4 * text.width)
    assert config.vision == replace(vision, mlp_width=vision.mlp_width or 4 * vision.width)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-plus-240", "ViT-S-32-alt", "ViT-g-14", "ViT-e-14"])
def test_other_configurations_have_open_clips_shapes(name):
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        ours, theirs = CLIP(open_clip_config(name)), open_clip.CLIP(**open_clip.get_model_config(name))
    assert shapes_of(ours) == shapes_of(theirs)


def test_wrong_open_clip_names():
    with pytest.raises(
        ValueError, match="unknown open_clip model 'ViT-L14-quickgelu'; did you mean 'ViT-L-14-quickgelu'"
    ):
        open_clip_config("ViT-L14-quickgelu")
    with pytest.raises(ValueError, match="unknown open_clip model '../ViT-L-14'"):
        open_clip_config("../ViT-L-14")
    for name, why in (("RN50", "ResNet"), ("coca_ViT-B-32", "multimodal_cfg"), ("ViT-B-16-SigLIP", "timm")):
        with pytest.raises(ValueError, match=f"{name}.*{why}"):
            open_clip_config(name)


@pytest.fixture
def small(monkeypatch) -> CLIPConfig:
    """Give every published name a small configuration."""
    config = CLIPConfig(text=TEXT, vision=VISION)
    monkeypatch.setattr("ldm.weights.open_clip.open_clip_config", lambda name: config)
    return config


def test_local_files(small, tmp_path):
    model = CLIP(small)
    randomize(model)
    for layout, state in layouts(model).items():
        path = tmp_path / f"{layout}.safetensors"
        write_safetensors(path, {name: value.contiguous() for name, value in state.items()})
        loaded = load_open_clip("ViT-B-32", path)
        assert not loaded.training and all(
            torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items()
        )
    torch.save({"state_dict": layouts(model)["data-parallel"], "epoch": 3}, tmp_path / "epoch_3.pt")
    half = load_open_clip("ViT-B-32", tmp_path / "epoch_3.pt", dtype=torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert torch.equal(half.ln_final.weight, model.ln_final.weight.half())


def test_openais_archives_are_refused_with_advice(small, tmp_path):
    path = tmp_path / "ViT-L-14.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match="TorchScript archive.*safetensors"):
        load_open_clip("ViT-L-14-quickgelu", path)


def test_absent_files_and_unknown_tags(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        load_open_clip("ViT-B-32", tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match=r"unknown tag 'opanai'.*did you mean 'openai'"):
        load_open_clip("ViT-L-14", "opanai")


def test_a_tag_tells_activation_and_pixels(small, tmp_path, monkeypatch):
    """With the download replaced by a local file: OpenAI's weights take quick_gelu under every name."""
    model = CLIP(small)
    randomize(model)
    path = tmp_path / "openai.safetensors"
    write_safetensors(path, model.state_dict())
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda about: str(path))
    loaded = load_open_clip("ViT-L-14", "openai")
    assert (loaded.config.text.activation, loaded.config.vision.activation) == ("quick_gelu", "quick_gelu")
    assert load_open_clip("ViT-L-14", "laion2b_s32b_b82k").config.vision.mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="squash"):
        load_open_clip("ViT-H-14-quickgelu", "dfn5b")


@pytest.mark.parametrize(
    "config",
    [replace(TEXT, mlp_width=256), replace(TEXT, mlp_width=256, embed_dim=None), TextConfig(mlp_width=3072)],
)
def test_text_configurations_of_hugging_face(config):
    assert hf_text_config(hf_config(config)) == config


def test_old_text_configurations_of_hugging_face():
    """Files of 2022 state 2 and 0 as the ids of end and start, which the tokenizer never produces."""
    found = hf_text_config(hf_config(TextConfig(embed_dim=None)) | {"eos_token_id": 2, "bos_token_id": 0})
    assert (found.bos_id, found.eot_id) == (49406, 49407)


def test_a_tower_that_is_stated_twice_must_be_the_same():
    """Files of 2022 have `text_config_dict` beside `text_config`, and transformers takes the former."""
    text, vision = hf_config(TEXT), hf_config(VISION)
    whole = {"model_type": "clip", "text_config": text, "vision_config": vision, "projection_dim": 512}
    partial = {key: text[key] for key in ("hidden_size", "hidden_act")}
    assert hugging_face_network(whole | {"text_config_dict": partial}).config.text.width == TEXT.width
    with pytest.raises(ValueError, match="text_config_dict: hidden_act 'relu' contradicts text_config"):
        hugging_face_network(whole | {"text_config_dict": partial | {"hidden_act": "relu"}})
    with pytest.raises(ValueError, match="vision_config: expected a mapping, got 'large'"):
        hugging_face_network(whole | {"vision_config": "large"})


def test_vision_configurations_of_hugging_face():
    assert hf_vision_config(hf_config(H_VISION)) == replace(H_VISION, mlp_width=5120)
    for change, message in (
        ({"model_type": "siglip"}, "siglip"),
        ({"hidden_act": "relu"}, "relu"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06, expected 1e-05"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_vision_config(hf_config(VISION) | change)
