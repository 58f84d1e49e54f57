"""Folders of images: captions in text files, in metadata, or in the names of the folders."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ldm.data.dataset import Problem, Record
from ldm.data.sources.config import ClassData, FolderData
from ldm.data.sources.decoding import IMAGE_SUFFIXES, Header, decode
from ldm.data.sources.scan_cache import (
    LEAST_SECONDS,
    entry_path,
    header_columns,
    known_headers,
    write_entry,
)
from ldm.data.sources.scanning import ScannedFile, check_problems, look_again, scan
from ldm.data.sources.table import Records
from ldm.data.sources.texts import (
    MAX_TEXT,
    METADATA,
    caption_lines,
    captions_of,
    read_metadata,
)
from ldm.support.text import escaped, read_utf8, shown

if TYPE_CHECKING:
    from PIL.Image import Image


class UnseenFile(NamedTuple):
    """A file that may be an image; see `ScannedFile`."""

    name: str
    size: int
    fingerprint: str
    captions: tuple[str, ...]


class FolderImages:
    """The images of a folder and of the folders in it.

    Files and folders whose names begin with "." are not looked at.

    Args:
        config: The folder, and what is expected of it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no image to train on, or too many are broken; the message names them.
    """

    def __init__(self, config: FolderData | ClassData) -> None:
        self.config, self.root = config, Path(config.path)
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.path {shown(config.path)}: no such folder")
        problems: list[Problem] = []
        files = list(find_files(self.root, problems))
        images = [name for name in files if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
        captions = (
            class_captions(images, config.template)
            if isinstance(config, ClassData)
            else beside_captions(self.root, files, images, config.caption_key, problems)
        )
        candidates = self._look([self._file(name, captions.get(name, ())) for name in images])
        kept, records, found = scan(candidates, self._opener(images), config)
        self.records, self.problems = Records(records), (*problems, *found)
        check_problems(self.problems, config, len(kept))

    def _opener(self, names: list[str]) -> Callable[[int], BinaryIO]:
        return lambda i: (self.root / names[i]).open("rb")

    def _file(self, name: str, captions: tuple[str, ...]) -> UnseenFile:
        try:
            status = (self.root / name).stat()
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:  # reading it will say why
            size, changed = 0, 0
        return UnseenFile(name, size, f"{name}/{size}/{changed}", captions)

    def _look(self, files: list[UnseenFile]) -> list[ScannedFile]:
        """Look at the headers of files, unless an earlier scan has seen them."""
        path = entry_path("folder", self.root.resolve())
        known, started = known_headers(path), time.monotonic()
        read = self._opener([each.name for each in files])
        looked = [
            ScannedFile(
                name=each.name,
                size=each.size,
                fingerprint=each.fingerprint,
                captions=each.captions,
                header=look_again(known.get(each.fingerprint), partial(read, i)),
            )
            for i, each in enumerate(files)
        ]
        fingerprints = [each.fingerprint for each in files]
        if time.monotonic() - started > LEAST_SECONDS and not known.keys() >= set(fingerprints):
            headers = [each.header if isinstance(each.header, Header) else None for each in looked]
            write_entry(path, {"fingerprints": fingerprints, **header_columns(headers)})
        return looked

    def __len__(self) -> int:
        return len(self.records)

    def record(self, i: int) -> Record:
        """Return what is known of image i."""
        return self.records[i]

    def open(self, i: int, least: int | None = None) -> Image:
        """Decode image i; see `Dataset.open`."""
        try:
            data = (self.root / self.records.names[i]).read_bytes()
        except OSError as error:
            raise ValueError(escaped(error, 300)) from None
        return decode(data, self.config.background, least)


def find_files(root: Path, problems: list[Problem]) -> Iterator[str]:
    """Return the files in a folder, relative and sorted; links are followed, but never in a circle.

    Args:
        root: The folder.
        problems: Links that lead in a circle or nowhere, and pipes and devices, are appended to it.
    """
    waiting: list[tuple[Path, tuple[str, ...]]] = [(root, (os.path.realpath(root),))]
    while waiting:
        folder, above = waiting.pop()
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        folders: list[tuple[Path, tuple[str, ...]]] = []
        for entry in inside:
            name = (folder / entry.name).relative_to(root).as_posix()
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                real = os.path.realpath(entry.path)
                if real in above:
                    problems.append(Problem(name, "symlink loop", f"it leads to {escaped(real, 200)}"))
                else:
                    folders.append((Path(entry.path), (*above, real)))
            elif entry.is_symlink() and not os.path.exists(entry.path):
                looped = _is_loop(entry.path)
                kind = "symlink loop" if looped else "unreadable"
                target = escaped(os.readlink(entry.path), 200)
                problems.append(Problem(name, kind, f"a link to {target}" + (", in a circle" * looped)))
            elif not entry.is_file():
                problems.append(Problem(name, "unreadable", "it is neither a file nor a folder"))
            else:
                yield name
        waiting += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_loop(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # ELOOP
    return False


def class_captions(images: list[str], template: str) -> dict[str, tuple[str, ...]]:
    """Return the captions of images by the first folder that each is in."""
    found: dict[str, tuple[str, ...]] = {}
    for name in images:
        first, _, rest = name.partition("/")
        if rest:
            label = " ".join(first.replace("_", " ").replace("-", " ").split())
            found[name] = (template.format(label),)
    return found


def beside_captions(
    root: Path, files: list[str], images: list[str], key: str | None, problems: list[Problem]
) -> dict[str, tuple[str, ...]]:
    """Return the captions of images in metadata and in text files; metadata come first.

    Args:
        root: The folder.
        files: All files in it.
        images: Those that are images.
        key: Key of captions in metadata; see `FolderData`.
        problems: What is wrong with captions is appended to it.
    """
    found: dict[str, tuple[str, ...]] = {}
    known = set(images)
    stems: dict[str, list[str]] = {}  # images of several formats may share a caption
    for name in images:
        stems.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(name)
    for name in files:
        path = PurePosixPath(name)
        if path.name in METADATA:
            try:
                found |= _of_metadata(root / name, str(path.parent), known, key, problems)
            except ValueError as error:
                problems.append(Problem(name, "bad metadata", str(error)))
    for name in files:
        path = PurePosixPath(name)
        if path.suffix.lower() == ".txt":
            named = stems.get(str(path.with_suffix("")), [])
            if not named:
                problems.append(Problem(name, "caption without an image", "no image has its name"))
                continue
            try:
                lines = caption_lines(read_utf8(root / name, MAX_TEXT))
            except (ValueError, OSError) as error:
                problems.append(Problem(name, "bad metadata", escaped(error, 300)))
                continue
            found |= {image: lines for image in named if image not in found}
        elif name not in known and path.name not in METADATA:
            problems.append(Problem(name, "not an image", "it is not read"))
    return found


def _of_metadata(
    path: Path, folder: str, known: set[str], key: str | None, problems: list[Problem]
) -> dict[str, tuple[str, ...]]:
    """Return the captions that a file of metadata states.

    Args:
        path: The file.
        folder: Its folder, relative to the data set's.
        known: The images.
        key: See `FolderData`.
        problems: Entries that are not used are appended to it.
    """
    found: dict[str, tuple[str, ...]] = {}
    for line, entry in read_metadata(path):
        where = f"{path.name}, line {line}"
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            problems.append(Problem(where, "bad metadata", f"expected a file_name, got {shown(entry)}"))
            continue
        name = (PurePosixPath(folder) / entry["file_name"]).as_posix()
        if name not in known:
            problems.append(Problem(where, "caption without an image", escaped(entry["file_name"], 200)))
            continue
        try:
            found[name] = (*found.get(name, ()), *captions_of(entry, key))
        except ValueError as error:
            problems.append(Problem(where, "bad metadata", str(error)))
    return found
