"""Forms of a noun phrase: its plural, and the phrase without a leading colour word."""

from __future__ import annotations

import re

from ldm.data.palette import PALETTE

# singular and plural, where no rule gives the plural
_IRREGULAR_WORDS = """
axis axes, bison bison, buffalo buffaloes, bus buses, cactus cacti, child children, deer deer, die dice, elf
elves, foot feet, gas gases, goose geese, hero heroes, jeans jeans, knife knives, leaf leaves, lens lenses,
loaf loaves, man men, mango mangoes, merman mermen, merperson merpeople, moose moose, mosquito mosquitoes,
mouse mice, ox oxen, person people, potato potatoes, scarf scarves, sheaf sheaves, sheep sheep, squid squid,
superhero superheroes, tomato tomatoes, tooth teeth, tornado tornadoes, volcano volcanoes, wolf wolves,
woman women
"""
IRREGULAR: dict[str, str] = dict(pair.split() for pair in _IRREGULAR_WORDS.split(","))
PAIRS = frozenset("glasses gloves goggles jeans pants scissors shorts socks sunglasses trousers".split())
"""Nouns that are counted in pairs."""
BUNCHES = frozenset({"grapes", "cherries"})
"""Nouns that are counted in bunches."""
# last words of phrases that are not counted: substances, sports, states, signs, names
_UNCOUNTED_WORDS = """
100 africa americas anger aquarius aries asia-australia away bacon badminton bald baldness beard biking
bowling bread broccoli butter camping cancer capricorn claus construction cooking crossing customs dark
divide dizzy dna done down eighteen equals evil feeding fire fog foggy food fuji garlic gemini ginger hair
haired hockey horizontally hugging ice infinity information joy lacrosse laughing left leo libra light
lightning lis litter locked lowercase luggage minus money multiply off oil ok ophiuchus pisces plus pong
popcorn prohibited racing radioactive rain rice right sagittarius sake salt scorpio skis snow spaghetti
struck sushi taurus tennis thunder together underage unlocked up uppercase vertically virgo voltage volume
water way wireless wood wrestling zzz
"""
UNCOUNTED = frozenset(_UNCOUNTED_WORDS.split())
_PREPOSITIONS = frozenset(
    "with without of in on for from over under at to behind above below between through showing without"
    " increasing decreasing".split()
)
_TURNED = frozenset({"facing", "pointing", "pointed", "tilted"})  # before a direction: prepositions too
_DIRECTIONS = frozenset({"up", "down", "left", "right"})
_AGENTS = frozenset({"man", "woman", "person", "face", "head", "leaf", "arrow"})  # before what they are doing
_COLOURS = frozenset({*PALETTE, "brown"})


def plural(phrase: str) -> str | None:
    """Return the plural of a noun phrase, or None if it is not counted.

    The head is the last word before the first preposition, or the word for a person before what the person is
    doing: "slices of pizza", "women running".
    """
    words = phrase.split()
    if not words or words[0] == "no" or words[0].isdigit() or not {"and", "the", "or"}.isdisjoint(words):
        return None
    head = _head(words)
    if words[head] in PAIRS | BUNCHES:
        unit = "pairs of" if words[head] in PAIRS else "bunches of"
        return f"{unit} {phrase}" if head == len(words) - 1 else None
    made = _plural_noun(words[head])
    return None if made is None else " ".join([*words[:head], made, *words[head + 1 :]])


def takes_article(phrase: str) -> bool:
    """Return whether "a" or "an" can stand before a noun phrase: whether it is counted one by one."""
    many = plural(phrase)
    return many is not None and not many.endswith(f" of {phrase}")


def _head(words: list[str]) -> int:
    """Return the position of the word that a plural changes."""
    end = len(words)
    for i in range(1, len(words)):
        turned = words[i] in _TURNED and i + 1 < len(words) and words[i + 1] in _DIRECTIONS
        if words[i] in _PREPOSITIONS or turned:
            end = i
            break
    agents = [i for i in range(end - 1) if words[i] in _AGENTS]
    # "woman running", "person mountain biking", "face savoring food"; but "man office worker"
    doing = [i for i in agents if words[i + 1].endswith("ing") or words[end - 1].endswith("ing")]
    return doing[0] if doing else end - 1


def _plural_noun(noun: str) -> str | None:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun in UNCOUNTED or noun in IRREGULAR.values() or len(noun) < 2 or not noun[-1].isalpha():
        return None
    if noun.endswith("man"):
        return noun.removesuffix("an") + "en"
    if noun.endswith("fish"):
        return noun
    if re.search(r"(?<![suio])s$", noun):
        return None  # a plural already
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def uncoloured(phrase: str) -> str:
    """Return a noun phrase without the colour word that it begins with: "apple" for "red apple"."""
    first, _, rest = phrase.partition(" ")
    return rest if rest and first in _COLOURS else phrase


def names_colour(phrase: str) -> bool:
    """Return whether a noun phrase names a colour, apart from the word that it begins with."""
    return not _COLOURS.isdisjoint(uncoloured(phrase).split())
