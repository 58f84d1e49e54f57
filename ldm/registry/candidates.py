"""The cards that a file of weights may belong to, and how its keys fit them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm.catalog.cards import Card
from ldm.catalog.lookup import known_cards
from ldm.weights.detection import Detection
from ldm.weights.keymap import Fit, Shape, Table, fit_table
from ldm.weights.parts import build_network, part_table, shapes_of


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One or several cards with the same networks, to compare a file with.

    Args:
        name: Names of the cards.
        parts: For each part, the rule table of the file's layout and the network's names and shapes.
    """

    name: str
    parts: Mapping[str, tuple[Table, Mapping[str, Shape]]]


Candidates = Callable[[Detection], Iterable[Candidate]]  # detected family -> candidates

# Families of files that hold some parts of a model: the families of cards that these may belong to.
PART_OF = {
    "karlo-prior": ("karlo", "kandinsky21"),
    "karlo-decoder": ("karlo",),
    "karlo-sr": ("karlo",),
    "kandinsky21": ("kandinsky21",),
    "kandinsky22": ("kandinsky22",),
    "movq": ("kandinsky21", "kandinsky22"),
    "dalle-mini": ("dalle-mini",),
    "dalle-mini-encoder": ("dalle-mini",),
    "dalle-mini-decoder": ("dalle-mini",),
}


def card_candidates(found: Detection) -> Iterable[Candidate]:
    """Yield the known cards of a detected family; those with the same networks are one candidate."""
    names: dict[tuple[tuple[str, object], ...], list[str]] = {}
    for card in known_cards().values():
        if networks := card_networks(card, found):
            names.setdefault(tuple(networks.items()), []).append(card.name)
    for networks_of_cards, cards in names.items():
        parts = {}
        for part, config in networks_of_cards:
            network = build_network(config)
            hugging_face = found.layout == "diffusers" or found.family.parts[part].endswith("transformer.")
            keys = ("text_model.", "vision_model.") if hugging_face else ()
            parts[part] = (part_table(network, found.layout, keys), shapes_of(network))
        yield Candidate(name=", ".join(cards), parts=parts)


def card_networks(card: Card, found: Detection) -> dict[str, object]:
    """Return a card's network configurations by the detected family's parts; empty for another family."""
    if card.family not in PART_OF.get(found.name, (found.name,)):
        return {}
    shapes = card.shapes()
    names = {theirs: ours for theirs, ours in card.file_parts().items() if ours in shapes}
    if found.name in PART_OF:
        names = {theirs: ours for theirs, ours in names.items() if theirs in found.family.parts}
    return {theirs: shapes[ours] for theirs, ours in names.items()}


def fit_candidates(
    candidates: Candidates, found: Detection | None, parts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Fit]]:
    """Compare the parts of a file with the candidates of its family.

    Args:
        candidates: The candidates of a family.
        found: The detected family; None if there is none.
        parts: The file's tensors by part.

    Returns:
        How the keys fit, by candidate and part; empty without a family.
    """
    if found is None:
        return {}
    have = {name: tensor_shapes(part) for name, part in parts.items()}
    return {
        candidate.name: {
            name: fit_table(table, have.get(name, {}), shapes)
            for name, (table, shapes) in candidate.parts.items()
        }
        for candidate in candidates(found)
    }


def tensor_shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the shapes of tensors by name."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}
