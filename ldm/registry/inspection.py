"""What is in a file of weights: read from its headers and opcodes, with nothing executed."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.catalog.cards import Card
from ldm.catalog.lookup import known_cards, read_card
from ldm.weights.cast import is_finite
from ldm.weights.detection import Detection, detect
from ldm.weights.formats.diffusers_folder import PARTS, is_folder, list_variants, read_component, read_folder
from ldm.weights.formats.ldm_folder import about_part
from ldm.weights.formats.pickles import scan_file
from ldm.weights.formats.safetensors import existing_file, sha256
from ldm.weights.formats.single_file import ema_names, read_tensors, split_parts
from ldm.weights.keymap import Fit, Shape, Table, fit_table
from ldm.weights.parts import build_network, part_table, shapes_of


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A card to compare a file with: for each part the rule table of the file's layout and the network's own
    names and shapes."""

    name: str
    parts: Mapping[str, tuple[Table, Mapping[str, Shape]]]


Candidates = Callable[[Detection], Iterable[Candidate]]  # the cards that a detected family may be


def card_candidates(found: Detection) -> Iterable[Candidate]:
    """The library's cards of a family, those with the same networks together, and the tables of the layout
    found."""
    cards: dict[object, list[str]] = {}
    shapes: dict[object, dict[str, object]] = {}
    for card in known_cards().values():
        networks = card_networks(card, found)
        if not networks:
            continue
        key = tuple(networks.items())
        cards.setdefault(key, []).append(card.name)
        shapes[key] = dict(networks)
    for key, names in cards.items():
        parts = {}
        for part, config in shapes[key].items():
            network = build_network(config)
            hugging_face = found.layout == "diffusers" or found.family.parts[part].endswith("transformer.")
            spelled = ("text_model.", "vision_model.") if hugging_face else ()
            parts[part] = (part_table(network, found.layout, spelled), shapes_of(network))
        yield Candidate(name=", ".join(names), parts=parts)


# Families of files that hold one part of an unCLIP model: the families of cards that it may belong to.
PART_OF = {
    "karlo-prior": ("karlo", "kandinsky21"),
    "karlo-decoder": ("karlo",),
    "karlo-sr": ("karlo",),
    "kandinsky21": ("kandinsky21",),
    "kandinsky22": ("kandinsky22",),
    "movq": ("kandinsky21", "kandinsky22"),
}


def card_networks(card: Card, found: Detection) -> dict[str, object]:
    """Return a card's network configurations by the detected family's parts; empty for another family."""
    if card.family not in PART_OF.get(found.name, (found.name,)):
        return {}
    shapes = card.shapes()
    names = {theirs: ours for theirs, ours in card.file_parts().items() if ours in shapes}
    if found.name in PART_OF:
        names = {theirs: ours for theirs, ours in names.items() if theirs in found.family.parts}
    return {theirs: shapes[ours] for theirs, ours in names.items()}


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """One part: the number of its tensors and of their entries, and how many tensors have which dtype."""

    name: str
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `inspect` found; `text()` says it in lines.

    ``averaged``: tensors that have an averaged (EMA) copy. ``fits``: candidate → part → how its keys fit.
    ``bad``: tensors with NaN or infinity, None if not asked for. ``unsafe``: globals of a pickle that are
    refused. ``problems``: why the file cannot be loaded as it is.
    """

    path: Path
    kind: str
    size: int
    sha256: Mapping[str, str] = field(default_factory=dict)
    found: Detection | None = None
    parts: tuple[PartReport, ...] = ()
    averaged: int = 0
    values: Mapping[str, object] = field(default_factory=dict)
    fits: Mapping[str, Mapping[str, Fit]] = field(default_factory=dict)
    bad: tuple[str, ...] | None = None
    globals: tuple[str, ...] = ()
    unsafe: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def text(self) -> str:
        """The report in lines of text."""
        rows: list[tuple[str, str]] = [("file", f"{self.path}: {self.kind}, {self.size:,} bytes")]
        rows += [("sha256", f"{value}  {name}") for name, value in self.sha256.items()]
        if self.found is not None:
            family = self.found.family
            rows.append(
                (
                    "family",
                    f"{self.found.name}: {family.title}, {self.found.layout} layout ({self.found.evidence})",
                )
            )
            rows += [("", f"it {family.refusal}")] if family.refusal else []
            rows += [("note", family.note)] if family.note else []
        for part in self.parts:
            dtypes = ", ".join(f"{name} × {count}" for name, count in part.dtypes.items())
            rows.append(
                (
                    "part",
                    f"{part.name:<8} {part.tensors:>5} tensors  {part.parameters:>13,} parameters  {dtypes}",
                )
            )
        rows.append(
            ("averages", f"EMA copies of {self.averaged} tensors" if self.averaged else "no EMA copies")
        )
        rows += [
            ("stored", f"{key} = {textwrap.shorten(str(value), 80)}") for key, value in self.values.items()
        ]
        for name, parts in self.fits.items():
            rows += [("card", f"{name}, {part}: {result}") for part, result in parts.items()]
        fitting = [name for name, parts in self.fits.items() if all(parts.values())]
        if self.fits:
            rows.append(("loads as", ", ".join(fitting) or "none of the cards"))
        if self.globals:
            rows.append(("pickle", f"names {', '.join(self.globals)}"))
            rows.append(("", f"UNSAFE: {', '.join(self.unsafe)}" if self.unsafe else "nothing unsafe"))
        if self.bad is not None:
            rows.append(
                (
                    "NaN",
                    (
                        f"NaN or infinity in {len(self.bad)} tensors: {', '.join(self.bad[:8])}"
                        if self.bad
                        else "none, no infinity either"
                    ),
                )
            )
        rows += [("PROBLEM", problem) for problem in self.problems]
        return "\n".join(f"{name:<9} {value}" for name, value in rows)


def inspect(
    path: str | Path, *, candidates: Candidates = card_candidates, nan: bool = False, digest: bool = True
) -> Report:
    """What is in a single file or a diffusers folder, without loading and without executing anything.

    candidates: the cards to compare with, given the detected family; by default the library's. nan: look for
    NaN and infinity (reads every tensor). digest: SHA-256 (reads every byte). FileNotFoundError if there is
    nothing at ``path``; what is wrong with a file is in `Report.problems`.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, candidates, nan, digest)
    path = existing_file(path)
    names, unsafe, problems = (), (), []
    state: dict[str, Tensor] = {}
    values: Mapping[str, object] = {}
    kind = _kind(path)
    if kind != "safetensors":
        try:
            scanned = scan_file(path)
            names, unsafe = scanned.globals, scanned.refused
        except ValueError:
            pass  # the reader below says why
    try:
        state, values = read_tensors(path)
    except ValueError as error:
        problems.append(str(error))
    found, parts, left = _take_apart(state, path, problems)
    if left:
        problems.append(
            f"{len(left)} tensors belong to no part: {', '.join(left[:5])}{' …' if len(left) > 5 else ''}"
        )
    return Report(
        path=path,
        kind=kind,
        size=path.stat().st_size,
        sha256={path.name: sha256(path)} if digest else {},
        found=found,
        parts=tuple(_part(name, part) for name, part in parts.items()),
        averaged=len(ema_names(state)),
        values=values,
        fits=_fits(candidates, found, parts),
        bad=_bad(state) if nan else None,
        globals=names,
        unsafe=unsafe,
        problems=tuple(problems),
    )


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        return "safetensors"
    kinds = {b"PK": "zip archive (PyTorch since 1.6)", b"\x80": "pickle (PyTorch before 1.6, or plain)"}
    return next((kind for magic, kind in kinds.items() if head.startswith(magic)), "unknown format")


def _take_apart(
    state: Mapping[str, Tensor], path: Path, problems: list[str]
) -> tuple[Detection | None, dict[str, dict[str, Tensor]], list[str]]:
    if not state:
        return None, {}, []
    try:
        found = detect({key: tuple(tensor.shape) for key, tensor in state.items()}, source=path)
    except ValueError as error:
        problems.append(str(error))
        return None, {"?": dict(state)}, []
    if not found.family.parts:
        return found, {"all": dict(state)}, []
    parts, left = split_parts(state, found)
    return found, parts, [key for key in left if key != "scale_factor"]


def _part(name: str, state: Mapping[str, Tensor]) -> PartReport:
    parameters = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    return PartReport(name=name, tensors=len(state), parameters=parameters, dtypes=dict(dtypes.most_common()))


def _fits(
    candidates: Candidates, found: Detection | None, parts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Fit]]:
    if found is None:
        return {}
    have = {name: {key: tuple(tensor.shape) for key, tensor in part.items()} for name, part in parts.items()}
    return {
        candidate.name: {
            name: fit_table(table, have.get(name, {}), shapes)
            for name, (table, shapes) in candidate.parts.items()
        }
        for candidate in candidates(found)
    }


def _bad(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(key for key, tensor in state.items() if not is_finite(tensor))


def _native(path: Path, nan: bool, digest: bool) -> Report:
    """A folder of ours: its card, and its parts wherever the card says they lie."""
    problems: list[str] = []
    try:
        card: Any = read_card(path / "card.yaml")
    except ValueError as error:
        return Report(path=path, kind="folder of ldm", size=0, problems=(str(error),))
    where = {file.stem: path for file in sorted(path.glob("*.yaml")) if file.name != "card.yaml"}
    where |= {part: path / folder for part, folder in getattr(card, "parts", {}).items()}
    states, files, kinds = {}, {}, {}
    for part, folder in where.items():
        try:
            about, file = about_part(folder, part), folder / f"{part}.safetensors"
            states[part], files[part] = read_tensors(file)[0], file
            kinds |= {part: about["network"]} if "network" in about else {}
            if digest and sha256(file) != about["sha256"]:
                problems.append(
                    f"{str(file)!r} is not the file that {part}.yaml was written with: its sha256 differs"
                )
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return Report(
        path=path,
        kind=f"folder of ldm, {card.name} ({card.summary})",
        size=sum(file.stat().st_size for file in files.values()),
        sha256={f"{part}.safetensors": sha256(file) for part, file in files.items()} if digest else {},
        values=kinds,
        parts=tuple(_part(part, state) for part, state in states.items()),
        bad=tuple(f"{part}: {key}" for part, state in states.items() for key in _bad(state)) if nan else None,
        problems=tuple(problems),
    )


def _folder(path: Path, candidates: Candidates, nan: bool, digest: bool) -> Report:
    if (path / "card.yaml").is_file():
        return _native(path, nan, digest)
    problems: list[str] = []
    values: dict[str, object] = {}
    components = {}
    if is_folder(path):
        try:
            top = read_folder(path, parts=())
            values = {"class": top.class_name, **top.options}
        except (ValueError, OSError) as error:
            problems.append(str(error))
    subfolders = (
        [path]
        if list_variants(path)
        else sorted(folder for folder in path.iterdir() if folder.is_dir() and list_variants(folder))
    )
    if not subfolders and not problems:
        problems.append(f"{str(path)!r} holds no weights that are known by name")
    names, unsafe = dict[str, None](), dict[str, None]()
    for folder in subfolders:
        name = folder.name
        for file in list_variants(folder).values():
            if file.suffix == ".bin":
                try:
                    scanned = scan_file(file)
                    names |= dict.fromkeys(scanned.globals)
                    unsafe |= dict.fromkeys(f"{name}/{file.name}: {each}" for each in scanned.refused)
                except ValueError:
                    pass
        try:
            components[name] = read_component(folder)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    parts = {name: dict(component.tensors) for name, component in components.items()}
    found = _folder_family(parts, path, problems)
    files = [file for component in components.values() for file in component.files]
    return Report(
        path=path,
        kind="diffusers folder" if is_folder(path) else "folder",
        size=sum(file.stat().st_size for file in files),
        found=found,
        sha256={str(file.relative_to(path)): sha256(file) for file in files} if digest else {},
        values=values,
        parts=tuple(_part(name, part) for name, part in parts.items()),
        fits=_fits(candidates, found, _ours(parts)),
        globals=tuple(names),
        bad=tuple(f"{name}: {key}" for name, part in parts.items() for key in _bad(part)) if nan else None,
        unsafe=tuple(unsafe),
        problems=tuple(problems),
    )


def _ours(parts: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {PARTS.get(name, name): part for name, part in parts.items()}


def _folder_family(
    parts: Mapping[str, Mapping[str, Tensor]], path: Path, problems: list[str]
) -> Detection | None:
    deciding = (
        parts.get("unet") or parts.get("prior") or (next(iter(parts.values())) if len(parts) == 1 else None)
    )
    if deciding is None:
        return None
    try:
        return detect({key: tuple(tensor.shape) for key, tensor in deciding.items()}, source=path)
    except ValueError as error:
        problems.append(str(error))
        return None
