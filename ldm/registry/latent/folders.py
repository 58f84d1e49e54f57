"""Read latent diffusion models from folders in diffusers layout, and what their configurations state."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.catalog.cards import ModelCard
from ldm.models.clip.towers import TextConfig
from ldm.models.tiny import TinyConfig
from ldm.models.vae import VAEConfig
from ldm.models.vq import VQConfig
from ldm.registry.latent.sources import cards_of_family, negate_output
from ldm.registry.sources import Source, part_dtype
from ldm.weights.fields.judge import conflicts, judge_fields, named, warnings_of
from ldm.weights.fields.pipelines import COMPONENTS, PIPELINE_OPTIONS, is_xl
from ldm.weights.formats.diffusers_check import check_component
from ldm.weights.formats.diffusers_config import training_facts
from ldm.weights.formats.diffusers_folder import Folder, read_folder
from ldm.weights.formats.diffusers_hashes import FolderCheck
from ldm.weights.formats.diffusers_stated import (
    latent_statement,
    scheduler_warnings,
    stated_training,
    tokenizer_statement,
    training_conflicts,
)
from ldm.weights.parts import build_network, fill_network
from ldm.weights.stated import Stated

TOKENIZERS = {"text": "tokenizer", "text2": "tokenizer_2"}


def latent_from_diffusers(
    card: ModelCard, path: Path, dtype: torch.dtype, *, variant: str | None, asked: bool = False
) -> Source:
    """Read a folder in diffusers layout.

    Args:
        card: The model's card.
        path: The folder, with its model_index.json.
        dtype: Floating-point type of the networks.
        variant: Variant of the files, such as "fp16"; None for the plain ones.
        asked: Whether the card's prediction is the user's. Default: False.

    Raises:
        FileNotFoundError: If a part is absent.
        ValueError: If the folder contradicts the card, states what cannot be followed, or its weights do not
            fit.
    """
    shapes = card.shapes()
    if "class" in shapes:
        raise ValueError(
            f"{str(path)!r}: {card.name!r} has no diffusers layout; its weights come as a single file"
        )
    index = read_folder(path, parts=())
    stated, notes = pipeline_statement(card, index)
    trained, more = training_statement(card, index, asked=asked)
    stated = trained._replace(zero_negative=stated.zero_negative, pad=stated.pad, pad2=stated.pad2)
    folder = read_folder(path, variant=variant, parts=tuple(shapes))
    check_folder_family(card, folder)
    notes += more
    for part, config in shapes.items():
        notes += check_component(part, config, folder.parts[part])
    stated = with_latents(stated, folder, shapes["vae"])
    check = FolderCheck(path, [file for part in shapes for file in folder.parts[part].files])
    networks = {
        part: fill_network(
            build_network(config),
            folder.parts[part].tensors,
            "diffusers",
            source=folder.parts[part].path,
            dtype=part_dtype(part, dtype),
        )
        for part, config in shapes.items()
    }
    if stated.negated:
        negate_output(networks["unet"])
    scale = card.latent_scale if stated.latent_scale is None else stated.latent_scale
    return Source(
        networks=networks,
        latent_scale=1.0 if scale is None else scale,
        origin=check.finish(),
        folder=path / "tokenizer",
        notes=notes,
        stated=stated,
    )


def with_latents(stated: Stated, folder: Folder, config: object) -> Stated:
    """Return a statement with the scale and the statistics of the latents that a folder's autoencoder states.

    Args:
        stated: The statement of the scheduler, on which the scale depends.
        folder: The folder, read.
        config: Configuration of the autoencoder.

    Raises:
        ValueError: If they are no numbers, or exclude each other; the message names the file.
    """
    assert isinstance(config, VAEConfig | VQConfig | TinyConfig)
    vae = folder.parts["vae"]
    sigmas = None if stated.schedule is None else stated.schedule.sigmas
    try:
        latents = latent_statement(
            vae.config, config.latent_channels, sigma_data=None if sigmas is None else sigmas[2]
        )
    except ValueError as error:
        raise ValueError(f"{str(vae.path / 'config.json')!r}: {error}") from None
    return stated._replace(
        latent_scale=latents.latent_scale, latent_mean=latents.latent_mean, latent_std=latents.latent_std
    )


def pipeline_statement(card: ModelCard, folder: Folder) -> tuple[Stated, tuple[str, ...]]:
    """Return what a pipeline's options and its tokenizers state, and warnings.

    Args:
        card: The model's card.
        folder: The folder, without its parts.

    Raises:
        ValueError: If they state another model than the card.
    """
    where = f"{str(folder.path / 'model_index.json')!r}"
    findings = judge_fields(
        folder.options, PIPELINE_OPTIONS, {"requires_aesthetics_score": card.vector == "aesthetic"}
    )
    if wrong := conflicts(findings):
        raise ValueError(f"{where} states another model than {card.name!r}: {'; '.join(wrong)}")
    zero = folder.options.get("force_zeros_for_empty_prompt")
    if zero is None and is_xl(folder.class_name):
        zero = True
    if zero is not None and not isinstance(zero, bool):
        raise ValueError(f"{where}: force_zeros_for_empty_prompt {named(zero)}, expected true or false")
    notes = warnings_of(findings, where)
    notes += tuple(
        f"{where} names the component {named(name)}, which is not known and not loaded"
        for name in folder.components
        if name not in COMPONENTS
    )
    stated = Stated(zero_negative=zero)
    for part, name in TOKENIZERS.items():
        convention = card.text if part == "text" else card.text2
        if convention is None or not isinstance(card.shapes().get(part), TextConfig):
            continue
        pad, more = tokenizer_statement(folder.path / name, convention.length)
        stated = stated._replace(pad=pad) if part == "text" else stated._replace(pad2=pad)
        notes += more
    return stated, notes


def training_statement(card: ModelCard, folder: Folder, *, asked: bool) -> tuple[Stated, tuple[str, ...]]:
    """Return how a folder's scheduler states that the UNet was trained, and warnings.

    Args:
        card: The model's card.
        folder: The folder, without its parts.
        asked: Whether the card's prediction is the user's.

    Raises:
        ValueError: If no card can state this training, if the user asks for another prediction, or if the
            scheduler of the upscaler's noise is another.
    """
    where = f"{str(folder.path / 'scheduler')!r}"
    low = folder.schedulers.get("low_res_scheduler")
    if low is not None and card.concat == "lowres-noised":
        facts = {key: value for key, value in training_facts(card).items() if key != "prediction_type"}
        if wrong := training_conflicts(low, facts):
            raise ValueError(
                f"{str(folder.path / 'low_res_scheduler')!r} states another noise than {card.name!r}:"
                f" {'; '.join(wrong)}"
            )
    given = folder.schedulers.get("scheduler")
    if given is None:
        return Stated(), ()
    try:
        stated = stated_training(given, card)
    except ValueError as error:
        raise ValueError(
            f"{where} states a training that {card.name!r} cannot follow: {error}; without the scheduler in"
            " model_index.json, that of the card counts"
        ) from None
    if asked and stated.prediction != card.prediction:
        raise ValueError(
            f"{where} states another training than was asked for: prediction_type"
            f" {named(given.get('prediction_type', 'epsilon'))}, expected"
            f" {training_facts(card)['prediction_type']}; leave prediction= out to follow it"
        )
    return stated, scheduler_warnings(given, card, where)


def check_folder_family(card: ModelCard, folder: Folder) -> None:
    """Raise ValueError if a diffusers folder holds the UNet of another family than the card's."""
    try:
        found = folder.detect()
    except ValueError:
        return  # the shapes of a user's own card: only the keys decide
    if found.name != card.family:
        raise ValueError(
            f"{str(folder.path)!r} is a model of the family {found.name} ({found.family.title}),"
            f" {card.name!r} is of {card.family}{cards_of_family(found.name)}"
        )
