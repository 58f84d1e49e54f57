"""Damage texts: YAML, prompts, and one file of a folder. See `mutations` for the arguments."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from mutations import changed_tree, mixed, mutated_bytes, mutated_header, mutated_json

YAML_PIECES = (
    *(
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "!!binary ",
        "!x ",
        "<<: {a: 1}",
        "? ",
        "- ",
        "---\n",
        "...\n",
    ),
    *("{", "}", "[", "]", ", ", ": ", "# ", "|\n", ">-\n", "\t", "'", '"', "\\x00", "\ufeff"),
    *("0x1F", "0b1", "0o17", "1_000", "1:30:59", "1e400", ".inf", ".nan", "-.INF", "~", "yes", "2001-01-01"),
    *("\x85", "\u2028", "\U0001f600", "\x07", "9" * 50, "[" * 40, "{a: " * 40, "- " * 200),
)
PROMPT_PIECES = (
    *("(", ")", "{", "}", "|", ":", "\\", ":1.3)", "(red:1.2)", "{a|b}", "{a:0|b:0}", "{|}", ":-1)", ":nan)"),
    *(
        ":1e9)",
        ":11)",
        ": 1)",
        ":1.)",
        ":.5)",
        ":+2)",
        ":٣)",
        "\\(",
        "\\)",
        "\\\\",
        "<start_of_text>",
        "&amp;",
    ),
    *(
        "&#x110000;",
        "&lt;&lt;",
        "<|endoftext|>",
        "[CLS]",
        "##a",
        "▁",
        "'s",
        "'",
        "’",
        " ",
        "\n",
        "\t",
        "\x00",
    ),
    *(
        "\ufeff",
        "\u200d",
        "\u202e",
        "\u2028",
        "\xa0",
        "e\u0301",
        "İ",
        "ß",
        "ﬁ",
        "漢字",
        "한글",
        "١٢",
        "½",
        "Ⅷ",
    ),
    *(
        "🐱",
        "👩‍🚀",
        "🏳️‍🌈",
        "\U000e0041",
        "\ud800",
        "â€™",
        "Ã©",
        "a" * 300,
        "é" * 300,
        "alpha",
        "noto",
        "cat face",
    ),
)


def mutated_yaml(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one of the YAML texts with values, keys, lines or signs of the syntax changed."""
    data = rng.choice(seeds)
    kind = rng.randrange(5)
    if kind == 0:
        return mutated_bytes(seeds, rng)
    if kind < 3:
        try:
            return _written(_changed(yaml.safe_load(data), rng), rng)
        except RecursionError:
            return mutated_bytes(seeds, rng)
    return _with_pieces(data.decode(), YAML_PIECES, rng, lines=kind == 4).encode(errors="surrogatepass")


def _changed(tree: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 2, 3))):
        tree = changed_tree(tree, rng)
    return tree


def _written(tree: Any, rng: random.Random) -> bytes:
    """Return a tree as YAML: in blocks, or as a line of JSON for each entry, which is YAML too."""
    if rng.random() < 0.3 and len(str(tree)) < 5000:
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5).encode(
            errors="surrogatepass"
        )
    if not isinstance(tree, dict):
        return json.dumps(tree).encode()
    lines = [f"{json.dumps(str(key))}: {json.dumps(value)}\n" for key, value in tree.items()]
    if lines and rng.random() < 0.1:
        lines.append(rng.choice(lines))  # a key that is given twice
    return "".join(lines).encode()


def _with_pieces(text: str, pieces: Sequence[str], rng: random.Random, *, lines: bool) -> str:
    """Return a text with one to six pieces inserted, its lines moved, or parts of it repeated."""
    if lines:
        rows = text.splitlines(keepends=True)
        for _ in range(rng.choice((1, 2, 4))):
            at, to = rng.randrange(len(rows)), rng.randrange(len(rows))
            row = rows[at] if rng.random() < 0.5 else rows.pop(at)
            rows.insert(to, rng.choice(("", " ", "  ", "    ", "- ")) + row)
        return "".join(rows)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randint(0, len(text))
        end = at + rng.choice((0, 0, 1, 5))
        piece = rng.choice(pieces) * rng.choice((1, 1, 1, 1, 2, 30, 400))
        text = text[:at] + piece + text[end:]
    return text


def mutated_prompt(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one of the prompts with pieces of the syntax, entities and characters inserted."""
    text = _with_pieces(rng.choice(seeds).decode(), PROMPT_PIECES, rng, lines=False)
    if rng.random() < 0.1:
        text = (text + " ") * rng.choice((2, 20, 400))
    if rng.random() < 0.1:
        text = "".join(chr(rng.choice((rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000))))
                       for _ in range(rng.choice((3, 30, 300))))  # fmt: skip
    return text[: rng.choice((20, 300, 17_000, 10**6))].encode(errors="surrogatepass")


# One file of a folder: the folder, the file's name and a line end begin the mutant.


def in_folder(base: Path, names: Iterable[str]) -> list[bytes]:
    """Return files of a valid folder as inputs of `place_in_folder`."""
    return [f"{base}\0{name}\n".encode() + (base / name).read_bytes() for name in names]


def mutated_file(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one of the files of a folder damaged as JSON, YAML, text or bytes, by the end of its name."""
    place, _, content = rng.choice(seeds).partition(b"\n")
    suffix = Path(place.decode()).suffix
    mutate = {
        ".json": mutated_json,
        ".yaml": mutated_yaml,
        ".safetensors": mixed(mutated_header, mutated_bytes),
    }.get(suffix, mutated_bytes)
    return place + b"\n" + mutate([content], rng)


def place_in_folder(mutant: bytes, folder: Path) -> Path:
    """Write a folder called "mutant" with the files of the valid one, but for the damaged file."""
    place, _, content = mutant.partition(b"\n")
    base, name = place.decode().split("\0")
    made = folder / "mutant"
    for path in Path(base).rglob("*"):
        if path.is_file():
            other = made / path.relative_to(base)
            other.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, other)
    (made / name).unlink()
    (made / name).write_bytes(content)
    return made
