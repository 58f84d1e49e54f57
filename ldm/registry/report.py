"""What `ldm.registry.inspection.inspect` reports of a file or folder of weights."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from torch import Tensor

from ldm.support.text import escaped, shown
from ldm.weights.cast import is_finite
from ldm.weights.detection import Detection
from ldm.weights.keymap import Fit

MOST_VALUES, MOST_STATEMENTS = 40, 200  # of what a file states, that a report lists
Row = tuple[str, str]  # label and text of one line


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """One part of a model.

    Args:
        name: Name of the part, such as "unet".
        tensors: Number of tensors.
        parameters: Number of their floating-point entries.
        dtypes: Number of tensors of each dtype, the most frequent first.
    """

    name: str
    tensors: int
    parameters: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """What an adapter changes in one block.

    Args:
        part: The network.
        block: The block in the notation of block weights (`ldm.weights.adapters.blocks`).
        tensors: Number of changed tensors.
        ranks: The ranks of the changes.
        alphas: Their alphas.
    """

    part: str
    block: str
    tensors: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class MatchReport:
    """What an adapter changes in a model.

    Args:
        card: Name of the model.
        kinds: Number of changed tensors by kind.
        modules: Number of changed modules by part.
        unused: Keys that match nothing.
        without_effect: Keys of modules that the model never reads.
        words: Words that stand for learned vectors.
        blocks: The changes by block.
    """

    card: str
    kinds: Mapping[str, int]
    modules: Mapping[str, int]
    unused: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    blocks: tuple[BlockReport, ...] = ()

    def rows(self) -> Iterator[Row]:
        """Yield the lines of the report."""
        yield "fits", self.card
        if self.kinds:
            kinds = ", ".join(f"{count} × {kind}" for kind, count in self.kinds.items())
            yield (
                "kinds",
                f"{kinds} in {', '.join(f'{n} modules of {part}' for part, n in self.modules.items())}",
            )
        if self.words:
            yield "words", ", ".join(self.words)
        for block in self.blocks:
            ranks, alphas = (", ".join(f"{x:g}" for x in values) for values in (block.ranks, block.alphas))
            facts = f"{f', rank {ranks}' if ranks else ''}{f', alpha {alphas}' if alphas else ''}"
            yield "block", f"{block.part:<6} {block.block:<6} {block.tensors:>4} tensors{facts}"
        for label, keys in (("unused", self.unused), ("no effect", self.without_effect)):
            if keys:
                yield label, f"{len(keys)} keys: {first_names(keys, 5)}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of a file or folder of weights; `text` formats it.

    Args:
        path: The file or folder.
        kind: Kind of file or folder, in words.
        size: Size of the weights in bytes.
        sha256: SHA-256 by file name; empty if it was not asked for.
        found: The family of published models; None if there is none.
        parts: The parts of the model.
        averaged: Number of tensors that have an averaged (EMA) copy.
        values: What else the file states.
        stated: What the file states about its use, and what is done with it.
        fits: How the keys fit each candidate: name of the cards -> part -> fit.
        bad: Names of tensors with NaN or infinity; None if it was not asked for.
        globals: Names of the globals that a pickle refers to.
        unsafe: Those that are refused.
        judged: Whether every pickle was read to its end.
        problems: Reasons why the weights cannot be loaded as they are.
        made_for: Of an adapter, the family that it was made for; "" for other files.
        matches: Of an adapter, what it changes in the models that it is compared with.
    """

    path: Path
    kind: str
    size: int
    sha256: Mapping[str, str] = field(default_factory=dict)
    found: Detection | None = None
    parts: tuple[PartReport, ...] = ()
    averaged: int = 0
    values: Mapping[str, object] = field(default_factory=dict)
    stated: tuple[str, ...] = ()
    fits: Mapping[str, Mapping[str, Fit]] = field(default_factory=dict)
    bad: tuple[str, ...] | None = None
    globals: tuple[str, ...] = ()
    unsafe: tuple[str, ...] = ()
    judged: bool = True
    problems: tuple[str, ...] = ()
    made_for: str = ""
    matches: tuple[MatchReport, ...] = ()

    def text(self) -> str:
        """Return the report in lines of text."""
        rows: list[Row] = [("file", f"{self.path}: {self.kind}, {self.size:,} bytes")]
        rows += [("sha256", f"{value}  {name}") for name, value in self.sha256.items()]
        rows += [("made for", self.made_for)] if self.made_for else []
        rows += [*self._family_rows(), *(row for match in self.matches for row in match.rows())]
        rows += [*self._part_rows(), *self._card_rows(), *self._safety_rows()]
        rows += [("PROBLEM", problem) for problem in self.problems]
        return "\n".join(f"{name:<9} {escaped(value)}" for name, value in rows)

    def _family_rows(self) -> Iterator[Row]:
        if self.found is None:
            return
        name, family = self.found.name, self.found.family
        yield "family", f"{name}: {family.title}, {self.found.layout} layout ({self.found.evidence})"
        if family.refusal:
            yield "", f"it {family.refusal}"
        if family.note:
            yield "note", family.note

    def _part_rows(self) -> Iterator[Row]:
        for part in self.parts:
            dtypes = ", ".join(f"{name} × {count}" for name, count in part.dtypes.items())
            counts = f"{part.tensors:>5} tensors  {part.parameters:>13,} parameters"
            yield "part", f"{part.name:<8} {counts}  {dtypes}"
        if not self.made_for:
            yield "averages", f"EMA copies of {self.averaged} tensors" if self.averaged else "no EMA copies"
        for key, value in islice(self.values.items(), MOST_VALUES):
            text = value if isinstance(value, str) else shown(value)
            yield "stored", f"{escaped(key, 100)} = {textwrap.shorten(text[:1000], 80)}"
        if len(self.values) > MOST_VALUES:
            yield "stored", f"{len(self.values) - MOST_VALUES} more values"
        for line in self.stated[:MOST_STATEMENTS]:
            yield "states", escaped(line, 600)
        if len(self.stated) > MOST_STATEMENTS:
            yield "states", f"{len(self.stated) - MOST_STATEMENTS} more fields"

    def _card_rows(self) -> Iterator[Row]:
        for name, parts in self.fits.items():
            for part, fit in parts.items():
                yield "card", f"{name}, {part}: {fit}"
        if self.fits:
            fitting = [name for name, parts in self.fits.items() if all(parts.values())]
            yield "loads as", ", ".join(fitting) or "none of the cards"

    def _safety_rows(self) -> Iterator[Row]:
        if self.globals:
            yield "pickle", f"names {first_names(self.globals)}"
        if self.unsafe:
            yield "", f"UNSAFE: {first_names(self.unsafe)}"
        elif not self.judged:
            yield "pickle", "not read to its end: nothing is said about its safety"
        elif self.globals:
            yield "", "nothing unsafe"
        if self.bad:
            yield "NaN", f"NaN or infinity in {len(self.bad)} tensors: {', '.join(self.bad[:8])}"
        elif self.bad is not None:
            yield "NaN", "no NaN and no infinity"


def first_names(names: Sequence[str], most: int = 40) -> str:
    """Return the first names of many, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def report_part(name: str, state: Mapping[str, Tensor]) -> PartReport:
    """Return the report of one part from its tensors."""
    parameters = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    return PartReport(name=name, tensors=len(state), parameters=parameters, dtypes=dict(dtypes.most_common()))


def non_finite(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the tensors that contain NaN or infinity."""
    return tuple(key for key, tensor in state.items() if not is_finite(tensor))


def non_finite_in_parts(parts: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, ...]:
    """Return the names of the tensors that contain NaN or infinity, each after the name of its part."""
    return tuple(f"{part}: {key}" for part, state in parts.items() for key in non_finite(state))
