"""Networks with their weights, wherever they come from; random weights and the ldm layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.catalog.cards import Card, ScheduleCard
from ldm.support.config import config_sha256
from ldm.weights.formats.ldm_folder import (
    about_part,
    check_part_hash,
    fill_part,
    read_part_config,
)
from ldm.weights.formats.ldm_model import CARD_FILE, part_files
from ldm.weights.hashing import FileHashes, check_hashes
from ldm.weights.parts import build_network, randomise
from ldm.weights.stated import Stated

NO_HASHES = (
    "its card states no sha256 of its parts, so that parts of another model would not be noticed; save the"
    " model again to add them"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The networks of a model in their final dtype, and what else is read with them.

    Args:
        networks: The networks by part.
        latent_scale: Factor between the autoencoder's latents and those that are diffused.
        origin: What a recipe records of the weights: SHA-256 by part or file.
        folder: Folder in which the files of the tokenizer may be; None for random weights.
        library: Folder of the library of exemplars; None if there is none.
        pieces: XLM-R's tokenizer.json or its folder; None if there is none.
        notes: Warnings about the weights.
        stated: What the weights state about their use.
    """

    networks: Mapping[str, nn.Module]
    latent_scale: float
    origin: Mapping[str, str]
    folder: Path | None = None
    library: Path | None = None
    pieces: Path | None = None
    notes: tuple[str, ...] = ()
    stated: Stated = Stated()


def origin_of(card: Card, source: Source, tokenizers: Mapping[str, Path]) -> Mapping[str, str]:
    """Return what recipes record of a model: the SHA-256 of its files, and as "card" that of its settings.

    The settings are the card's, the configurations of the networks, and the latent scale.

    Args:
        card: The card.
        source: The networks.
        tokenizers: Files of tokenizers by name.
    """
    networks = {part: network.config for part, network in source.networks.items()}
    settings = {"card": card.settings(), "networks": networks, "scale": source.latent_scale}
    known = FileHashes(tokenizers).joined({"card": config_sha256(settings)})
    return known.joined(source.origin)


def part_dtype(part: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a part: autoencoders overflow in float16 and compute in float32 instead."""
    return torch.float32 if part == "vae" and dtype == torch.float16 else dtype


def part_shapes(card: Card, folders: Mapping[str, Path] | None) -> dict[str, object]:
    """Return the network configurations by part: those of the card, else those in the parts' YAMLs.

    Args:
        card: The model's card.
        folders: Folder of each part in the ldm layout; None if there is none.

    Raises:
        ValueError: If neither states them.
    """
    if shapes := card.shapes():
        return shapes
    if folders is None:
        raise ValueError(
            f"the card {card.name!r} states no shapes: its weights come as a folder in the ldm layout, with a"
            " YAML file for each part"
        )
    return {part: read_part_config(folder, part) for part, folder in folders.items()}


def random_networks(configs: Mapping[str, object], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return networks with random weights, the same in every call: part i has seed i."""
    return {
        part: randomise(build_network(config), seed, part_dtype(part, dtype))
        for seed, (part, config) in enumerate(configs.items())
    }


def read_parts(card: Card, folder: Path, dtype: torch.dtype, *, latent_scale: float | None) -> Source:
    """Read the parts of a model in the ldm layout, and compare their files with those that the card states.

    Args:
        card: The model's card.
        folder: The folder of the card.
        dtype: Floating-point type of the networks.
        latent_scale: The card's scale; that of the autoencoder's YAML takes precedence.

    Raises:
        FileNotFoundError: If a part is absent.
        ValueError: If the weights of a part do not fit its YAML, or a file is not the one that the card or
            the YAML was written with.
    """
    folders = card.part_folders(folder)
    abouts = {part: about_part(place, part) for part, place in folders.items()}
    files = part_files(folders)
    hashes = FileHashes(files)
    networks = {
        part: fill_part(place, part, abouts[part], dtype=part_dtype(part, dtype))
        for part, place in folders.items()
    }
    if card.files is not None:
        check_hashes(card.files, hashes, folder / CARD_FILE)
    for part, place in folders.items():
        check_part_hash(place, part, abouts[part], hashes)
    scale = abouts.get("vae", {}).get("latent_scale") or latent_scale or 1.0
    names = {f"{part}.safetensors": part for part in folders}
    return Source(
        networks=networks,
        latent_scale=float(scale),
        origin=hashes.renamed({name: names.get(name, name) for name in files if not name.endswith(".yaml")}),
        folder=folders.get("text"),
        library=folders.get("layout"),
        notes=() if card.files is not None else (NO_HASHES,),
    )


def states_zero_terminal_snr(tables: Mapping[str, Tensor], schedule: ScheduleCard, path: Path) -> bool:
    """Return whether the buffers of a file are those of the card's schedule with zero terminal SNR.

    Args:
        tables: The file's `alphas_cumprod` and `betas`, as far as it has them.
        schedule: The card's schedule.
        path: The file, for messages.

    Raises:
        ValueError: If they are those of another schedule.
    """
    choices = {False: schedule.make(), True: replace(schedule, zero_terminal_snr=True).make()}
    for name, table in tables.items():
        own = table.detach().double().flatten()
        wanted = {zero: getattr(made, name) for zero, made in choices.items()}
        bars = own if name == "alphas_cumprod" else (1 - own).cumprod(0)
        tolerance = torch.finfo(table.dtype).eps / 2 + 1e-4 if table.is_floating_point() else 0.0
        for zero, made in choices.items():
            bar = made.alphas_cumprod
            if bar.shape == bars.shape and bool(((bar - bars).abs() <= tolerance).all()):
                if zero and not schedule.zero_terminal_snr:
                    return True
                break
        else:
            raise ValueError(
                f"{str(path)!r}: its {name} are not those of the card's schedule ({len(own)} from"
                f" {float(wanted[False][0]):.4g} to {float(wanted[False][-1]):.4g} were expected): register a"
                " card that states their schedule"
            )
    return False
