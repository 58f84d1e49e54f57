"""What every noun may mean, for finding the things that a prompt names by longest match."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple

from ldm.data.index import ImageIndex
from ldm.data.nouns import names_colour, plural, uncoloured


class NounSense(NamedTuple):
    """One meaning of a noun.

    Attributes:
        name: The name of the thing in the index.
        plural: Whether the noun is a plural, which is counted.
        uncoloured: Whether the noun lacks the colour word of the name, which another colour replaces.
    """

    name: str
    plural: bool = False
    uncoloured: bool = False


def noun_table(index: ImageIndex) -> dict[str, tuple[NounSense, ...]]:
    """Return for every noun phrase that a caption can contain, and more, the things that it may mean.

    Phrases are names, labels and specific tags, plurals of names and labels, and all of these without a
    leading colour word. They are in alphabetical order. The senses of a phrase are sorted: first those with
    the names' own colours, singulars before plurals, and in each of these names before labels before tags.
    """
    ranked: dict[str, set[tuple[tuple[bool, bool, int], NounSense]]] = {}
    for name in index.rows_of:
        counted = index.counted_nouns(name)
        for rank, noun in enumerate(index.nouns(name)):
            plain = uncoloured(noun)
            for bare, form in ((False, noun), (True, plain))[
                : 1 + (plain != noun and not names_colour(noun))
            ]:
                for many in (False, True)[: 1 + (noun in counted)]:
                    found = plural(form) if many else form
                    if found is not None:
                        order = (bare, many, min(rank, len(counted)))
                        sense = NounSense(name, plural=many, uncoloured=bare)
                        ranked.setdefault(found, set()).add((order, sense))
    return {noun: tuple(dict.fromkeys(sense for _, sense in sorted(ranked[noun]))) for noun in sorted(ranked)}


def head_nouns(names: Iterable[str], taken: Container[str]) -> dict[str, tuple[str, ...]]:
    """Return the last word of names of several words, and its plural, with the names that it may mean.

    "car" may mean "police-car" and "racing-car".

    Args:
        names: The names.
        taken: Words that mean something else.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        *_, head = words = name.split("-")
        many = plural(head)
        if len(words) > 1 and many is not None and head.isalpha() and not head.endswith(("ing", "ed")):
            for noun in (head, many):
                if len(noun) > 2 and noun not in taken:
                    found.setdefault(noun, []).append(name)
    return {noun: tuple(sorted(found[noun])) for noun in sorted(found)}
