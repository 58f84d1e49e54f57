"""Find the adapters that a recipe names, by their SHA-256, and load them as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.pipelines.loaded_adapter import AdapterEntry
from ldm.support.home import library_home
from ldm.support.text import shown
from ldm.weights.adapters.files import FOLDER_FILES, adapter_digest

ADAPTER_SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")
MOST_ADAPTERS = 100  # of one recipe
Given = str | Path | Sequence[str | Path] | None


def find_adapters(entries: Sequence[AdapterEntry], given: Given) -> list[Path]:
    """Return the file of each adapter of a recipe.

    Args:
        entries: What the recipe states.
        given: Files, folders that peft or diffusers wrote, and folders with files. None: the folder
            "adapters" below LDM_HOME.

    Raises:
        FileNotFoundError: If one is not among the files; the message names it and its SHA-256.
        ValueError: If the recipe has implausibly many.
    """
    if len(entries) > MOST_ADAPTERS:
        raise ValueError(f"recipe.adapters: expected at most {MOST_ADAPTERS}, got {len(entries)}")
    if not entries:
        return []
    if given is None:
        usual = library_home() / "adapters"
        given = [usual] if usual.is_dir() else []
    places = list(_files([given] if isinstance(given, str | Path) else given))
    digests: dict[Path, str] = {}
    found = []
    for entry in entries:
        # files of the same name first, so that others are seldom read
        for path in sorted(places, key=lambda path: path.name != entry.file):
            if path not in digests:
                digests[path] = adapter_digest(path)
            if digests[path] == entry.sha256:
                found.append(path)
                break
        else:
            raise FileNotFoundError(
                f"the image was made with the adapter {shown(entry.name)} (file {shown(entry.file)}, sha256"
                f" {shown(entry.sha256)}), which is not among {len(places)} files: pass adapters=PATH"
            )
    return found


def _files(given: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the adapters in files and folders."""
    for each in map(Path, given):
        if not each.is_dir():
            yield each
            continue
        inner = sorted(path for path in each.iterdir() if path.suffix in ADAPTER_SUFFIXES or path.is_dir())
        for path in inner:
            if path.is_file() or any((path / name).is_file() for name in FOLDER_FILES):
                yield path


def load_adapters(pipe: Any, entries: Sequence[AdapterEntry], paths: Sequence[Path]) -> None:
    """Load the adapters of a recipe into a pipeline, at their strengths.

    Args:
        pipe: The pipeline, of any class.
        entries: What the recipe states.
        paths: The file of each.
    """
    for entry, path in zip(entries, paths, strict=True):
        pipe.adapters.load_entry(entry, path)
