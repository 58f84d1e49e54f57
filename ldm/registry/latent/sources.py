"""Read the networks of latent diffusion models and autoencoders from files and folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.catalog.cards import AutoencoderCard, Card, ModelCard
from ldm.catalog.lookup import known_cards
from ldm.models.unet import UNetConfig
from ldm.registry.sources import Source, part_dtype, part_shapes, random_networks, read_parts
from ldm.weights.detection import WrongFamily
from ldm.weights.formats.diffusers_config import conflicts, scheduler_conflicts, unet_config
from ldm.weights.formats.diffusers_folder import Folder, read_component, read_folder
from ldm.weights.formats.diffusers_hashes import FolderCheck
from ldm.weights.formats.single_file import SingleFile, read_single
from ldm.weights.hashing import FileHashes
from ldm.weights.parts import build_network, fill_network

BASE_STEP = 875_000  # the `global_step` in the checkpoints of Stable Diffusion 2 base, which predicts eps


def latent_from_random(card: ModelCard, dtype: torch.dtype, folder: Path | None = None) -> Source:
    """Return random weights in the card's shapes, the same in every call.

    Args:
        card: The model's card.
        dtype: Floating-point type of the networks.
        folder: Folder of an embedded model, for its shapes and its tokenizer; None if it is not embedded.
    """
    shapes = part_shapes(card, None if folder is None else card.part_folders(folder))
    return Source(
        networks=random_networks(shapes, dtype),
        latent_scale=card.latent_scale or 1.0,
        origin={"random": "seed 0"},
        folder=folder,
    )


def latent_from_ldm(card: ModelCard, folder: Path, dtype: torch.dtype) -> Source:
    """Read a folder in the ldm layout."""
    return replace(read_parts(card, folder, dtype, latent_scale=card.latent_scale), folder=folder)


def latent_from_file(card: ModelCard, path: Path, dtype: torch.dtype, *, ema: bool | None) -> Source:
    """Read a single file in the original layout.

    Args:
        card: The model's card.
        path: The file.
        dtype: Floating-point type of the networks.
        ema: Whether to take averaged weights; None takes them if present.

    Raises:
        ValueError: If the file belongs to another family, lacks a part, does not fit, or does not state the
            latent scale where the card leaves it to the file.
    """
    if card.family == "latent":
        raise ValueError(
            f"{str(path)!r}: {card.name!r} is of no published family, so its weights come as a folder in the"
            " ldm layout"
        )
    hashes = FileHashes({path.name: path})
    networks, single = networks_from_file(card, path, dtype, ema=ema)
    scale = card.latent_scale if single.scale_factor is None else single.scale_factor
    if scale is None:
        raise ValueError(
            f"{str(path)!r} does not state the latent scale of {card.name!r}: its `scale_factor` is absent"
        )
    return Source(
        networks=networks,
        latent_scale=scale or 1.0,
        origin=hashes,
        folder=path.parent,
        notes=prediction_notes(card, single.values),
        stated=single.stated,
    )


def networks_from_file(
    card: Card, path: Path, dtype: torch.dtype, *, ema: bool | None
) -> tuple[dict[str, nn.Module], SingleFile]:
    """Return the networks in a single file in the original layout, and the rest of what it holds.

    Args:
        card: Card of the model, or of the autoencoder.
        path: The file.
        dtype: Floating-point type of the networks.
        ema: Whether to take averaged weights; None takes them if present.

    Raises:
        ValueError: If the file belongs to another family, lacks a part, or does not fit.
    """
    shapes = card.shapes()
    try:
        single = read_single(path, ema=ema, family=card.family)
    except WrongFamily as error:
        raise ValueError(f"{error}{cards_of_family(error.found.name)}") from None
    missing = [part for part in shapes if part not in single.parts]
    if missing:
        raise ValueError(
            f"{str(path)!r} holds {', '.join(single.parts)}, and no {', '.join(missing)}: {card.name!r} takes"
            f" {', '.join(shapes)}"
        )
    networks = {
        part: fill_network(
            build_network(config),
            single.parts.pop(part),
            single.found.layout,
            source=f"{path}: {part}" if len(shapes) > 1 else path,
            dtype=part_dtype(part, dtype),
        )
        for part, config in shapes.items()
    }
    return networks, single


def prediction_notes(card: ModelCard, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a warning if the `global_step` of a Stable Diffusion 2 file contradicts the prediction."""
    step = values.get("global_step")
    if card.family != "sd2" or step is None or (step == BASE_STEP) == (card.prediction == "eps"):
        return ()
    return (
        f"its global_step {step} is that of a model that predicts {'eps' if step == BASE_STEP else 'v'}, but"
        f" the card states {card.prediction}",
    )


def latent_from_diffusers(card: ModelCard, path: Path, dtype: torch.dtype, *, variant: str | None) -> Source:
    """Read a folder in diffusers layout.

    Args:
        card: The model's card.
        path: The folder, with its model_index.json.
        dtype: Floating-point type of the networks.
        variant: Variant of the files, such as "fp16"; None for the plain ones.

    Raises:
        FileNotFoundError: If a part is absent.
        ValueError: If the folder contradicts the card, or its weights do not fit.
    """
    shapes = card.shapes()
    if "class" in shapes:
        raise ValueError(
            f"{str(path)!r}: {card.name!r} has no diffusers layout; its weights come as a single file"
        )
    check_latent_scheduler(card, read_folder(path, parts=()))
    folder = read_folder(path, variant=variant, parts=tuple(shapes))
    check_unet(card, folder, shapes["unet"])
    files = [file for part in shapes for file in folder.parts[part].files]
    check = FolderCheck(path, files)
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
    scale = folder.parts["vae"].config.get("scaling_factor") or card.latent_scale
    return Source(
        networks=networks,
        latent_scale=1.0 if scale is None else float(scale),
        origin=check.finish(),
        folder=path / "tokenizer",
    )


def cards_of_family(family: str) -> str:
    """Return the names of a family's cards as the end of an error message; empty if there are none."""
    others = [card.name for card in known_cards().values() if card.family == family]
    return f"; the cards for it: {', '.join(others)}" if others else ""


def check_unet(card: ModelCard, folder: Folder, expected: object) -> None:
    """Raise ValueError if a diffusers folder holds another UNet than the card states.

    Args:
        card: The model's card.
        folder: The folder, read.
        expected: The card's configuration of the UNet.
    """
    assert isinstance(expected, UNetConfig)
    unet = folder.parts["unet"]
    try:
        found = folder.detect()
    except ValueError:
        found = None  # the shapes of a user's own card: only the keys decide
    if found is not None and found.name != card.family:
        raise ValueError(
            f"{str(folder.path)!r} is a model of the family {found.name} ({found.family.title}),"
            f" {card.name!r} is of {card.family}{cards_of_family(found.name)}"
        )
    wrong = conflicts(unet.config, unet_config(expected)[1], ("attention_head_dim",))
    if wrong:
        raise ValueError(f"{str(unet.path / 'config.json')!r} does not fit {card.name!r}: {'; '.join(wrong)}")


def check_latent_scheduler(card: ModelCard, folder: Folder) -> None:
    """Raise ValueError if a diffusers folder's scheduler states another training than the card."""
    stated = folder.schedulers.get("scheduler")
    if stated is not None and (wrong := scheduler_conflicts(stated, card)):
        raise ValueError(
            f"{str(folder.path / 'scheduler')!r} states another training than {card.name!r}:"
            f" {'; '.join(wrong)}; load the card that states this training, pass prediction= if nothing else"
            " differs, or register a card"
        )


def autoencoder_from_file(
    card: AutoencoderCard, path: Path, dtype: torch.dtype, *, ema: bool | None
) -> nn.Module:
    """Return the autoencoder in a single file in the original layout."""
    return networks_from_file(card, path, dtype, ema=ema)[0]["vae"]


def autoencoder_from_folder(
    card: AutoencoderCard, path: Path, dtype: torch.dtype, *, variant: str | None
) -> nn.Module:
    """Return the autoencoder in its own diffusers folder, or in that of a pipeline that contains it."""
    inner = next((path / name for name in ("vae", "vqvae") if (path / name).is_dir()), path)
    component = read_component(inner, variant=variant)
    check = None if inner == path else FolderCheck(path, component.files, (inner.name,))
    network = fill_network(
        build_network(card.config()),
        component.tensors,
        "diffusers",
        source=inner,
        dtype=part_dtype("vae", dtype),
    )
    if check is not None:
        check.finish()
    return network
