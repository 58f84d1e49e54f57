"""Load CLIP models by open_clip's names, from local files or published tags.

The networks are those of `ldm.models.clip`; open_clip itself supplies the configurations and, for a tag, the
download. For example:

    from ldm.weights.open_clip import load_open_clip

    model = load_open_clip("ViT-B-32", "laion2b_s34b_b79k")
    image = model.encode_image(pixels, normalize=True)  # pixels (B, 3, H, W) in [0, 1] -> (B, E)
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import torch

from ldm.models.clip.config import Activation, CLIPConfig, TextConfig, VisionConfig
from ldm.models.clip.towers import CLIP
from ldm.models.meta import on_meta
from ldm.support.config import nearest
from ldm.weights.formats.single_file import read_tensors
from ldm.weights.rules.clip import to_clip
from ldm.weights.strict import load_strict

TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
VISION_KEYS = {"image_size", "patch_size", "width", "head_width", "layers", "mlp_ratio"}


def open_clip_config(name: str) -> CLIPConfig:
    """Return the configuration of an open_clip model, such as "ViT-H-14"; open_clip is not imported.

    Raises:
        ModuleNotFoundError: If open_clip_torch, which holds the configurations, is not installed.
        ValueError: If the name is unknown, or the towers are not plain transformers (ResNets, timm and
            Hugging Face models, CoCa, SigLIP).
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "open_clip_torch, which holds the models' configurations, is not installed: pip install"
            " open_clip_torch"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model_configs"
    path = folder / f"{name}.json"
    names = [file.stem for file in folder.glob("*.json")]
    if name not in names:
        raise ValueError(f"unknown open_clip model {name!r}; {nearest(name, names)}")
    config = json.loads(path.read_text(encoding="utf-8"))
    text, vision = config["text_cfg"], config["vision_cfg"]
    unknown = [
        *(set(config) - {"embed_dim", "quick_gelu", "text_cfg", "vision_cfg"}),
        *(set(text) - TEXT_KEYS),
        *(set(vision) - VISION_KEYS),
    ]
    if unknown or not isinstance(vision["layers"], int):
        raise ValueError(
            f"{name!r}: expected two plain transformers, got"
            f" {', '.join(sorted(unknown)) or 'a ResNet as the image tower'}"
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
    """Return an open_clip model in evaluation mode.

    Args:
        name: open_clip's name of the architecture, such as "ViT-L-14-quickgelu".
        pretrained: A file of weights in the layout of open_clip, OpenAI or Hugging Face; a tag that
            open_clip publishes, such as "laion2b_s32b_b79k", which it downloads once; or None for random
            weights. With a tag, the activation and the mean and standard deviation of pixels are the tag's.
        dtype: Floating-point type of the weights. Default: float32.

    Raises:
        ValueError: If the name or the tag is unknown (the message offers the nearest), the tag's images are
            resized otherwise than bicubically to the shortest side, or a file does not fit.
        FileNotFoundError: If ``pretrained`` is a path without a file.
    """
    config = open_clip_config(name)
    if pretrained is None:
        return CLIP(config).to(dtype).eval()
    path = Path(pretrained)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise FileNotFoundError(f"no such file: {str(pretrained)!r}")
        config, path = _tag_weights(name, str(pretrained), config)
    state, _ = read_tensors(path)
    with on_meta():
        model = CLIP(config)
    load_strict(model, to_clip(model, state, source=path), source=path, dtype=dtype)
    return model.eval()


def _tag_weights(name: str, tag: str, config: CLIPConfig) -> tuple[CLIPConfig, Path]:
    """Return the configuration of a tag's weights, and the file that open_clip downloads."""
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    about = get_pretrained_cfg(name, tag)
    if not about:
        raise ValueError(
            f"unknown tag {tag!r} of {name!r}, and no such file;"
            f" {nearest(tag, list_pretrained_tags_by_model(name))}"
        )
    if about["interpolation"] != "bicubic" or about["resize_mode"] != "shortest":
        raise ValueError(
            f"{name!r} with {tag!r} resizes images by {about['interpolation']}, {about['resize_mode']};"
            " expected bicubic, shortest"
        )
    activation: Activation = "quick_gelu" if about.get("quick_gelu") else "gelu"
    vision = replace(config.vision, activation=activation, mean=tuple(about["mean"]), std=tuple(about["std"]))
    return CLIPConfig(text=replace(config.text, activation=activation), vision=vision), Path(
        download_pretrained(about)
    )
