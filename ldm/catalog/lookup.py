"""Find a card by name among the embedded, the published and the registered models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.catalog.cards import Card, DiffusionCard, ModelCard
from ldm.catalog.dalle_cards import DALLE_CARDS, TOKEN_FAMILIES, DalleCard
from ldm.catalog.families import FAMILIES
from ldm.catalog.published import CARDS
from ldm.catalog.published_unclip import PRIOR_CARDS, UNCLIP_CARDS
from ldm.catalog.unclip_cards import UNCLIP_FAMILIES, PriorCard, UnCLIPCard
from ldm.support.config import build, check_sizes, convert, nearest, read_yaml
from ldm.support.text import escaped, shown

ASSETS = Path(__file__).parents[1] / "assets"
ReadCard = ModelCard | UnCLIPCard | PriorCard | DalleCard  # what a YAML file may hold
REGISTERED: dict[str, ReadCard] = {}  # the cards that a user registered, by name


def read_card(path: str | Path) -> ReadCard:
    """Return the card in a YAML file.

    The family decides the kind of card: an `UnCLIPCard` for the families of
    `ldm.catalog.unclip_cards.UnCLIPFamily`, a `DalleCard` for those of
    `ldm.catalog.dalle_cards.TokenFamily`, a `PriorCard` for "dalle2-prior", otherwise a `ModelCard`. With
    ``base: NAME`` the fields that the file leaves out are those of the card called NAME, except where its
    weights are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a field is unknown, missing or wrong; the message names the file and the field.
    """
    return parse_card(read_yaml(path), path)


def parse_card(mapping: Mapping[str, Any], source: str | Path) -> ReadCard:
    """Return the card of a mapping; see `read_card`. ``source`` is the file that error messages name."""
    mapping = dict(mapping)
    try:
        if "base" in mapping:
            base, _ = find_card(convert(mapping.pop("base"), str, "base"))
            mapping = {**base.inherited(), **mapping}
        card = build(card_class(mapping.get("family")), mapping)
        check_card(card)
    except ValueError as error:
        raise ValueError(f"{shown(str(source))}: {escaped(error)}") from None
    return card


def check_card(card: Card) -> None:
    """Check what a card's fields together state.

    Raises:
        ValueError: If a network would be implausibly large, a schedule cannot be made, or the place of a part
            is stated that such a model does not have; the message names the part.
    """
    for part in card.parts:
        if part not in card.part_names():
            raise ValueError(f"parts: {shown(part)}; {nearest(part, card.part_names())}")
    for part, config in card.shapes().items():
        check_sizes(config, part)
    for part, stage in card.stages().items():
        if isinstance(stage, DiffusionCard):
            try:
                stage.schedule.make()
            except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
                raise ValueError(f"schedule of {part}: {escaped(error, 300)}") from None


def card_class(family: object) -> type[ModelCard] | type[UnCLIPCard] | type[PriorCard] | type[DalleCard]:
    """Return the class of the cards of a family."""
    if family in UNCLIP_FAMILIES:
        return UnCLIPCard
    if family in TOKEN_FAMILIES:
        return DalleCard
    return PriorCard if family == "dalle2-prior" else ModelCard


def embedded() -> dict[str, Path]:
    """Return the folders of the models inside the package, by name."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/card.yaml"))}


def known_cards() -> dict[str, Card]:
    """Return the cards without embedded weights: published ones first, then registered ones."""
    return {**CARDS, **UNCLIP_CARDS, **PRIOR_CARDS, **DALLE_CARDS, **REGISTERED}


def find_model(name: str) -> DiffusionCard:
    """Return how the model called ``name`` is sampled: for unCLIP, how its decoder is.

    Raises:
        ValueError: If the name is unknown, or that of an autoencoder.
    """
    return find_card(name)[0].main_stage()


def find_card(name: str) -> tuple[Card, Path | None]:
    """Return the card called ``name``, and the folder of its embedded weights or None.

    Raises:
        ValueError: If there is no such model; the message offers the nearest name.
    """
    models = embedded()
    if name in models:
        return read_card(models[name] / "card.yaml"), models[name]
    cards = known_cards()
    if name in cards:
        return cards[name], None
    if name in FAMILIES:
        raise ValueError(
            f"{shown(name)} ({FAMILIES[name].title}) is a family of files that is known, but no model that"
            " can be loaded"
        )
    raise ValueError(f"unknown model {shown(name)}; {nearest(name, (*models, *cards))}")
