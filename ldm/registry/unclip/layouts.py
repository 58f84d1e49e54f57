"""unCLIP models in diffusers layout: which component holds which part, and what must agree with the card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm.catalog.cards import DiffusionCard
from ldm.catalog.unclip_cards import UnCLIPCard
from ldm.support.config import nearest
from ldm.support.strict_json import read_json
from ldm.weights.formats import diffusers_folder as folder
from ldm.weights.formats.diffusers_stated import check_training, scheduler_warnings, training_conflicts

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
    "image_noising_scheduler": "noise",
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
    """A sub-folder of a pipeline's folder: its name and class in model_index.json, and its path."""

    name: str
    path: Path
    class_name: str


def pipelines(path: Path) -> list[Path]:
    """Return the folder if it is that of a pipeline, otherwise the sub-folders that are."""
    return (
        [path]
        if folder.is_folder(path)
        else sorted(inner for inner in path.iterdir() if folder.is_folder(inner))
    )


def components(
    card: UnCLIPCard, path: Path
) -> tuple[dict[str, tuple[PipelineComponent, ...]], tuple[str, ...]]:
    """Return the components of each part, in the folder of a pipeline or in several folders, and warnings.

    If several folders hold a part, the first one counts.

    Raises:
        ValueError: If a pipeline is of another family, or was trained otherwise than the card states.
    """
    known = UNCLIP_PIPELINES[card.family]
    found: dict[str, tuple[PipelineComponent, ...]] = {}
    notes: tuple[str, ...] = ()
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
            value = index.get(name)
            if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], str):
                continue
            if name.endswith("scheduler"):
                notes += check_scheduler(card, part, place / name, value[1])
            elif part not in found:
                component = PipelineComponent(name=name, path=place / name, class_name=value[1])
                parts.setdefault(part, []).append(component)
        found |= {part: tuple(those) for part, those in parts.items()}
    return found, notes


def check_scheduler(card: UnCLIPCard, part: str, path: Path, class_name: str) -> tuple[str, ...]:
    """Compare the scheduler in ``path`` with how the card states that a part was trained.

    Args:
        card: The model's card.
        part: The stage that it serves, or "noise" for the noise augmentation.
        path: Its folder.
        class_name: Its class, as the pipeline names it.

    Returns:
        Warnings about the sampling that it states and the card does not.

    Raises:
        ValueError: If it states another training.
    """
    stated = {**folder.read_scheduler(path), "_class_name": class_name}
    where, stage, notes = f"{str(path)!r}", card.stages().get(part), tuple[str, ...]()
    try:
        wrong = []
        if isinstance(stage, DiffusionCard):
            wrong = check_training(stated, stage)
            notes = scheduler_warnings(stated, stage, where)
        elif part == "noise" and card.networks is not None and card.networks.noise is not None:
            levels = card.networks.noise.timesteps
            facts = {"num_train_timesteps": levels, "beta_schedule": "squaredcos_cap_v2"}
            wrong = training_conflicts(stated, facts)
    except ValueError as error:
        wrong = [str(error)]
    if wrong:
        raise ValueError(
            f"{where} states another training of the {part} than {card.name!r}: {'; '.join(wrong)}; without"
            " the scheduler in model_index.json, that of the card counts"
        )
    return notes
