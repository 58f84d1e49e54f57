"""Read the networks of latent diffusion models and autoencoders from files and folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.catalog.cards import AutoencoderCard, Card, ModelCard
from ldm.catalog.lookup import known_cards
from ldm.models.unet import UNet
from ldm.registry.sources import (
    Source,
    part_dtype,
    part_shapes,
    random_networks,
    read_parts,
    states_zero_terminal_snr,
)
from ldm.support.warn import warn_user
from ldm.weights.detection import WrongFamily
from ldm.weights.formats.diffusers_check import check_component
from ldm.weights.formats.diffusers_folder import read_component
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
    folders = None if folder is None else card.part_folders(folder)
    shapes = part_shapes(card, folders)
    return Source(
        networks=random_networks(shapes, dtype),
        latent_scale=card.latent_scale or 1.0,
        origin={"random": "seed 0"},
        folder=None if folders is None else folders.get("text"),
        folders=folders or {},
    )


def latent_from_ldm(card: ModelCard, folder: Path, dtype: torch.dtype) -> Source:
    """Read a folder in the ldm layout."""
    return read_parts(card, folder, dtype, latent_scale=card.latent_scale)


def latent_from_file(
    card: ModelCard, path: Path, dtype: torch.dtype, *, ema: bool | None, asked: bool = False
) -> Source:
    """Read a single file in the original layout.

    Args:
        card: The model's card.
        path: The file.
        dtype: Floating-point type of the networks.
        ema: Whether to take averaged weights; None takes them if present.
        asked: Whether the card's prediction is the user's. Default: False.

    Raises:
        ValueError: If the file belongs to another family, lacks a part, does not fit, states what cannot be
            followed, or does not state the latent scale where the card leaves it to the file.
    """
    if card.family == "latent":
        raise ValueError(
            f"{str(path)!r}: {card.name!r} is of no published family, so its weights come as a folder in the"
            " ldm layout"
        )
    hashes = FileHashes({path.name: path})
    networks, single = networks_from_file(card, path, dtype, ema=ema, asked=asked)
    stated = single.stated
    if stated.schedule is None:
        zero = states_zero_terminal_snr(single.tables, card.schedule, path)
        stated = stated._replace(zero_terminal_snr=stated.zero_terminal_snr or zero)
    if stated.negated:
        negate_output(networks["unet"])
    scales = (stated.latent_scale, single.scale_factor, card.latent_scale)
    scale = next((each for each in scales if each is not None), None)
    if scale is None:
        raise ValueError(
            f"{str(path)!r} does not state the latent scale of {card.name!r}: its `scale_factor` is absent"
        )
    return Source(
        networks=networks,
        latent_scale=scale,
        origin=hashes,
        folder=path.parent,
        notes=(*prediction_notes(card, single.values), *single.notes),
        stated=stated,
    )


def negate_output(network: nn.Module) -> None:
    """Negate the output of a UNet that returns −v, exactly, so that it returns v."""
    assert isinstance(network, UNet)
    for parameter in network.conv_out.parameters():
        parameter.data = -parameter.data


def networks_from_file(
    card: Card, path: Path, dtype: torch.dtype, *, ema: bool | None, asked: bool = False
) -> tuple[dict[str, nn.Module], SingleFile]:
    """Return the networks in a single file in the original layout, and the rest of what it holds.

    Args:
        card: Card of the model, or of the autoencoder.
        path: The file.
        dtype: Floating-point type of the networks.
        ema: Whether to take averaged weights; None takes them if present.
        asked: Whether the user states the prediction, so that the file's counts no more. Default: False.

    Raises:
        ValueError: If the file belongs to another family, lacks a part, or does not fit.
    """
    shapes = card.shapes()
    try:
        single = read_single(path, ema=ema, family=card.family, asked=asked)
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


def cards_of_family(family: str) -> str:
    """Return the names of a family's cards as the end of an error message; empty if there are none."""
    others = [card.name for card in known_cards().values() if card.family == family]
    return f"; the cards for it: {', '.join(others)}" if others else ""


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
    for note in check_component("vae", card.config(), component):
        warn_user(note)
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
