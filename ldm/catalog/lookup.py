"""Cards by name: the embedded models', the published ones', and those that a user registers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.catalog.cards import AutoencoderCard, ModelCard
from ldm.catalog.families import FAMILIES
from ldm.catalog.published import CARDS
from ldm.catalog.published_unclip import PRIOR_CARDS, UNCLIP_CARDS
from ldm.catalog.unclip_cards import UNCLIP_FAMILIES, PriorCard, StageCard, UnCLIPCard
from ldm.samplers.conventions import Convention
from ldm.support.config import build, nearest, read_yaml

ASSETS = Path(__file__).parents[1] / "assets"
Card = ModelCard | AutoencoderCard | UnCLIPCard | PriorCard


def read_card(path: str | Path) -> ModelCard | UnCLIPCard | PriorCard:
    """The card in a YAML file, on top of the one that its ``base`` names; ValueError says what is wrong in
    it.

    Its family, or its base's, says of which kind it is: an `UnCLIPCard` for those of
    `ldm.catalog.unclip_cards.UnCLIPFamily`, a `PriorCard` for "dalle2-prior", else a `ModelCard`.
    """
    return parse_card(read_yaml(path), path)


def parse_card(mapping: Mapping[str, Any], source: str | Path) -> ModelCard | UnCLIPCard | PriorCard:
    """The card of a mapping; ``source``: the file that it is from, for messages. See `read_card`."""
    mapping = dict(mapping)
    if "base" in mapping:
        base, _ = find_card(mapping.pop("base"))
        own = (
            {"parts": {}}
            if isinstance(base, UnCLIPCard)
            else {}
            if isinstance(base, PriorCard)
            else {"folder": None}
        )
        mapping = {**vars(base), "hub": None, **own, **mapping}  # its weights are not the new model's
    if isinstance(convention := mapping.get("convention"), Mapping):
        mapping["convention"] = build(Convention, convention, "convention")
    family = mapping.get("family")
    try:
        return build(
            UnCLIPCard if family in UNCLIP_FAMILIES else PriorCard if family == "dalle2-prior" else ModelCard,
            mapping,
        )
    except ValueError as error:
        raise ValueError(f"{str(source)!r}: {error}") from None


def embedded() -> dict[str, Path]:
    """The models inside the package: name → folder."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/card.yaml"))}


REGISTERED: dict[str, ModelCard | UnCLIPCard | PriorCard] = {}


def known_cards() -> dict[str, Card]:
    """The cards without embedded weights: the published families', then those that a user registered."""
    return {**CARDS, **UNCLIP_CARDS, **PRIOR_CARDS, **REGISTERED}


def find_model(name: str) -> ModelCard | StageCard:
    """How a model is sampled: its card, or that of unCLIP's decoder, or of a prior alone; ValueError for an
    autoencoder, or an unknown name."""
    card, _ = find_card(name)
    if isinstance(card, AutoencoderCard):
        raise ValueError(f"{name!r} is an autoencoder alone: it has no sampler and no schedule")
    return (
        card.decoder if isinstance(card, UnCLIPCard) else card.prior if isinstance(card, PriorCard) else card
    )


def find_card(name: str) -> tuple[Card, Path | None]:
    """The card of a model and the folder of its embedded weights, None if it has none; ValueError with the
    nearest name if there is no such model."""
    models = embedded()
    if name in models:
        return read_card(models[name] / "card.yaml"), models[name]
    cards = known_cards()
    if name in cards:
        return cards[name], None
    if name in FAMILIES:
        raise ValueError(
            f"{name!r} ({FAMILIES[name].title}) is a family of files that is known, but there is no model of"
            " it to load"
        )
    raise ValueError(f"unknown model {name!r}; {nearest(name, (*models, *cards))}")
