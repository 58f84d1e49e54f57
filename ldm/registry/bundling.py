"""Bundle a card and the exports of trainings into the folder of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.catalog.cards import Card, Kind, ModelCard
from ldm.catalog.dalle_cards import DalleCard
from ldm.catalog.lookup import parse_card
from ldm.catalog.unclip_cards import UnCLIPCard
from ldm.registry.dalle.reading import assemble_tokens
from ldm.registry.dalle.sources import tokens_from_ldm
from ldm.registry.latent.assembly import assemble_latent
from ldm.registry.latent.sources import latent_from_ldm
from ldm.registry.part_checks import check_latent_parts, check_unclip_parts
from ldm.registry.saving import INDEX_FILES, files_of_models
from ldm.registry.unclip.assembly import assemble_unclip
from ldm.registry.unclip.sources import unclip_from_ldm
from ldm.support.config import nearest, read_yaml
from ldm.support.files import staged_folder, write_atomically
from ldm.support.text import shown
from ldm.weights.formats.exemplar_file import LIBRARY_EMBEDDINGS
from ldm.weights.formats.ldm_folder import VOCABULARY, WORDS_VOCABULARY, about_part
from ldm.weights.formats.ldm_model import LIBRARY_FILES, write_card


def check_latent(card: ModelCard, folder: Path) -> None:
    """Check that the parts in a folder fit the card of a latent diffusion model and each other."""
    check_latent_parts(card, folder)
    assemble_latent(card, latent_from_ldm(card, folder, torch.float32))


def check_unclip(card: UnCLIPCard, folder: Path) -> None:
    """Check that the parts in a folder fit the card of an unCLIP model and each other."""
    check_unclip_parts(card, folder)
    assemble_unclip(card, unclip_from_ldm(card, folder, torch.float32))


def check_tokens(card: DalleCard, folder: Path) -> None:
    """Check that the parts in a folder fit the card of a model of image tokens and each other."""
    assemble_tokens(card, tokens_from_ldm(card, folder, torch.float32))


# The files that an export has beside a part.
BESIDE_PARTS: Mapping[str, tuple[str, ...]] = {
    "text": (VOCABULARY,),
    "layout": LIBRARY_FILES,
    "words": (WORDS_VOCABULARY, LIBRARY_EMBEDDINGS),
}
# The check of each kind of model that can be bundled; its first argument is a card of that kind, hence Any.
CHECKS: Mapping[Kind, Callable[[Any, Path], None]] = {
    "latent": check_latent,
    "unclip": check_unclip,
    "tokens": check_tokens,
}


def gather(config: str | Path, folder: str | Path) -> Path:
    """Bundle the card and the exports that a YAML file names; see `bundle`.

    Args:
        config: A YAML file with the fields of a `ModelCard`, an `UnCLIPCard` or a `DalleCard`, and
            `exports`, the folder of each part. Parts of another model's folder are named in the card's
            `parts`, relative to `folder`.
        folder: The folder to write.
    """
    mapping = dict(read_yaml(config))
    exports = mapping.pop("exports", None)
    card = parse_card(mapping, config)
    if card.kind not in CHECKS:
        raise ValueError(
            f"{str(config)!r}: expected the card of a {' or '.join(CHECKS)} model, got one of the family"
            f" {card.family!r}"
        )
    if not isinstance(exports, Mapping) or not all(isinstance(source, str) for source in exports.values()):
        raise ValueError(
            f"{str(config)!r}: exports: expected a mapping of parts to folders, got {shown(exports)}"
        )
    check_part_names(card, exports, f"{str(config)!r}: exports")
    return bundle(card, exports, folder)


def bundle(card: Card, exports: Mapping[str, str | Path], folder: str | Path) -> Path:
    """Write the folder of a model, which `ldm.load(weights=folder)` reads.

    Args:
        card: The model's card.
        exports: The folder of each part.
        folder: The folder to write.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If a part is absent. The folder is as it was.
        ValueError: If a part was trained for another CLIP, schedule, prediction or size than the card states,
            or does not fit the others. The folder is as it was.
    """
    folder, card = Path(folder), replace(card, files=None)
    with staged_folder(folder, INDEX_FILES, files_of_models) as stage:
        for part, source in exports.items():
            about_part(source, part)  # raises FileNotFoundError with a hint
            for name in (f"{part}.safetensors", f"{part}.yaml", *BESIDE_PARTS.get(part, ())):
                write_atomically(stage / name, (Path(source) / name).read_bytes())
        CHECKS[card.kind](card, stage)
        write_card(stage, card)
    return folder


def check_part_names(card: Card, exports: Mapping[str, object], where: str) -> None:
    """Raise ValueError for a name that is no part of a card's model; `where` begins the message."""
    known = card.part_names()
    for part in exports:
        if part not in known:
            raise ValueError(f"{where}: {part!r}; {nearest(part, known)}")
