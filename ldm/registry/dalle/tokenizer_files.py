"""The files of DALL·E Mini's tokenizers: vocab.json with merges.txt, tokenizer.json, and our own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.models.text.byte_bpe import ByteTokenizer
from ldm.support.config import build
from ldm.support.files import write_atomically
from ldm.support.strict_json import read_json
from ldm.support.text import escaped, read_utf8, shown
from ldm.weights.formats.ldm_model import BYTE_TOKENIZER_FILE

MOST_BYTES = 1 << 25  # of a file


@dataclass(frozen=True, kw_only=True)
class TokenizerContent:
    """The content of our own file; see `ByteTokenizer`."""

    vocabulary: Mapping[str, int]
    merges: tuple[str, ...]
    cleaning: str


def find_tokenizer(
    places: list[Path], cleaning: str, suffix: str = ""
) -> tuple[ByteTokenizer, dict[str, Path]]:
    """Return the tokenizer in the first of several folders that holds its files, and these files.

    Args:
        places: The folders.
        cleaning: How texts are cleaned.
        suffix: End of the files' names that is tried first, such as "_mini".

    Raises:
        FileNotFoundError: If none holds them.
        ValueError: If a file is damaged; the message names it.
    """
    for end in dict.fromkeys((suffix, "")):
        for place in places:
            vocabulary, merges, whole = (
                place / f"vocab{end}.json",
                place / f"merges{end}.txt",
                place / "tokenizer.json",
            )
            if vocabulary.is_file() and merges.is_file():
                content = (read_json(vocabulary, MOST_BYTES), read_merges(merges))
                return checked(*content, cleaning, vocabulary), {
                    each.name: each for each in (vocabulary, merges)
                }
            if not end and whole.is_file():
                return read_whole(whole, cleaning), {whole.name: whole}
    raise FileNotFoundError(
        f"no tokenizer in {', '.join(shown(str(place)) for place in places)}: expected vocab.json and"
        " merges.txt, or tokenizer.json"
    )


def read_merges(path: Path) -> list[str]:
    """Return the merges of a merges.txt, whose first line states a version."""
    lines = read_utf8(path, MOST_BYTES).split("\n")
    return [line for i, line in enumerate(lines) if line and not (i == 0 and line.startswith("#version"))]


def read_whole(path: Path, cleaning: str) -> ByteTokenizer:
    """Return the tokenizer in a tokenizer.json of Hugging Face."""
    model = read_json(path, MOST_BYTES).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ValueError(
            f"{shown(str(path))}: expected a byte-level tokenizer with its vocabulary in model.vocab"
        )
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError(f"{shown(str(path))}: expected a list of merges in model.merges")
    pairs = [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in merges]
    return checked(model["vocab"], pairs, cleaning, path)


def checked(vocabulary: Mapping[str, Any], merges: list[Any], cleaning: str, path: Path) -> ByteTokenizer:
    """Return the tokenizer of files' content; ValueError, which names the file, if it is damaged."""
    try:
        return ByteTokenizer(vocabulary, merges, cleaning=cleaning)
    except ValueError as error:
        raise ValueError(f"{shown(str(path))}: {escaped(error, 300)}") from None


def write_tokenizer(folder: Path, tokenizer: ByteTokenizer) -> None:
    """Write a tokenizer as our own file in a folder."""
    content = {"vocabulary": tokenizer.ids, "merges": tokenizer.merges, "cleaning": tokenizer.cleaning}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    write_atomically(folder / BYTE_TOKENIZER_FILE, text.encode())


def read_tokenizer(folder: Path) -> ByteTokenizer:
    """Return the tokenizer that `write_tokenizer` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    path = folder / BYTE_TOKENIZER_FILE
    content = read_json(path, MOST_BYTES)
    read = build(TokenizerContent, content, shown(str(path)))
    return checked(read.vocabulary, list(read.merges), read.cleaning, path)
