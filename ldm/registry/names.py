"""List the names of models, and register new ones."""

from __future__ import annotations

from pathlib import Path

from ldm.catalog.lookup import REGISTERED, ReadCard, embedded, known_cards, read_card


def list_models() -> list[str]:
    """Return the names of all models that `ldm.load` knows, sorted."""
    return sorted({*embedded(), *known_cards()})


def register(path: str | Path) -> ReadCard:
    """Make a model known to `ldm.load` and `ldm.list_models` by its card in a YAML file.

    Args:
        path: The file. It states the fields of `ModelCard`, `UnCLIPCard`, `PriorCard` or `DalleCard`, or
            ``base: NAME`` and the fields that differ from the card called NAME.

    Returns:
        The card. It replaces a card that was registered under the same name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a field is wrong, or the name is that of an embedded or published model.
    """
    card = read_card(path)
    if card.name in embedded() or (card.name in known_cards() and card.name not in REGISTERED):
        raise ValueError(f"{str(path)!r}: the name {card.name!r} is taken by a model of the library")
    REGISTERED[card.name] = card
    return card
