"""Load CLIP models from folders in Hugging Face layout: config.json and weights, as transformers saves them.

For example:

    from ldm.weights.hugging_face_clip import load_hugging_face_clip

    model = load_hugging_face_clip("clip-vit-large-patch14")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ldm.models.clip.config import Activation, CLIPConfig, TextConfig, VisionConfig
from ldm.models.clip.pixels import MEAN, STD
from ldm.models.clip.towers import CLIP, TextTower, VisionTower
from ldm.models.meta import on_meta
from ldm.support.config import MAX_SIZE, build, check_between, check_sizes, nearest
from ldm.support.scalars import whole_number
from ldm.support.strict_json import read_json
from ldm.support.text import errors_of, shown
from ldm.support.warn import warn_user
from ldm.weights.fields.judge import conflicts, judge_fields, same, warnings_of
from ldm.weights.fields.texts import CLIP_PIXELS, CLIP_TEXT, CLIP_VISION
from ldm.weights.formats.diffusers_folder import read_component
from ldm.weights.rules.clip import to_clip
from ldm.weights.strict import load_strict

RGB = tuple[float, float, float]
Tower = TypeVar("Tower", TextConfig, VisionConfig)
MOST_LAYERS = 200  # of a tower; the largest published one has 48
ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
# The values of entries that config.json leaves out, as transformers defines them.
TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "projection_dim": 512,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
VISION_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 512,
}


def load_hugging_face_clip(
    folder: str | Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32
) -> CLIP | TextTower | VisionTower:
    """Return the CLIP model in a folder in Hugging Face layout, in evaluation mode.

    Args:
        folder: A folder with config.json and weights (safetensors or .bin, whole or in shards), and
            preprocessor_config.json if its images are not normalised as OpenAI's.
        variant: Variant of the weights, such as "fp16"; None for the plain ones.
        dtype: Floating-point type of the weights. Default: float32.

    Returns:
        A `CLIP` for transformers' CLIPModel, a `TextTower` for CLIPTextModel, a `VisionTower` for
        CLIPVisionModel; the latter two with or without projection.

    Raises:
        FileNotFoundError: If the folder or its weights are absent.
        ValueError: If it holds another kind of model, or one that computes otherwise.
    """
    component = read_component(folder, variant=variant)
    with errors_of(folder), on_meta():
        model = hugging_face_network(component.config, *pixel_statistics(Path(folder)))
    load_strict(model, to_clip(model, component.tensors, source=folder), source=folder, dtype=dtype)
    return model.eval()


def hugging_face_network(
    config: Mapping[str, Any], mean: RGB = MEAN, std: RGB = STD
) -> CLIP | TextTower | VisionTower:
    """Return the network that a config.json describes, with its initial weights.

    Args:
        config: The content of config.json.
        mean: Mean of the pixels that the image tower was trained on. Default: OpenAI's.
        std: Their standard deviation. Default: OpenAI's.
    """
    kind = config.get("model_type")
    if kind == "clip_text_model":
        return TextTower(hf_text_config(config))
    if kind == "clip_vision_model":
        return VisionTower(replace(hf_vision_config(config), mean=mean, std=std))
    if kind != "clip":
        choices = ("clip", "clip_text_model", "clip_vision_model")
        raise ValueError(f"model_type: {shown(kind)}; {nearest(kind, choices)}")
    width = whole_number("projection_dim", config.get("projection_dim", 512), least=1, most=MAX_SIZE)
    text = hf_text_config({"model_type": "clip_text_model", **tower_config(config, "text_config")})
    vision = hf_vision_config({"model_type": "clip_vision_model", **tower_config(config, "vision_config")})
    return CLIP(
        CLIPConfig(
            text=replace(text, embed_dim=width),
            vision=replace(vision, embed_dim=width, mean=mean, std=std),
        )
    )


def pixel_statistics(folder: Path) -> tuple[RGB, RGB]:
    """Return the mean and standard deviation of pixels in preprocessor_config.json; OpenAI's if it is absent.

    Raises:
        ValueError: If it states another interpolation than bicubic.
    """
    path = folder / "preprocessor_config.json"
    stated = read_json(path) if path.is_file() else {}
    if wrong := conflicts(judge_fields(stated, CLIP_PIXELS)):
        raise ValueError(f"{str(path)!r} states other pixels than are computed: {'; '.join(wrong)}")
    pairs = {"mean": stated.get("image_mean") or list(MEAN), "std": stated.get("image_std") or list(STD)}
    found = build(VisionConfig, pairs, str(path))
    return found.mean, found.std


def tower_config(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the configuration of one tower of a CLIPModel.

    Raises:
        ValueError: If it is stated twice and differently, as files of 2022 may do.
    """
    found, twin = ({} if config.get(key) is None else config[key] for key in (name, f"{name}_dict"))
    if not isinstance(found, Mapping) or not isinstance(twin, Mapping):
        raise ValueError(f"{name}: expected a mapping, got {shown(found)} and {shown(twin)}")
    for key, value in twin.items():
        if key in found and not same(found[key], value):
            raise ValueError(f"{name}_dict: {key} {shown(value)} contradicts {name}: {shown(found[key])}")
    return {**twin, **found}


def hf_text_config(config: Mapping[str, Any]) -> TextConfig:
    """Return the configuration of the text tower in a config.json of CLIPTextModel[WithProjection].

    Raises:
        ValueError: If it is the configuration of another model, or of one that computes otherwise.
    """
    _check_config(config, "clip_text_model")
    stated = {**TEXT_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    bos, eos = stated["bos_token_id"], stated["eos_token_id"]
    if eos == 2:  # files of 2022 state 0 and 2, which CLIP's tokenizer never produces
        bos, eos = TEXT_DEFAULTS["bos_token_id"], TEXT_DEFAULTS["eos_token_id"]
    return _built(
        TextConfig,
        vocab_size=stated["vocab_size"],
        context_length=stated["max_position_embeddings"],
        width=stated["hidden_size"],
        layers=stated["num_hidden_layers"],
        heads=stated["num_attention_heads"],
        mlp_width=stated["intermediate_size"],
        activation=ACTIVATIONS[config.get("hidden_act", "quick_gelu")],
        embed_dim=stated["projection_dim"] if _is_projected(config) else None,
        bos_id=bos,
        eot_id=eos,
    )


def hf_vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """Return the configuration of the image tower in a config.json of CLIPVisionModel[WithProjection].

    Raises:
        ValueError: If it is the configuration of another model, or of one that computes otherwise.
    """
    _check_config(config, "clip_vision_model")
    stated = {**VISION_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    return _built(
        VisionConfig,
        image_size=stated["image_size"],
        patch_size=stated["patch_size"],
        width=stated["hidden_size"],
        layers=stated["num_hidden_layers"],
        heads=stated["num_attention_heads"],
        mlp_width=stated["intermediate_size"],
        activation=ACTIVATIONS[config.get("hidden_act", "quick_gelu")],
        embed_dim=stated["projection_dim"] if _is_projected(config) else None,
    )


def _built(kind: type[Tower], **fields: Any) -> Tower:
    """Return the shape of a tower; ValueError for a field of another type, or larger than any network's."""
    shape = build(kind, fields, "config.json")
    check_sizes(shape, "config.json")
    check_between(1, MOST_LAYERS, num_hidden_layers=fields["layers"])
    return shape


def _is_projected(config: Mapping[str, Any]) -> bool:
    """Return whether the architecture is one with a projection to the shared embedding space."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"architectures: expected a list of names, got {shown(names)}")
    return any("WithProjection" in name for name in names)


def _check_config(config: Mapping[str, Any], kind: str) -> None:
    if config.get("model_type") != kind:
        raise ValueError(f"model_type: expected {kind!r}, got {shown(config.get('model_type'))}")
    activation = config.get("hidden_act", "quick_gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act: {shown(activation)}; {nearest(activation, ACTIVATIONS)}")
    fields = CLIP_TEXT if kind == "clip_text_model" else CLIP_VISION
    findings = [each for each in judge_fields(config, fields) if each.name != "eos_token_id"]
    if wrong := conflicts(findings):
        raise ValueError(f"config.json states another {kind} than is computed: {'; '.join(wrong)}")
    for note in warnings_of(findings, "config.json"):
        warn_user(note)
