"""Read the networks of unCLIP models from folders in ldm and diffusers layout; see `originals` for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.catalog.unclip_cards import UnCLIPCard
from ldm.models.clip.towers import TextConfig, VisionConfig
from ldm.models.vae import VAEConfig
from ldm.registry.sources import Source, part_dtype, part_shapes, random_networks, read_parts
from ldm.registry.unclip.layouts import PipelineComponent, components, pipelines
from ldm.support.strict_json import read_json
from ldm.weights.formats.diffusers_check import check_component, check_processor
from ldm.weights.formats.diffusers_folder import read_component
from ldm.weights.formats.diffusers_hashes import folder_hashes
from ldm.weights.formats.diffusers_stated import latent_statement, tokenizer_statement
from ldm.weights.formats.ldm_folder import about_part
from ldm.weights.hashing import FileHashes
from ldm.weights.parts import build_network, fill_network
from ldm.weights.rules.prior import STATISTICS_KEYS, with_statistics
from ldm.weights.stated import Stated

PROCESSORS = ("feature_extractor", "image_processor", "prior_image_processor")
OPTIONAL = ("text", "vision", "prior")  # a model without one of these parts loads, and offers fewer tasks


def unclip_from_random(card: UnCLIPCard, dtype: torch.dtype, folder: Path | None = None) -> Source:
    """Return random weights in the card's shapes, the same in every call.

    Args:
        card: The model's card.
        dtype: Floating-point type of the networks.
        folder: Folder of an embedded model, for its shapes and its tokenizer; None if it is not embedded.
    """
    folders = None if folder is None else card.part_folders(folder)
    return Source(
        networks=random_networks(part_shapes(card, folders), dtype),
        latent_scale=card.latent_scale or 1.0,
        origin={"random": "seed 0"},
        folder=None if folders is None else folders.get("text"),
        folders=folders or {},
    )


def unclip_from_ldm(card: UnCLIPCard, folder: Path, dtype: torch.dtype) -> Source:
    """Read a folder in the ldm layout.

    Raises:
        FileNotFoundError: If a part is absent.
        ValueError: If a part was trained on another CLIP than the card's, or its weights do not fit.
    """
    folders = card.part_folders(folder)
    for part, where in folders.items():
        clip = about_part(where, part).get("clip", card.clip)
        if clip != card.clip:
            raise ValueError(
                f"{part} in {str(where)!r} was trained on {clip!r}, the card uses {card.clip!r}: two CLIPs"
                " do not share an embedding space"
            )
    source = read_parts(card, folder, dtype, latent_scale=card.latent_scale)
    return replace(source, pieces=folders.get("words", folder) / "words-tokenizer.json")


def unclip_from_diffusers(card: UnCLIPCard, path: Path, dtype: torch.dtype, *, variant: str | None) -> Source:
    """Read a folder in diffusers layout, or one that holds several (Kandinsky's prior and decoder).

    Args:
        card: The model's card.
        path: The folder.
        dtype: Floating-point type of the networks.
        variant: Variant of the files, such as "fp16"; None for the plain ones.

    Raises:
        FileNotFoundError: If a part is absent.
        ValueError: If a folder is that of another model, or its weights do not fit.
    """
    if card.networks is None:
        raise ValueError(
            f"{str(path)!r}: {card.name!r} is of no published family, so its weights come as a folder in the"
            " ldm layout"
        )
    found, notes = components(card, path)
    networks, origin = {}, FileHashes({})
    scale = card.latent_scale or 1.0
    for part, config in card.networks.configs().items():
        if part not in found:
            if part in OPTIONAL:
                continue
            raise FileNotFoundError(
                f"{str(path)!r} has no {part} of {card.name!r}; it has {', '.join(found)}"
            )
        state, about, files, more = read_components(part, found[part], config, variant)
        notes += more
        origin = origin.joined(folder_hashes(path, files))
        source = found[part][0].path
        if part == "prior":
            stated = STATISTICS_KEYS[0] in state
            state = with_statistics(state, [state[name] for name in STATISTICS_KEYS] if stated else None)
        if part == "noise":
            check_noise_statistics(state, source)
        if part == "vae" and card.latent_scale != 1.0:  # MoVQ's scaling_factor is not used
            scale = stated_scale(about, config, source) or scale
        networks[part] = fill_network(
            build_network(config), state, "diffusers", source=source, dtype=part_dtype(part, dtype)
        )
    for place in pipelines(path):
        notes += check_processors(card, place)
    pieces = next((c.path.parent / "tokenizer" for c in found.get("words", ())), None)
    return Source(
        networks=networks,
        latent_scale=scale,
        origin=origin,
        pieces=pieces,
        notes=notes,
        stated=Stated(pad=words_padding(card, found)),
    )


def words_padding(card: UnCLIPCard, found: Mapping[str, tuple[PipelineComponent, ...]]) -> int | None:
    """Return the padding token of the decoder's own text encoder; None if it is not read by CLIP's tokenizer.

    Args:
        card: The model's card.
        found: The components by part.

    Raises:
        ValueError: If a tokenizer of a CLIP tower is another than CLIP's.
    """
    pad = None
    for part, convention in (("text", card.text), ("words", card.words)):
        if part not in found or not isinstance(card.shapes().get(part), TextConfig):
            continue
        encoder = found[part][0]
        place = encoder.path.parent / encoder.name.replace("text_encoder", "tokenizer")
        stated, _ = tokenizer_statement(place, convention.length)
        if part == "words":
            pad = stated
        elif stated not in (None, convention.pad) and not convention.masked:
            raise ValueError(f"{str(place)!r}: its texts are padded with {stated}, expected {convention.pad}")
    return pad


def check_processors(card: UnCLIPCard, folder: Path) -> tuple[str, ...]:
    """Compare how a pipeline's images are prepared for CLIP with the image tower; return warnings.

    Raises:
        ValueError: If it states other pixels.
    """
    vision = card.shapes().get("vision")
    notes: tuple[str, ...] = ()
    for name in PROCESSORS:
        path = folder / name / "preprocessor_config.json"
        if isinstance(vision, VisionConfig) and path.is_file():
            notes += check_processor(read_json(path), vision, f"{str(path)!r}")
    return notes


def read_components(
    part: str, sources: tuple[PipelineComponent, ...], config: object, variant: str | None
) -> tuple[dict[str, Tensor], Mapping[str, Any], list[Path], tuple[str, ...]]:
    """Read the components that make up one part.

    Args:
        part: The part's name, for messages.
        sources: Its components. If there are several, each one's tensors are prefixed by its name.
        config: The part's configuration, which the components' config.json must agree with.
        variant: Variant of the files; None for the plain ones.

    Returns:
        The tensors, the config.json of the first component that has one, the files read, and warnings.
    """
    state: dict[str, Tensor] = {}
    first: Mapping[str, Any] = {}
    files: list[Path] = []
    notes: tuple[str, ...] = ()
    for source in sources:
        component = read_component(source.path, variant=variant, class_name=source.class_name)
        notes += check_component(part, config, component)
        prefix = f"{source.name}." if len(sources) > 1 else ""
        state |= {prefix + key: tensor for key, tensor in component.tensors.items()}
        files += component.files
        first = first or component.config
    return state, first, files, notes


def stated_scale(stated: Mapping[str, Any], config: object, path: Path) -> float | None:
    """Return the scale of the latents that an autoencoder states; None if it states none.

    Raises:
        ValueError: If it is not a positive number, or statistics of the latents are stated too.
    """
    assert isinstance(config, VAEConfig)
    try:
        latents = latent_statement(stated, config.latent_channels)
    except ValueError as error:
        raise ValueError(f"{str(path / 'config.json')!r}: {error}") from None
    if latents.latent_mean or latents.latent_std:
        raise ValueError(
            f"{str(path / 'config.json')!r}: latents_mean, latents_std and shift_factor: no card of an unCLIP"
            " model states them, expected none of them"
        )
    return latents.latent_scale


def check_noise_statistics(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError if Stable unCLIP's noise augmentation lacks its mean or standard deviation."""
    if missing := [name for name in ("mean", "std") if name not in state]:
        raise ValueError(
            f"{str(path)!r} lacks the statistics of CLIP's image embeddings: {', '.join(missing)}"
        )
