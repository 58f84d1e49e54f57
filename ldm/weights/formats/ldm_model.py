"""The folder of a whole model in ldm layout: its parts (see `ldm_folder`), its tokenizers and its card.

The card states the SHA-256 of all other files. It is written last, and without it the folder is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ldm.catalog.cards import Card
from ldm.support.config import to_dict
from ldm.support.files import write_atomically
from ldm.support.strict_yaml import format_yaml
from ldm.weights.formats.exemplar_file import LIBRARY_EMBEDDINGS, LIBRARY_IMAGES, LIBRARY_INDEX
from ldm.weights.formats.ldm_folder import VOCABULARY, WORDS_VOCABULARY
from ldm.weights.hashing import FileHashes

CARD_FILE = "card.yaml"
BYTE_TOKENIZER_FILE = "byte-tokenizer.json"
TOKENIZER_FILES = (VOCABULARY, "vocab.txt", "words-tokenizer.json", WORDS_VOCABULARY)
LIBRARY_FILES = (LIBRARY_INDEX, LIBRARY_IMAGES)
# the files that may be beside a part
BESIDE: dict[str, tuple[str, ...]] = {
    "text": (*TOKENIZER_FILES, *LIBRARY_FILES),
    "words": (*TOKENIZER_FILES, LIBRARY_EMBEDDINGS),
    "encoder": (BYTE_TOKENIZER_FILE,),
    "layout": LIBRARY_FILES,
}


def part_files(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files of parts, and those of tokenizers and libraries beside them, by name.

    Args:
        folders: Folder of each part.
    """
    names = [
        (folder, f"{part}{end}") for part, folder in folders.items() for end in (".yaml", ".safetensors")
    ]
    beside = {(folder, name): None for part, folder in folders.items() for name in BESIDE.get(part, ())}
    names += [(folder, name) for folder, name in beside if (folder / name).is_file()]
    return {name: folder / name for folder, name in names}


def library_folder(folders: Mapping[str, Path]) -> Path:
    """Return the folder of a model's library of exemplars: that of its layout, or else of its text tower.

    A model with a layout of its own thus shares the library of the model whose text tower it has.

    Args:
        folders: Folder of each part.
    """
    places = [folders[part] for part in ("layout", "text") if part in folders]
    return next((place for place in places if (place / LIBRARY_INDEX).is_file()), places[0])


def write_card(folder: Path, card: Card) -> None:
    """Write card.yaml, with the SHA-256 of all files of the model, which must be there."""
    card = replace(card, files=dict(FileHashes(part_files(card.part_folders(folder)))))
    write_atomically(folder / CARD_FILE, format_yaml(to_dict(card), CARD_FILE))


def model_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are parts of a model in ldm layout, or may be beside them."""
    parts = [path for path in folder.glob("*.yaml") if path.with_suffix(".safetensors").is_file()]
    weights = [path.with_suffix(".safetensors") for path in parts]
    named = (*TOKENIZER_FILES, BYTE_TOKENIZER_FILE, *LIBRARY_FILES, LIBRARY_EMBEDDINGS)
    return [*parts, *weights, *(folder / name for name in named if (folder / name).is_file())]
