"""The SHA-256 of a model's files: named in recipes, stated by the model's index, compared when it is read.

A folder that the library writes states the SHA-256 of all its files in its card (ldm layout) or in
model_index.json (diffusers layout), which are written last. Parts of two models together are so noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from io import FileIO
from pathlib import Path
from threading import Thread
from typing import Any

from ldm.support.files import file_sha256
from ldm.support.text import shown
from ldm.weights.formats.safetensors import existing_file


class FileHashes(Mapping[str, str]):
    """The SHA-256 of files by name, in 64 hexadecimal digits; a thread of its own computes them.

    Looking one up waits for it. The files are opened at once, so that one that is replaced later does not
    count. A copy, and a pickle, is a plain dictionary.

    Args:
        files: The files by name.

    Raises:
        OSError: If a file cannot be opened.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)
        self._found: dict[str, str | Future[str]] = {}
        opened = {name: existing_file(path).open("rb", buffering=0) for name, path in files.items()}
        waiting = {name: Future[str]() for name in opened}
        self._found |= waiting
        if opened:
            Thread(target=_hash_all, args=(opened, waiting), name="ldm-hashes", daemon=True).start()

    def __getitem__(self, name: str) -> str:
        found = self._found[name]
        return found if isinstance(found, str) else found.result()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def renamed(self, names: Mapping[str, str]) -> FileHashes:
        """Return the hashes of some files under other names: name here -> name there."""
        other = FileHashes({})
        other.files = {new: self.files[old] for old, new in names.items()}
        other._found = {new: self._found[old] for old, new in names.items()}
        return other

    def joined(self, other: Mapping[str, str]) -> FileHashes:
        """Return these hashes and others, or other entries, which are no files."""
        both = FileHashes({})
        both.files = {**self.files, **(other.files if isinstance(other, FileHashes) else {})}
        both._found = {**self._found, **(other._found if isinstance(other, FileHashes) else other)}
        return both


def _hash_all(opened: Mapping[str, FileIO], waiting: Mapping[str, Future[str]]) -> None:
    for name, file in opened.items():
        try:
            with file:
                waiting[name].set_result(file_sha256(file))
        except Exception as error:  # raised where it is looked up
            waiting[name].set_exception(error)


def check_hashes(stated: Mapping[str, str], found: Mapping[str, str], index: Path) -> None:
    """Compare the files of a folder with what its index states.

    Args:
        stated: SHA-256 by file name, as the index states it.
        found: SHA-256 by file name of the files that are read.
        index: The index: the card, or model_index.json.

    Raises:
        ValueError: If a file is another one, or is read and not stated; the message names it.
        FileNotFoundError: If a file that the index states is absent.
    """
    where = f"{shown(str(index.parent))} is not the model that {index.name} was written with"
    advice = f"write the model again, or remove the hashes from {index.name} if this is meant"
    if absent := sorted(map(shown, stated.keys() - found.keys())):
        raise FileNotFoundError(f"{where}: {', '.join(absent[:5])} is absent; {advice}")
    if added := sorted(map(shown, found.keys() - stated.keys())):
        raise ValueError(f"{where}: {', '.join(added[:5])} is not named there; {advice}")
    for name, expected in stated.items():
        if found[name] != expected:
            raise ValueError(
                f"{where}: sha256 differs: {shown(name)} (stated {shown(expected)}, found {found[name]});"
                f" {advice}"
            )
