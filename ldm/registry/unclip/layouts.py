"""unCLIP models in diffusers layout: which component holds which part, and what must agree with the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.catalog.cards import DiffusionCard
from ldm.catalog.unclip_cards import UnCLIPCard
from ldm.models.clip.towers import TextConfig, VisionConfig
from ldm.models.text.xlmr import XLMRConfig
from ldm.models.unclip.decoder import DecoderConfig
from ldm.models.unclip.prior import PriorConfig
from ldm.models.unet import UNetConfig
from ldm.support.config import nearest
from ldm.support.strict_json import read_json
from ldm.weights.formats import diffusers_folder as folder
from ldm.weights.formats.diffusers_config import conflicts, scheduler_conflicts, text_config, unet_config

# Class of the pipeline: component -> part; the part of a scheduler is the stage that it serves.
UPSAMPLED = {
    "decoder": "decoder",
    "text_proj": "decoder",
    "super_res_first": "upsampler",
    "super_res_last": "upsampler-last",
    "text_encoder": "text",
    "decoder_scheduler": "decoder",
    "super_res_scheduler": "upsampler",
}
STABLE_COMPONENTS = {
    "unet": "decoder",
    "vae": "vae",
    "text_encoder": "words",
    "image_normalizer": "noise",
    "scheduler": "decoder",
}
KANDINSKY_PRIOR = {"prior": "prior", "text_encoder": "text", "image_encoder": "vision", "scheduler": "prior"}
KANDINSKY22_COMPONENTS = {"unet": "decoder", "movq": "vae", "scheduler": "decoder"}
KANDINSKY21_COMPONENTS = {**KANDINSKY22_COMPONENTS, "text_encoder": "words"}
COMBINED = {f"prior_{name}": part for name, part in KANDINSKY_PRIOR.items()}
UNCLIP_PIPELINES: dict[str, dict[str, dict[str, str]]] = {
    "karlo": {
        "UnCLIPPipeline": {**UPSAMPLED, "prior": "prior", "prior_scheduler": "prior"},
        "UnCLIPImageVariationPipeline": {**UPSAMPLED, "image_encoder": "vision"},
    },
    "kandinsky21": {
        "KandinskyPriorPipeline": KANDINSKY_PRIOR,
        **dict.fromkeys(
            ("KandinskyPipeline", "KandinskyImg2ImgPipeline", "KandinskyInpaintPipeline"),
            KANDINSKY21_COMPONENTS,
        ),
        **dict.fromkeys(
            ("KandinskyCombinedPipeline", "KandinskyInpaintCombinedPipeline"),
            {**KANDINSKY21_COMPONENTS, **COMBINED},
        ),
    },
    "kandinsky22": {
        "KandinskyV22PriorPipeline": KANDINSKY_PRIOR,
        **dict.fromkeys(
            ("KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline", "KandinskyV22InpaintPipeline"),
            KANDINSKY22_COMPONENTS,
        ),
        **dict.fromkeys(
            ("KandinskyV22CombinedPipeline", "KandinskyV22InpaintCombinedPipeline"),
            {**KANDINSKY22_COMPONENTS, **COMBINED},
        ),
    },
    **dict.fromkeys(
        ("sd21-unclip-h", "sd21-unclip-l"),
        {
            "StableUnCLIPPipeline": {
                **STABLE_COMPONENTS,
                "prior": "prior",
                "prior_text_encoder": "text",
                "prior_scheduler": "prior",
            },
            "StableUnCLIPImg2ImgPipeline": {**STABLE_COMPONENTS, "image_encoder": "vision"},
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class PipelineComponent:
    """A sub-folder of a pipeline's folder: its name in model_index.json and its path."""

    name: str
    path: Path


def pipelines(path: Path) -> list[Path]:
    """Return the folder if it is that of a pipeline, otherwise the sub-folders that are."""
    return (
        [path]
        if folder.is_folder(path)
        else sorted(inner for inner in path.iterdir() if folder.is_folder(inner))
    )


def components(card: UnCLIPCard, path: Path) -> dict[str, tuple[PipelineComponent, ...]]:
    """Return the components of each part, in the folder of a pipeline or in several folders together.

    If several folders hold a part, the first one counts.

    Raises:
        ValueError: If a pipeline is of another family, or was trained otherwise than the card states.
    """
    known = UNCLIP_PIPELINES[card.family]
    found: dict[str, tuple[PipelineComponent, ...]] = {}
    for place in pipelines(path):
        index = read_json(place / "model_index.json")
        class_name = str(index.get("_class_name"))
        if class_name not in known:
            raise ValueError(
                f"{str(place)!r} is a folder of {class_name}, which holds no part of {card.name!r};"
                f" {nearest(class_name, known)}"
            )
        parts: dict[str, list[PipelineComponent]] = {}
        for name, part in known[class_name].items():
            if not isinstance(index.get(name), list) or index[name][1] is None:
                continue
            if name.endswith("scheduler"):
                check_stage_scheduler(card, part, place / name)
            elif part not in found:
                parts.setdefault(part, []).append(PipelineComponent(name=name, path=place / name))
        found |= {part: tuple(those) for part, those in parts.items()}
    return found


def check_stage_scheduler(card: UnCLIPCard, part: str, path: Path) -> None:
    """Raise ValueError if the scheduler in ``path`` states another training of a part than the card."""
    stage = card.stages().get(part)
    stated = read_json(path / "scheduler_config.json")
    if isinstance(stage, DiffusionCard) and (wrong := scheduler_conflicts(stated, stage)):
        raise ValueError(
            f"{str(path)!r} states another training of the {part} than {card.name!r}: {'; '.join(wrong)}"
        )


def check_component(part: str, config: object, component: folder.Component) -> None:
    """Raise ValueError if a component's config.json differs from a part's configuration.

    Only facts that the shapes of the tensors do not determine are compared.
    """
    expected = expected_config(config)
    if wrong := conflicts(component.config, expected, tuple(expected)):
        raise ValueError(
            f"{str(component.path / 'config.json')!r} does not fit the {part}: {'; '.join(wrong)}"
        )


def expected_config(config: object) -> Mapping[str, Any]:
    """Return the entries of config.json that the shapes of a network's tensors do not determine."""
    if isinstance(config, PriorConfig):
        return {"num_attention_heads": config.heads, "attention_head_dim": config.head_dim}
    if isinstance(config, DecoderConfig):
        return {"attention_head_dim": config.unet.head_dim}
    if isinstance(config, TextConfig):
        return {key: text_config(config)[1][key] for key in ("num_attention_heads", "hidden_act")}
    if isinstance(config, VisionConfig):
        return {
            "num_attention_heads": config.heads,
            "hidden_act": config.activation,
            "image_size": config.image_size,
        }
    if isinstance(config, XLMRConfig):
        return {"num_attention_heads": config.heads}
    if isinstance(config, UNetConfig) and config.takes_context:
        return {"attention_head_dim": unet_config(config)[1]["attention_head_dim"]}
    return {}
