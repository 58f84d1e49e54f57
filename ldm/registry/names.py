"""The names of models: `list_models`, `register`."""

from __future__ import annotations

from pathlib import Path

from ldm.catalog.cards import ModelCard
from ldm.catalog.lookup import REGISTERED, embedded, known_cards, read_card
from ldm.catalog.unclip_cards import PriorCard, UnCLIPCard


def list_models() -> list[str]:
    """The names that `load` knows, sorted: the embedded models, the published ones, and those that were
    registered."""
    return sorted({*embedded(), *known_cards()})


def register(path: str | Path) -> ModelCard | UnCLIPCard | PriorCard:
    """Make a model of one's own known to `load` and `list_models`, by its card in a YAML file.

    The file states the fields of `ModelCard` (or of `UnCLIPCard`, `PriorCard`); ``base: NAME`` takes those
    that it leaves out from another card. ValueError for a card that is wrong, or a name that an embedded or
    published model has.
    """
    card = read_card(path)
    if card.name in embedded() or (card.name in known_cards() and card.name not in REGISTERED):
        raise ValueError(f"{str(path)!r}: the name {card.name!r} is taken by a model of the library")
    REGISTERED[card.name] = card
    return card
