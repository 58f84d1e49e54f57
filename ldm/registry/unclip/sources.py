"""Read the networks of unCLIP models from folders in ldm and diffusers layout; see `originals` for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.catalog.unclip_cards import UnCLIPCard
from ldm.registry.sources import Source, part_dtype, part_shapes, random_networks, read_parts
from ldm.registry.unclip.layouts import PipelineComponent, check_component, components
from ldm.weights.formats.diffusers_folder import read_component
from ldm.weights.formats.diffusers_hashes import folder_hashes
from ldm.weights.formats.ldm_folder import about_part
from ldm.weights.hashing import FileHashes
from ldm.weights.parts import build_network, fill_network
from ldm.weights.rules.prior import STATISTICS_KEYS, with_statistics

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
    found = components(card, path)
    networks, origin = {}, FileHashes({})
    scale = card.latent_scale or 1.0
    for part, config in card.networks.configs().items():
        if part not in found:
            if part in OPTIONAL:
                continue
            raise FileNotFoundError(
                f"{str(path)!r} has no {part} of {card.name!r}; it has {', '.join(found)}"
            )
        state, about, files = read_components(part, found[part], config, variant)
        origin = origin.joined(folder_hashes(path, files))
        source = found[part][0].path
        if part == "prior":
            stated = STATISTICS_KEYS[0] in state
            state = with_statistics(state, [state[name] for name in STATISTICS_KEYS] if stated else None)
        if part == "noise":
            check_noise_statistics(state, source)
        if part == "vae" and card.latent_scale != 1.0:  # MoVQ's scaling_factor is not used
            scale = float(about.get("scaling_factor") or scale)
        networks[part] = fill_network(
            build_network(config), state, "diffusers", source=source, dtype=part_dtype(part, dtype)
        )
    pieces = next((c.path.parent / "tokenizer" for c in found.get("words", ())), None)
    return Source(networks=networks, latent_scale=scale, origin=origin, pieces=pieces)


def read_components(
    part: str, sources: tuple[PipelineComponent, ...], config: object, variant: str | None
) -> tuple[dict[str, Tensor], Mapping[str, Any], list[Path]]:
    """Read the components that make up one part.

    Args:
        part: The part's name, for messages.
        sources: Its components. If there are several, each one's tensors are prefixed by its name.
        config: The part's configuration, which the components' config.json must agree with.
        variant: Variant of the files; None for the plain ones.

    Returns:
        The tensors, the config.json of the first component that has one, and the files read.
    """
    state: dict[str, Tensor] = {}
    first: Mapping[str, Any] = {}
    files: list[Path] = []
    for source in sources:
        component = read_component(source.path, variant=variant)
        check_component(part, config, component)
        prefix = f"{source.name}." if len(sources) > 1 else ""
        state |= {prefix + key: tensor for key, tensor in component.tensors.items()}
        files += component.files
        first = first or component.config
    return state, first, files


def check_noise_statistics(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError if Stable unCLIP's noise augmentation lacks its mean or standard deviation."""
    if missing := [name for name in ("mean", "std") if name not in state]:
        raise ValueError(
            f"{str(path)!r} lacks the statistics of CLIP's image embeddings: {', '.join(missing)}"
        )
