"""The folders of diffusers that hold unCLIP models: which component is which of our parts, and what must
agree with the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.catalog.unclip_cards import StageCard, UnCLIPCard
from ldm.models.clip.towers import TextConfig, VisionConfig
from ldm.models.text.xlmr import XLMRConfig
from ldm.models.unclip.decoder import DecoderConfig
from ldm.models.unclip.prior import PriorConfig
from ldm.models.unet import UNetConfig
from ldm.support.config import nearest
from ldm.weights.formats import diffusers_folder as folder
from ldm.weights.formats.diffusers_config import conflicts, text_config, training_facts, unet_config

# class of the pipeline: component → part; a scheduler's is the stage that it serves
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
UNCLIP_SCHEDULER_FIELDS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "prediction_type",
)


@dataclass(frozen=True, kw_only=True)
class PipelineComponent:
    """A sub-folder of a pipeline's folder."""

    name: str
    path: Path


def pipelines(path: Path) -> list[Path]:
    """The folder, if it is one of a pipeline, else those in it that are."""
    return (
        [path]
        if folder.is_folder(path)
        else sorted(inner for inner in path.iterdir() if folder.is_folder(inner))
    )


def components(card: UnCLIPCard, path: Path) -> dict[str, tuple[PipelineComponent, ...]]:
    """The components of each part, in the folder of a pipeline or in several together; the first that has a
    part counts.

    ValueError for a pipeline of another family, or one that was trained otherwise than the card says.
    """
    known, found = UNCLIP_PIPELINES[card.family], {}
    for place in pipelines(path):
        index = folder.read_json(place / "model_index.json")
        kind = str(index.get("_class_name"))
        if kind not in known:
            raise ValueError(
                f"{str(place)!r} is a folder of {kind}, which holds no part of {card.name!r};"
                f" {nearest(kind, known)}"
            )
        listed = [
            name for name in known[kind] if isinstance(index.get(name), list) and index[name][1] is not None
        ]
        parts: dict[str, list[PipelineComponent]] = {}
        for name in listed:
            part = known[kind][name]
            if name.endswith("scheduler"):
                _check_scheduler(card, part, place / name)
            elif part not in found:
                parts.setdefault(part, []).append(PipelineComponent(name=name, path=place / name))
        found |= {part: tuple(those) for part, those in parts.items()}
    return found


def _check_scheduler(card: UnCLIPCard, part: str, path: Path) -> None:
    stage = {"decoder": card.decoder, "prior": card.prior, "upsampler": next(iter(card.upsamplers), None)}[
        part
    ]
    stated = folder.read_json(path / "scheduler_config.json")
    if not isinstance(stage, StageCard) or stated.get("trained_betas") is not None:
        return
    s = stage.schedule
    facts = training_facts(s.kind, s.timesteps, s.beta_start, s.beta_end, stage.prediction, zero_snr=False)
    if wrong := conflicts(stated, facts, UNCLIP_SCHEDULER_FIELDS):
        raise ValueError(
            f"{str(path)!r} says the {part} was trained otherwise than {card.name!r}: {'; '.join(wrong)}"
        )


def check_component(part: str, config: Any, component: folder.Component) -> None:
    """ValueError where a component's config.json differs from our shape in what the shapes of tensors cannot
    tell."""
    if wrong := conflicts(component.config, _expected(config), tuple(_expected(config))):
        raise ValueError(
            f"{str(component.path / 'config.json')!r} does not fit the {part}: {'; '.join(wrong)}"
        )


def _expected(config: Any) -> Mapping[str, Any]:
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
