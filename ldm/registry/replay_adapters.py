"""Find the adapters and controls that a recipe names, by their SHA-256, and load them as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.pipelines.control.loaded_control import ControlEntry
from ldm.pipelines.loaded_adapter import AdapterEntry
from ldm.support.home import library_home
from ldm.support.text import shown
from ldm.weights.adapters.files import FOLDER_FILES, adapter_digest
from ldm.weights.controls.files import CONTROL_CONFIG, control_digest

ADAPTER_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
MOST_ADAPTERS = 100  # of one recipe
Given = str | Path | Sequence[str | Path] | None


def find_additions(
    adapters: Sequence[AdapterEntry], given: Given, controls: Sequence[ControlEntry], networks: Given
) -> Callable[[Any], None]:
    """Return a function that loads the adapters and controls of a recipe into a pipeline, once found.

    Args:
        adapters: What the recipe states of adapters.
        given: Where they are; see `find_named`.
        controls: What it states of controls.
        networks: Where they are.
    """
    files, found = find_adapters(adapters, given), find_controls(controls, networks)
    fused = sum(entry.fused for entry in adapters)  # they come first, and change what others are added to

    def load(pipe: Any) -> None:
        load_adapters(pipe, adapters[:fused], files[:fused])
        load_controls(pipe, controls, found)
        load_adapters(pipe, adapters[fused:], files[fused:])

    return load


def find_adapters(entries: Sequence[AdapterEntry], given: Given) -> list[Path]:
    """Return the file of each adapter of a recipe; see `find_named`, with the folder "adapters"."""
    return find_named(entries, given, kind="adapter", digest=adapter_digest)


def find_controls(entries: Sequence[ControlEntry], given: Given) -> list[tuple[Path, Path | None]]:
    """Return the file of each control of a recipe, and that of its image tower if it has one.

    See `find_named`, with the folder "controls".
    """
    towers = [
        ControlEntry(name=f"{each.name}: image tower", file=each.vision or "", sha256=each.vision_sha256)
        for each in entries
        if each.vision_sha256 is not None
    ]
    found = find_named([*entries, *towers], given, kind="control", digest=control_digest)
    visions = iter(found[len(entries) :])
    return [
        (path, None if entry.vision_sha256 is None else next(visions))
        for entry, path in zip(entries, found, strict=False)
    ]


def find_named(
    entries: Sequence[AdapterEntry | ControlEntry],
    given: Given,
    *,
    kind: str,
    digest: Callable[[Path], str],
) -> list[Path]:
    """Return the file of each adapter or control of a recipe.

    Args:
        entries: What the recipe states.
        given: Files, folders that peft or diffusers wrote, and folders with files. None: the folder with the
            plural of `kind` as its name below LDM_HOME.
        kind: What they are, in a word.
        digest: Returns the SHA-256 of one.

    Raises:
        FileNotFoundError: If one is not among the files; the message names it and its SHA-256.
        ValueError: If the recipe has implausibly many.
    """
    if len(entries) > MOST_ADAPTERS:
        raise ValueError(f"recipe.{kind}s: expected at most {MOST_ADAPTERS}, got {len(entries)}")
    if not entries:
        return []
    if given is None:
        usual = library_home() / f"{kind}s"
        given = [usual] if usual.is_dir() else []
    places = list(_files([given] if isinstance(given, str | Path) else given))
    digests: dict[Path, str] = {}
    found = []
    for entry in entries:
        # files of the same name first, so that others are seldom read
        for path in sorted(places, key=lambda path: path.name != entry.file):
            if path not in digests:
                digests[path] = digest(path)
            if digests[path] == entry.sha256:
                found.append(path)
                break
        else:
            raise FileNotFoundError(
                f"the image was made with the {kind} {shown(entry.name)} (file {shown(entry.file)}, sha256"
                f" {shown(entry.sha256)}), which is not among {len(places)} files: pass {kind}s=PATH"
            )
    return found


def _files(given: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the adapters and controls in files and folders."""
    for each in map(Path, given):
        if not each.is_dir() or _is_one(each):
            yield each
            continue
        inner = sorted(path for path in each.iterdir() if path.suffix in ADAPTER_SUFFIXES or path.is_dir())
        for path in inner:
            if path.is_file() or _is_one(path):
                yield path


def _is_one(folder: Path) -> bool:
    """Return whether a folder is an adapter or a control."""
    return any((folder / name).is_file() for name in FOLDER_FILES) or (folder / CONTROL_CONFIG).is_file()


def load_controls(
    pipe: Any, entries: Sequence[ControlEntry], paths: Sequence[tuple[Path, Path | None]]
) -> None:
    """Load the controls of a recipe into a pipeline.

    Args:
        pipe: The pipeline, of any class.
        entries: What the recipe states.
        paths: The file of each, and that of its image tower.
    """
    for entry, (path, vision) in zip(entries, paths, strict=True):
        pipe.controls.load_entry(entry, path, vision)


def load_adapters(pipe: Any, entries: Sequence[AdapterEntry], paths: Sequence[Path]) -> None:
    """Load the adapters of a recipe into a pipeline, at their strengths.

    Args:
        pipe: The pipeline, of any class.
        entries: What the recipe states.
        paths: The file of each.
    """
    for entry, path in zip(entries, paths, strict=True):
        pipe.adapters.load_entry(entry, path)
