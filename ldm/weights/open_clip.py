"""CLIP models as others publish them: their configurations read as ours, and their weights loaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.models.clip.towers import CLIP, Activation, CLIPConfig, TextConfig, VisionConfig
from ldm.models.meta import on_meta
from ldm.support.config import nearest
from ldm.weights.formats.safetensors import load_strict
from ldm.weights.formats.single_file import read_tensors
from ldm.weights.rules.clip import to_clip

TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
VISION_KEYS = {"image_size", "patch_size", "width", "head_width", "layers", "mlp_ratio"}
ACTIVATIONS: dict[str, Activation] = {"quick_gelu": "quick_gelu", "gelu": "gelu"}


def open_clip_config(name: str) -> CLIPConfig:
    """The shape of an open_clip model by its name ("ViT-L-14-quickgelu", "ViT-H-14", "ViT-bigG-14"), without
    importing open_clip.

    ValueError for an unknown name, or one whose towers are not plain transformers (ResNets, timm and Hugging
    Face models, CoCa, SigLIP).
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "open_clip_torch is not installed; it holds the models' configurations: pip install"
            " open_clip_torch"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model_configs"
    path = folder / f"{name}.json"
    names = [file.stem for file in folder.glob("*.json")]
    if name not in names:
        raise ValueError(f"unknown open_clip model {name!r}; {nearest(name, names)}")
    config = json.loads(path.read_text(encoding="utf-8"))
    text, vision = config["text_cfg"], config["vision_cfg"]
    other = [
        *(set(config) - {"embed_dim", "quick_gelu", "text_cfg", "vision_cfg"}),
        *(set(text) - TEXT_KEYS),
        *(set(vision) - VISION_KEYS),
    ]
    if other or not isinstance(vision["layers"], int):
        raise ValueError(
            f"{name!r} is not two plain transformers:"
            f" {', '.join(sorted(other)) or 'its image tower is a ResNet'}"
        )
    activation: Activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    return CLIPConfig(
        text=TextConfig(
            vocab_size=text["vocab_size"],
            context_length=text["context_length"],
            width=text["width"],
            layers=text["layers"],
            heads=text["heads"],
            mlp_width=int(text["width"] * text.get("mlp_ratio", 4.0)),
            activation=activation,
            embed_dim=config["embed_dim"],
        ),
        vision=VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // vision.get("head_width", 64),
            mlp_width=int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            activation=activation,
            embed_dim=config["embed_dim"],
        ),
    )


def load_open_clip(
    name: str, pretrained: str | Path | None = None, *, dtype: torch.dtype = torch.float32
) -> CLIP:
    """An open_clip model by name: with random weights, with those of a local file, or with a published tag's
    ("laion2b_s32b_b79k").

    A file may have open_clip's, OpenAI's or Hugging Face's layout. A tag is downloaded by open_clip, once;
    the activation and the pixels' mean and standard deviation are then the tag's. ValueError for an unknown
    name or tag (nearest offered), or a file that does not fit; FileNotFoundError for a path that is no file.
    """
    config = open_clip_config(name)
    if pretrained is None:
        return CLIP(config).to(dtype).eval()
    path = Path(pretrained)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise FileNotFoundError(f"no such file: {str(pretrained)!r}")
        config, path = _tagged(name, str(pretrained), config)
    state, _ = read_tensors(path)
    with on_meta():
        model = CLIP(config)
    load_strict(model, to_clip(model, state, source=path), source=path, dtype=dtype)
    return model.eval()


def _tagged(name: str, tag: str, config: CLIPConfig) -> tuple[CLIPConfig, Path]:
    """The configuration that a tag's weights were trained with, and the file that open_clip downloads for
    it."""
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    about = get_pretrained_cfg(name, tag)
    if not about:
        raise ValueError(
            f"unknown tag {tag!r} of {name!r}, and no such file;"
            f" {nearest(tag, list_pretrained_tags_by_model(name))}"
        )
    if about["interpolation"] != "bicubic" or about["resize_mode"] != "shortest":
        ways = f"{about['interpolation']}, {about['resize_mode']}"
        raise ValueError(
            f"{name!r} with {tag!r} takes images resized otherwise ({ways}); supported: bicubic, shortest"
            " side"
        )
    activation: Activation = "quick_gelu" if about.get("quick_gelu") else "gelu"
    vision = replace(config.vision, activation=activation, mean=tuple(about["mean"]), std=tuple(about["std"]))
    return CLIPConfig(text=replace(config.text, activation=activation), vision=vision), Path(
        download_pretrained(about)
    )


def hf_text_config(config: Mapping[str, Any]) -> TextConfig:
    """The text tower of a Hugging Face ``config.json``: of CLIPTextModel, which has no projection, or
    CLIPTextModelWithProjection.

    ValueError for what is no such model, or computes otherwise.
    """
    _check(config, "clip_text_model")
    projected = "WithProjection" in "".join(config.get("architectures") or ())
    bos, eos = config.get("bos_token_id", 49406), config.get("eos_token_id", 49407)
    if eos == 2:  # files of 2022 say 0 and 2, which CLIP's tokenizer never gave
        bos, eos = 49406, 49407
    return TextConfig(
        vocab_size=config.get("vocab_size", 49408),
        context_length=config.get("max_position_embeddings", 77),
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        activation=ACTIVATIONS[config.get("hidden_act", "quick_gelu")],
        embed_dim=config["projection_dim"] if projected else None,
        bos_id=bos,
        eot_id=eos,
    )


def hf_vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """The vision tower of a Hugging Face ``config.json``: of CLIPVisionModel, which has no projection, or
    CLIPVisionModelWithProjection."""
    _check(config, "clip_vision_model")
    projected = "WithProjection" in "".join(config.get("architectures") or ())
    return VisionConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        activation=ACTIVATIONS[config.get("hidden_act", "quick_gelu")],
        embed_dim=config["projection_dim"] if projected else None,
    )


def _check(config: Mapping[str, Any], kind: str) -> None:
    if config.get("model_type") != kind:
        raise ValueError(f"model_type: expected {kind!r}, got {config.get('model_type')!r}")
    if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act: {config['hidden_act']!r}; {nearest(config['hidden_act'], ACTIVATIONS)}"
        )
    if config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"layer_norm_eps: expected 1e-5, got {config['layer_norm_eps']}")
