"""The safety checker: the peer's verdicts on the same weights, and its place in a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_latent_diffusion import tiny_model

from ldm.models.clip.towers import VisionConfig
from ldm.models.meta import on_meta
from ldm.models.safety import SafetyChecker, SafetyConfig
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import randomise, shapes_of
from ldm.weights.safety import load_safety

VISION = VisionConfig(image_size=28, patch_size=14, width=32, layers=2, heads=2, embed_dim=16)
SMALL = SafetyConfig(vision=VISION, concepts=5, special=3)
OWN = ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights")


def published(checker: SafetyChecker) -> dict[str, torch.Tensor]:
    """Return a checker's tensors under Hugging Face's names, the tower below vision_model.vision_model."""
    found = {name: getattr(checker, name).detach() for name in OWN}
    for key, tensor in checker.vision.state_dict().items():
        if key == "proj":
            found["visual_projection.weight"] = tensor.t()
            continue
        names = [key]
        parts = [tensor]
        if "attn.in_proj_" in key:
            names, parts = (
                [key.replace("attn.in_proj_", f"self_attn.{x}_proj.") for x in "qkv"],
                list(tensor.chunk(3)),
            )
        for name, part in zip(names, parts, strict=True):
            for ours, theirs in (
                ("transformer.resblocks.", "encoder.layers."),
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
                ("ln_pre", "pre_layrnorm"),
                ("ln_post", "post_layernorm"),
                ("conv1.", "embeddings.patch_embedding."),
                ("class_embedding", "embeddings.class_embedding"),
                ("positional_embedding", "embeddings.position_embedding.weight"),
            ):
                name = name.replace(ours, theirs) if not name.startswith("embeddings.") else name
            found[f"vision_model.vision_model.{name}"] = part
    return {key: tensor.contiguous().clone() for key, tensor in found.items()}


def small() -> SafetyChecker:
    with on_meta():
        checker = SafetyChecker(SMALL)
    checker = randomise(checker, seed=4)
    with torch.no_grad():  # thresholds that some images pass and some do not
        checker.concept_embeds_weights.uniform_(-0.1, 0.5, generator=torch.Generator().manual_seed(1))
        checker.special_care_embeds_weights.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(2))
    return checker


def test_the_verdicts_are_the_peers_on_the_same_weights(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "projection_dim": 16,
    }
    torch.manual_seed(0)
    theirs = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.uniform_(-0.5, 0.5)
        x = torch.randn(64, 3, 28, 28, generator=torch.Generator().manual_seed(5))
        image = theirs.visual_projection(theirs.vision_model(x)[1])
        # thresholds within the values of these images: each concept flags a few of them, each special vector
        # is close to some
        for name, share in (("concept_embeds", 0.96), ("special_care_embeds", 0.8)):
            cosine = (
                torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(getattr(theirs, name)).T
            )
            getattr(theirs, f"{name}_weights").copy_(cosine.quantile(share, dim=0))
    theirs.save_pretrained(tmp_path)
    ours = load_safety(tmp_path, config=SafetyConfig(vision=VISION))
    _, expected = theirs(x, images=torch.zeros(64, 1, 1, 1))
    assert 5 < sum(expected) < 59  # both verdicts occur
    assert list(ours.flags(x)) == expected
    ours.concept_embeds_weights += 0.1
    assert list(ours.flags(x)) != expected  # the thresholds decide


def test_special_vectors_count_for_what_follows_and_never_flag_alone() -> None:
    checker = small()
    x = torch.rand(8, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    checker.special_care_embeds_weights.fill_(-2.0)  # every image is close to all of them
    checker.concept_embeds_weights.fill_(2.0)  # and to none of the concepts
    assert checker(x) == (False,) * 8
    cosine = torch.nn.functional.normalize(
        checker.vision(checker.vision.prepare((x * 255).round() / 255)).pooled, dim=-1
    )
    best = (cosine @ torch.nn.functional.normalize(checker.concept_embeds, dim=-1).T)[0].max()
    checker.concept_embeds_weights.fill_(float(best) + 0.005)  # half of what the special vectors add
    assert checker(x)[0]
    checker.special_care_embeds_weights.fill_(2.0)
    assert not checker(x)[0]


def test_a_pipeline_reports_flags_and_blackens_only_if_asked() -> None:
    pipe = tiny_model()
    plain = pipe.text_to_image("a red apple", n=3, progress=False)
    assert plain.flagged is None  # off by default
    pipe.safety = small()
    pipe.safety.concept_embeds_weights.fill_(-2.0)
    images = pipe.text_to_image("a red apple", n=3, progress=False)
    assert images.flagged == (True,) * 3 and torch.equal(images.tensor, plain.tensor)
    assert "3 flagged" in repr(images)
    pipe.safety.black = True
    assert not pipe.text_to_image("a red apple", n=3, progress=False).tensor.any()
    pipe.safety.concept_embeds_weights.fill_(2.0)
    images = pipe.text_to_image("a red apple", n=3, progress=False)
    assert images.flagged == (False,) * 3 and torch.equal(images.tensor, plain.tensor)


def test_files_in_the_published_layout_and_wrong_ones(tmp_path: Path) -> None:
    checker = small()
    write_safetensors(tmp_path / "safety.safetensors", published(checker))
    again = load_safety(tmp_path / "safety.safetensors", config=SMALL, black=True)
    assert again.black and all(
        torch.equal(a, b)
        for a, b in zip(checker.state_dict().values(), again.state_dict().values(), strict=True)
    )
    write_safetensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"other\.safetensors.*no safety checker: it has no concept_embeds"):
        load_safety(tmp_path / "other.safetensors", config=SMALL)


def test_the_published_count() -> None:
    with on_meta():
        shapes = shapes_of(SafetyChecker(SafetyConfig()))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 303_981_588


def test_the_configuration_of_the_tower_is_compared(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", published(small()))
    tower = {"hidden_act": "quick_gelu", "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 28}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "clip", "vision_config": tower}), encoding="utf-8")
    assert load_safety(tmp_path, config=SMALL).config == SMALL
    for change in ({"hidden_act": "gelu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 1e-6}):
        config.write_text(
            json.dumps({"model_type": "clip", "vision_config": tower | change}), encoding="utf-8"
        )
        with pytest.raises(ValueError, match=rf"does not fit the safety checker: {next(iter(change))}"):
            load_safety(tmp_path, config=SMALL)
