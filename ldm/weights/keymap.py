"""The rule engine between our parameter names and those of published files, in both directions.

A table is data: sections (a prefix of ours, the prefix in the file) with rules (patterns below the prefixes,
and how the tensors change). Everything starts from the network's own names and shapes, so a file's key is
never guessed: what the table gives for the network is what the file must hold, and all else in the file is
unmapped. In patterns ``{a}`` stands for one piece between dots and ``{a*}`` for one or more.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.weights.strict import mismatch

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """How tensors differ between the file and us; the inverse is exact. Where one side has one name and the
    other several, rows are fused.

    ``transpose``: matrices are transposed. ``ones``: trailing axes of one that a matrix has in the file (a
    1×1 convolution's weight); any number is accepted when reading. ``heads`` or ``head_dim``: fused rows are
    ordered (head, part, channel of the head), as guided-diffusion stores qkv; with neither they are (part,
    row).
    """

    transpose: bool = False
    ones: int = 0
    heads: int | None = None
    head_dim: int | None = None

    def from_file(self, tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """The file's tensors as ours, of the given shapes; views where possible."""
        tensors = [_trim(tensor) for tensor in tensors]
        if self.transpose:
            tensors = [tensor.t() if tensor.ndim == 2 else tensor for tensor in tensors]
        return [
            tensor.reshape(shape)
            for tensor, shape in zip(self._refuse(tensors, len(shapes)), shapes, strict=True)
        ]

    def to_file(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """Our tensors as the file's ``count`` ones."""
        tensors = self._refuse(tensors, count)
        if self.transpose:
            tensors = [tensor.t() if tensor.ndim == 2 else tensor for tensor in tensors]
        return [
            tensor[(...,) + (None,) * self.ones] if tensor.ndim == 2 and self.ones else tensor
            for tensor in tensors
        ]

    def _refuse(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        if len(tensors) == count:
            return list(tensors)
        if len(tensors) == 1:
            return self._split(tensors[0], count)
        if count == 1:
            return [self._join(tensors)]
        raise ValueError(
            f"a rule between {len(tensors)} and {count} tensors: expected one on either side, or as many on"
            " both"
        )

    def _heads(self, rows: int) -> int:
        heads = self.heads or (rows // self.head_dim if self.head_dim else 1)
        if rows % heads:
            raise ValueError(f"{rows} rows cannot be split into {heads} heads")
        return heads

    def _split(self, fused: Tensor, parts: int) -> list[Tensor]:
        rows, rest = fused.shape[0] // parts, fused.shape[1:]
        heads = self._heads(rows)
        split = fused.reshape(heads, parts, rows // heads, *rest).unbind(1)
        return [part.reshape(rows, *rest) for part in split]

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        rows, rest = parts[0].shape[0], parts[0].shape[1:]
        heads = self._heads(rows)
        stacked = torch.stack([part.reshape(heads, rows // heads, *rest) for part in parts], dim=1)
        return stacked.reshape(len(parts) * rows, *rest)


def _trim(tensor: Tensor) -> Tensor:
    return tensor.reshape(_trim_shape(tuple(tensor.shape)))


def _trim_shape(shape: Shape) -> Shape:
    """Without trailing ones beyond the second axis: a 1×1 convolution and a linear layer hold the same
    numbers."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


SAME = Change()


@dataclass(frozen=True)
class Rule:
    """Our key patterns and the file's, both below their section's prefix. ``also``: other spellings, read but
    never written."""

    ours: tuple[str, ...]
    file: tuple[str, ...]
    change: Change = SAME
    also: tuple[tuple[str, ...], ...] = ()


def rename(*pairs: tuple[str, str], change: Change = SAME) -> tuple[Rule, ...]:
    """Rules that rename whole modules: (ours, the file's), for everything below them."""
    return tuple(Rule((f"{ours}.{{rest*}}",), (f"{file}.{{rest*}}",), change) for ours, file in pairs)


IDENTITY = (Rule(("{rest*}",), ("{rest*}",)),)


@dataclass(frozen=True)
class Section:
    """Rules for what stands below a prefix of ours ("" for the root) and a prefix in the file. The longest
    prefix of ours goes first."""

    ours: str
    file: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Step:
    """Some of our keys and the file's keys that hold them."""

    ours: tuple[str, ...]
    file: tuple[str, ...]
    change: Change
    also: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Table:
    """All sections of one layout, and patterns (as in a shell) of file keys that no network needs."""

    sections: tuple[Section, ...]
    ignore: tuple[str, ...] = ()

    def plan(self, names: Iterable[str]) -> list[Step]:
        """The steps for a network with these names, in their order; ValueError for a name without a rule, or
        two for one key of a file."""
        names = list(names)
        known, by_prefix = set(names), {section.ours: section for section in self.sections}
        steps: dict[tuple[str, ...], Step] = {}
        owner: dict[str, tuple[str, ...]] = {}
        for name in names:
            step = self._step(name, by_prefix)
            lost = [sibling for sibling in step.ours if sibling not in known]
            if lost:
                raise ValueError(
                    f"{name!r} stands in one tensor with {lost}, which the network does not have"
                )
            for key in step.file:
                if owner.setdefault(key, step.ours) != step.ours:
                    raise ValueError(f"{step.ours} and {owner[key]} are both mapped to {key!r}")
            steps[step.ours] = step
        return list(steps.values())

    def _step(self, name: str, by_prefix: Mapping[str, Section]) -> Step:
        pieces = name.split(".")
        for end in range(len(pieces), -1, -1):
            section = by_prefix.get(".".join(pieces[:end]))
            if section is None:
                continue
            inner = ".".join(pieces[end:])
            for rule in section.rules:
                for pattern in rule.ours:
                    match = _regex(pattern).fullmatch(inner)
                    if match:
                        return _fill(rule, section, match.groupdict())
        raise ValueError(f"no rule for {name!r}")


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}").replace(r"\*", "*")
    return re.compile(
        re.sub(r"\{(\w+)(\*?)\}", lambda m: f"(?P<{m[1]}>.+)" if m[2] else f"(?P<{m[1]}>[^.]+)", text)
    )


def _fill(rule: Rule, section: Section, pieces: Mapping[str, str]) -> Step:
    def put(patterns: tuple[str, ...], prefix: str) -> tuple[str, ...]:
        texts = (re.sub(r"\{(\w+)\*?\}", lambda m: pieces[m[1]], pattern) for pattern in patterns)
        return tuple(f"{prefix}.{text}" if prefix and text else prefix or text for text in texts)

    also = tuple(put(names, section.file) for names in rule.also)
    return Step(put(rule.ours, section.ours), put(rule.file, section.file), rule.change, also)


def file_shapes(table: Table, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The keys and shapes that a file must hold for a network with these names and shapes."""
    found: dict[str, Shape] = {}
    for step in table.plan(shapes):
        found.update(zip(step.file, _shapes_in_file(step, shapes), strict=True))
    return found


def _shapes_in_file(step: Step, shapes: Mapping[str, Shape]) -> list[Shape]:
    if step.change == SAME and len(step.ours) == len(step.file):
        return [shapes[name] for name in step.ours]
    tensors = step.change.to_file(
        [torch.empty(shapes[name], device="meta") for name in step.ours], len(step.file)
    )
    return [tuple(tensor.shape) for tensor in tensors]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the keys of a file fit a network: what is missing, unexpected or misshapen, in the file's names."""

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not (self.missing or self.extra or self.misshapen)

    def __str__(self) -> str:
        return mismatch(self.missing, self.extra, self.misshapen) or "all keys fit"


def fit_table(table: Table, have: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> Fit:
    """Compare a file's keys and shapes with a network's names and shapes, without any tensor."""
    return _match(table, have, shapes)[1]


def _match(
    table: Table, have: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> tuple[list[tuple[Step, tuple[str, ...]]], Fit]:
    chosen, missing, misshapen, used = [], [], [], set[str]()
    for step in table.plan(shapes):
        keys = next(
            (names for names in (step.file, *step.also) if all(name in have for name in names)), step.file
        )
        used.update(keys)
        missing += [key for key in keys if key not in have]
        for key, need in zip(keys, _shapes_in_file(step, shapes), strict=True):
            if key in have and _trim_shape(tuple(have[key])) != _trim_shape(need):
                misshapen.append(f"{key}: {tuple(have[key])}, expected {need}")
        chosen.append((step, keys))
    extra = [
        key
        for key in have
        if key not in used and not any(fnmatch.fnmatchcase(key, pattern) for pattern in table.ignore)
    ]
    return chosen, Fit(missing=tuple(missing), extra=tuple(extra), misshapen=tuple(misshapen))


def from_file(
    table: Table, state: Mapping[str, Tensor], shapes: Mapping[str, Shape], *, source: str | Path
) -> dict[str, Tensor]:
    """A file's tensors under our names, as views of them where possible.

    shapes: the network's, ``{name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}``.
    ValueError, one for all, lists the file's missing, unexpected and misshapen keys.
    """
    chosen, result = _match(table, {key: tuple(tensor.shape) for key, tensor in state.items()}, shapes)
    if not result:
        raise ValueError(f"{str(source)!r} does not fit: {result}")
    ours: dict[str, Tensor] = {}
    for step, keys in chosen:
        tensors = step.change.from_file([state[key] for key in keys], [shapes[name] for name in step.ours])
        ours.update(zip(step.ours, tensors, strict=True))
    return ours


def to_file(table: Table, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the file's names: the exact inverse of `from_file`."""
    found: dict[str, Tensor] = {}
    for step in table.plan(state):
        tensors = step.change.to_file([state[name] for name in step.ours], len(step.file))
        found.update(zip(step.file, tensors, strict=True))
    return found


def below(prefix: str, state: Mapping[str, object]) -> dict[str, object]:
    """The entries below a prefix ("first_stage_model."), without it; "" gives all."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
