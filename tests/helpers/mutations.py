"""Damage inputs: bytes, text and JSON. Each function takes valid inputs and random numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from fuzzing import Mutator

EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
EDGES += (2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mixed(*mutators: Mutator) -> Mutator:
    """Return a function that damages by one of several functions, chosen at random."""

    def mutate(seeds: Sequence[bytes], rng: random.Random) -> bytes:
        return rng.choice(mutators)(seeds, rng)

    return mutate


def mutated_bytes(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one of the inputs with one to eight changes of its bytes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not data:
            return bytes(data)
        rng.choice(CHANGES)(data, rng, seeds)
    return bytes(data)


def _span(data: bytes | bytearray, rng: random.Random, most: int = 64) -> slice:
    begin = rng.randrange(len(data))
    return slice(begin, begin + rng.randint(1, rng.choice((1, 4, most, max(1, len(data))))))


def _flip(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def _number(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    size, at = rng.choice((1, 2, 4, 8)), rng.randrange(len(data))
    value = (rng.choice(EDGES) * rng.choice((1, 1, -1))) % 256**size
    data[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))


def _delete(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    del data[_span(data, rng)]


def _truncate(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data)) :]


def _insert(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))


def _repeat(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    span = _span(data, rng)
    data[span] = data[span] * rng.choice((2, 2, 3, 20, 1000))
    del data[1 << 20 :]


def _swap(data: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    a, b = _span(data, rng), _span(data, rng)
    data[a], data[b] = data[b], data[a]


def _splice(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    other = rng.choice(seeds) or b"\0"
    data[_span(data, rng)] = other[_span(other, rng)]


Change = Callable[[bytearray, random.Random, Sequence[bytes]], None]
CHANGES: tuple[Change, ...] = (
    *(_flip, _flip, _set, _set, _number, _number, _delete, _truncate, _insert, _repeat, _swap, _splice),
)


def odd_value(rng: random.Random) -> Any:
    """Return a value that JSON can state and nobody expects."""
    deep: Any = 0
    for _ in range(rng.choice((2, 50, 900))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    sign = rng.choice((1, -1))
    values = (
        *(None, True, False, 0, -1, sign * rng.choice(EDGES), sign * 10 ** rng.choice((20, 400)), 0.5, -0.0),
        *(float("nan"), float("inf"), -float("inf"), 1e308, 1e-320, "", " ", "a", "0", "null", "\x00"),
        *("\u202e\x1b[2J", "\ud800", "../../x", "/etc/passwd", "x" * rng.choice((300, 100_000)), [], {}),
        *([0] * rng.choice((1, 3, 10_000)), [[]], [None], {"": None}, {"a": {}}, deep, 1e400),
    )
    return rng.choice(values)


def mutated_json(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one of the JSON texts with one to three of its values, keys or letters changed."""
    tree = json.loads(rng.choice(seeds))
    try:
        for _ in range(rng.choice((1, 1, 2, 3))):
            tree = changed_tree(tree, rng)
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    except RecursionError:  # two deep values, one in the other
        return mutated_bytes(seeds, rng)
    data = text.encode(errors="surrogatepass")
    return mutated_bytes([data], rng) if rng.random() < 0.2 else data


def mutated_header(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one of the safetensors files with its header changed as JSON, and the length of it corrected."""
    data = rng.choice(seeds)
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end]
    if rng.random() < 0.15:  # a key that is given twice
        name = rng.choice(list(json.loads(header)))
        header = b"{" + json.dumps(name).encode() + b":{}," + header[1:]
    else:
        header = mutated_json([header], rng)
    return len(header).to_bytes(8, "little") + header + data[end:]


def changed_tree(tree: Any, rng: random.Random) -> Any:
    """Return a tree of lists and dictionaries with one of its places changed; it may be changed in place."""
    places = [(None, None), *_places(tree)]
    parent, key = rng.choice(places[1:] or places)
    if parent is None or rng.random() < 0.02:
        return odd_value(rng)
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(odd_value(rng))[:1000]] = parent.pop(key)
    elif kind == 2:
        other, at = rng.choice(places[1:])
        parent[key] = json.loads(json.dumps(other[at]))
    elif kind == 3 and isinstance(parent[key], int):
        parent[key] += rng.choice((1, -1, 8, 1000))
    else:
        parent[key] = odd_value(rng)
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return each (container, key) of a tree."""
    found, waiting = list[tuple[Any, Any]](), [tree]
    while waiting:
        here = waiting.pop()
        keys = here if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        for key in keys:
            found.append((here, key))
            waiting.append(here[key])
    return found
