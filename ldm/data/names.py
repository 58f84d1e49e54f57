"""One name for each thing over all icon sets, and emojibase's labels and tags."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.data.facts import Style

# skin tones, flags, keys, clocks, letters, families: hundreds of near-copies, or images of text
LEFT_OUT = re.compile(
    r"skin-tone|flag|-button|o-clock|oclock|clock-face|keycap|thirty|^[0-9a-z*#]$|letter|squared|ideograph|symbol|regional|tag-|tone-?\d"
    r"|-(light|medium|dark)|family-|couple|kiss-|copyright|registered|trade-mark"
)
# icons whose own names no rule relates to the names of the other sets
RENAMED: dict[Style, dict[str, str]] = {
    "fluent": {
        "man-blonde-hair": "man-blond-hair",
        "person-blonde-hair": "person-blond-hair",
        "woman-blonde-hair": "woman-blond-hair",
        "man-deaf": "deaf-man",
        "person-deaf": "deaf-person",
        "woman-deaf": "deaf-woman",
        "man-merpeople": "merman",
        "person-merpeople": "merperson",
        "woman-merpeople": "mermaid",
        "man-with-bunny-ears": "men-with-bunny-ears",
        "person-with-bunny-ears": "people-with-bunny-ears",
        "woman-with-bunny-ears": "women-with-bunny-ears",
        "man-wrestling": "men-wrestling",
        "person-wrestling": "people-wrestling",
        "woman-wrestling": "women-wrestling",
        **{f"person-{who}": who for who in ("elf", "fairy", "genie", "mage", "vampire", "zombie")},
        **{f"person-{who}": who for who in ("superhero", "supervillain")},
        "phoenix-bird": "phoenix",
        "piata": "pinata",
        "red-triangle": "red-triangle-pointed-up",
    },
}
# icons that show something else than the other sets' icons of their names
MISNAMED: dict[Style, frozenset[str]] = {
    "noto-v1": frozenset({"pistol"}),  # a revolver; "water-pistol" in the sets before
    "emojione": frozenset({"pistol"}),
    # instruments, faces and a program's window
    "fxemoji": frozenset({"pistol", "keyboard", "kiss", "sunglasses", "window"}),
}
NAMED_BY_OTHERS: frozenset[Style] = frozenset({"fxemoji"})  # icons that no other set has are left out


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """The icons of one package, as far as names concern it.

    Args:
        documents: SVG documents by name, in the package's order.
        aliases: Other names, each with the icon's name.
        codes: The code points of each icon, as far as the package tells.
    """

    documents: Mapping[str, str]
    aliases: Mapping[str, str]
    codes: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(
        cls, icons: Mapping[str, Any], chars: Mapping[str, str], misnamed: Collection[str] = ()
    ) -> IconSet:
        """Read the content of a package's icons.json and chars.json.

        The square icons are kept, except those in `LEFT_OUT` and those that are misnamed.

        Raises:
            ValueError: If the package does not have a misnamed icon.
        """
        documents = kept_icons(icons)
        if absent := sorted(set(misnamed) - set(documents)):
            raise ValueError(f"misnamed icons: expected icons of the package, got {absent}")
        # an alias that mirrors or turns an icon shows something else
        aliases = {
            name: about["parent"]
            for name, about in icons.get("aliases", {}).items()
            if set(about) == {"parent"}
        }

        def resolved(name: str) -> str:
            while name in aliases:
                name = aliases[name]
            return name

        codes: dict[str, list[str]] = defaultdict(list)
        for hexcode, name in chars.items():
            codes[resolved(name)].append(plain_code(hexcode))
        return cls(
            documents={name: svg for name, svg in documents.items() if name not in misnamed},
            aliases={name: resolved(name) for name in aliases},
            codes={name: tuple(found) for name, found in codes.items()},
        )


def kept_icons(icons: Mapping[str, Any]) -> dict[str, str]:
    """Return SVG documents by name for the square icons of an Iconify set, except those in `LEFT_OUT`."""
    documents = {}
    for name, icon in icons["icons"].items():
        width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
        if width == height and not LEFT_OUT.search(name):
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
            space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            documents[name] = (
                f'<svg {space} viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
            )
    return documents


def unify_names(sets: Mapping[Style, IconSet]) -> dict[Style, dict[str, str]]:
    """Give the icons of all sets names in common.

    A set's icon takes the name that an earlier set gave to the same thing, which is found by its letters (the
    name without hyphens), by a code point, or by an alias in any of the sets; the first rule that finds a
    name decides. Otherwise its own name is a new one. Of two icons of a set with one name, the one found by
    the earlier rule is kept.

    Args:
        sets: The sets in the order in which they name things.

    Returns:
        For each style, the icon of each unified name.
    """
    by_letters: dict[str, str] = {}
    by_code: dict[str, str] = {}
    by_alias: dict[str, str] = {}
    unified: dict[Style, dict[str, str]] = {}
    for style, icons in sets.items():
        renamed = RENAMED.get(style, {})
        also: dict[str, list[str]] = defaultdict(list)
        for alias, icon in icons.aliases.items():
            also[icon].append(alias)
        found: list[tuple[int, str, str]] = []  # rule, name, icon
        for icon in icons.documents:
            own = renamed.get(icon, icon)
            rules: tuple[list[str | None], ...] = (
                [by_letters.get(_letters(own))],
                [by_code.get(code) for code in icons.codes.get(icon, ())],
                [by_letters.get(_letters(alias)) for alias in also[icon]],
                [by_alias.get(_letters(own))],
                [] if style in NAMED_BY_OTHERS else [own],
            )
            hits = [(rule, name) for rule, names in enumerate(rules) for name in names if name is not None]
            if hits:
                found.append((*hits[0], icon))
        chosen: dict[str, str] = {}
        for _, name, icon in sorted(found, key=lambda hit: hit[0]):
            chosen.setdefault(name, icon)
        order = {icon: i for i, icon in enumerate(icons.documents)}
        unified[style] = dict(sorted(chosen.items(), key=lambda item: order[item[1]]))
        for name, icon in unified[style].items():
            by_letters.setdefault(_letters(name), name)
            for code in icons.codes.get(icon, ()):
                by_code.setdefault(code, name)
        for name, icon in unified[style].items():
            for alias in also[icon]:
                by_alias.setdefault(_letters(alias), name)
    return unified


def _letters(name: str) -> str:
    return name.replace("-", "")


def plain_label(text: str) -> str:
    """Return a label or tag as captions write it: lower case, ASCII, no colons, quotation marks or commas."""
    text = unicodedata.normalize("NFKD", text.lower().replace("’", "'")).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^a-z0-9'&+.\-]+", " ", text).split())


class LabelTable:
    """Emojibase's labels and tags, looked up by an icon's name.

    A name is resolved to code points by the icon sets' own tables; failing that, by the label's spelling.
    """

    def __init__(self, entries: Iterable[dict[str, Any]], names_by_code: Iterable[dict[str, str]]) -> None:
        entries = list(entries)
        self._by_code = {plain_code(entry["hexcode"]): entry for entry in entries}
        self._by_slug = {_slug(entry["label"]): entry for entry in entries}
        self._code_of: dict[str, str] = {}
        for table in names_by_code:  # the first set that has a name decides
            for code, name in table.items():
                if plain_code(code) in self._by_code:
                    self._code_of.setdefault(name, plain_code(code))

    def find(self, name: str) -> tuple[str | None, tuple[str, ...]]:
        """Return (label, tags) of an icon's name, or (None, ()) if it is unknown."""
        entry = self._by_code.get(self._code_of.get(name, "")) or self._by_slug.get(_slug(name))
        if entry is None:
            return None, ()
        tags = dict.fromkeys(plain_label(tag) for tag in entry.get("tags", ()))
        return plain_label(entry["label"]), tuple(tag for tag in tags if len(tag) > 1)


def plain_code(hexcode: str) -> str:
    """Return code points in lower case and without the variation selector, by which sets differ."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", plain_label(label).replace("'", "")).strip("-")
