"""Report what is in a folder or file in ldm layout: NAME.safetensors with NAME.yaml for each part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.catalog.lookup import read_card
from ldm.registry.candidates import tensor_shapes
from ldm.registry.report import Report, non_finite_in_parts, report_part
from ldm.support.config import read_yaml
from ldm.support.text import escaped
from ldm.weights.formats.ldm_folder import about_part, network_class, read_part_config
from ldm.weights.formats.ldm_model import CARD_FILE, part_files
from ldm.weights.formats.safetensors import sha256
from ldm.weights.formats.single_file import read_tensors
from ldm.weights.hashing import FileHashes, check_hashes
from ldm.weights.keymap import fit_table
from ldm.weights.parts import SAME_NAMES, build_network, shapes_of


@dataclass(kw_only=True)
class LdmParts:
    """The parts read so far: tensors, files and descriptions by name, and the problems found."""

    tensors: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def read(self, part: str, folder: Path, *, digest: bool) -> None:
        """Read one part and compare its tensors, and with ``digest`` its SHA-256, with its YAML."""
        try:
            about, file = about_part(folder, part), folder / f"{part}.safetensors"
            self.tensors[part], self.files[part] = read_tensors(file)[0], file
            self.networks[part] = describe_network(folder, part, about)
            expected = shapes_of(build_network(read_part_config(folder, part)))
            fit = fit_table(SAME_NAMES, tensor_shapes(self.tensors[part]), expected)
            if not fit:
                self.problems.append(f"{str(file)!r} does not fit the network in {part}.yaml: {fit}")
            if digest and sha256(file) != about["sha256"]:
                self.problems.append(
                    f"{str(file)!r} is not the file that {part}.yaml was written with: its sha256 differs"
                )
        except (ValueError, OSError) as error:
            self.problems.append(str(error))

    def report(self, path: Path, kind: str, *, nan: bool, digest: bool) -> Report:
        """Return the report of all parts.

        Args:
            path: The folder or file.
            kind: Its kind, in words.
            nan: Whether to look for NaN and infinity.
            digest: Whether to compute SHA-256.
        """
        return Report(
            path=path,
            kind=kind,
            size=sum(file.stat().st_size for file in self.files.values()),
            sha256={file.name: sha256(file) for file in self.files.values()} if digest else {},
            values=self.networks,
            parts=tuple(report_part(part, tensors) for part, tensors in self.tensors.items()),
            bad=non_finite_in_parts(self.tensors) if nan else None,
            problems=tuple(self.problems),
        )


def is_ldm_folder(path: Path) -> bool:
    """Return whether a folder holds a card or at least one part in ldm layout."""
    return (path / "card.yaml").is_file() or bool(part_names(path))


def is_ldm_part(path: Path) -> bool:
    """Return whether a file holds the weights of a part and the part's YAML is beside it."""
    return path.suffix == ".safetensors" and is_part_yaml(path.with_suffix(".yaml"))


def is_lone_ldm_part(values: Mapping[str, object]) -> bool:
    """Return whether the metadata of a safetensors file is that of a part in ldm layout."""
    return values.keys() == {"format", "part"} and values["format"] == "pt"


def is_part_yaml(path: Path) -> bool:
    """Return whether a file is the YAML of a part: it states the network's configuration and a hash."""
    try:
        return {"model", "sha256"} <= read_yaml(path).keys()
    except (ValueError, OSError):
        return False


def part_names(folder: Path) -> list[str]:
    """Return the names of the parts whose YAML is in a folder."""
    return [file.stem for file in sorted(folder.glob("*.yaml")) if is_part_yaml(file)]


def describe_network(folder: Path, part: str, about: Mapping[str, Any]) -> str:
    """Return the class of a part's network and, if its YAML states it, the training."""
    name = network_class(folder, part, about)[1].__name__
    training = about.get("training")
    if not isinstance(training, Mapping):
        return name
    run = training.get("config")
    for key in ("run", "name"):
        run = run.get(key) if isinstance(run, Mapping) else None
    about_run = f" in run {escaped(run, 100)}" if run else ""
    return f"{name}, trained for {escaped(training.get('steps'), 100)} steps{about_run}"


def inspect_ldm_folder(path: Path, *, nan: bool, digest: bool) -> Report:
    """Report what is in a model's folder in ldm layout, or in a folder of parts that a training exported.

    Parts that the card locates elsewhere are read there.
    """
    folders = dict.fromkeys(part_names(path), path)
    kind, stated = "folder of parts in ldm layout", None
    parts = LdmParts()
    if (path / "card.yaml").is_file():
        try:
            card = read_card(path / "card.yaml")
        except ValueError as error:
            return Report(path=path, kind="folder in ldm layout", size=0, problems=(str(error),))
        folders |= card.part_folders(path)
        kind = f"model in ldm layout, {card.name} ({card.summary})"
        stated = card.files
    for part, folder in folders.items():
        parts.read(part, folder, digest=digest)
    if digest and stated is not None:
        try:
            check_hashes(stated, FileHashes(part_files(folders)), path / CARD_FILE)
        except (ValueError, OSError) as error:
            parts.problems.append(str(error))
    return parts.report(path, kind, nan=nan, digest=digest)


def inspect_ldm_part(path: Path, *, nan: bool, digest: bool) -> Report:
    """Report what is in the weights of one part in ldm layout, beside which its YAML is."""
    parts = LdmParts()
    parts.read(path.stem, path.parent, digest=digest)
    kind = f"{path.stem} of a model in ldm layout"
    card = path.with_name("card.yaml")
    try:
        kind = f"{path.stem} of {read_card(card).name}, in ldm layout" if card.is_file() else kind
    except ValueError as error:
        parts.problems.append(str(error))
    return parts.report(path, kind, nan=nan, digest=digest)
