"""Map the tensor names of our networks to those of published files and back, by tables of rules.

A table is data: sections (a prefix of our names and one of the file's) with rules (patterns below the
prefixes, and how the tensors change). Mapping starts from the names and shapes of the network, so that no key
is guessed: the file must hold exactly the keys that the table gives for the network. In patterns, ``{a}``
stands for one piece between dots and ``{a*}`` for one or more.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ldm.weights.strict import mismatch

Shape = tuple[int, ...]
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class Change:
    """How tensors differ between our network and the file; exactly invertible.

    If one side has one tensor and the other several, the one is the concatenation of their rows.

    Args:
        transpose: Whether matrices are transposed.
        ones: Number of trailing axes of size 1 that matrices have in the file, such as the weights of 1×1
            convolutions; any number is accepted when reading.
        heads: Number of heads, if concatenated rows are ordered (head, tensor, channel), as in the qkv of
            guided-diffusion; None for the order (tensor, row).
        head_dim: Channels of each head, as an alternative to ``heads``.
    """

    transpose: bool = False
    ones: int = 0
    heads: int | None = None
    head_dim: int | None = None

    def from_file(self, tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """Return the file's tensors as ours, with the given shapes, as views if possible."""
        tensors = [_without_ones(tensor) for tensor in tensors]
        if self.transpose:
            tensors = [tensor.t() if tensor.ndim == 2 else tensor for tensor in tensors]
        return [
            tensor.reshape(shape)
            for tensor, shape in zip(self._split_or_join(tensors, len(shapes)), shapes, strict=True)
        ]

    def to_file(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """Return our tensors as the file's ``count`` tensors."""
        tensors = self._split_or_join(tensors, count)
        if self.transpose:
            tensors = [tensor.t() if tensor.ndim == 2 else tensor for tensor in tensors]
        return [
            tensor[(...,) + (None,) * self.ones] if tensor.ndim == 2 and self.ones else tensor
            for tensor in tensors
        ]

    def _split_or_join(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        if len(tensors) == count:
            return list(tensors)
        if len(tensors) == 1:
            return self._split(tensors[0], count)
        if count == 1:
            return [self._join(tensors)]
        raise ValueError(
            f"a rule maps {len(tensors)} tensors to {count}: expected one on one of the sides, or equal"
            " numbers"
        )

    def _head_count(self, rows: int) -> int:
        heads = self.heads or (rows // self.head_dim if self.head_dim else 1)
        if rows % heads:
            raise ValueError(f"{rows} rows cannot be split into {heads} heads")
        return heads

    def _split(self, fused: Tensor, parts: int) -> list[Tensor]:
        rows, rest = fused.shape[0] // parts, fused.shape[1:]
        heads = self._head_count(rows)
        split = fused.reshape(heads, parts, rows // heads, *rest).unbind(1)
        return [part.reshape(rows, *rest) for part in split]

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        rows, rest = parts[0].shape[0], parts[0].shape[1:]
        heads = self._head_count(rows)
        stacked = torch.stack([part.reshape(heads, rows // heads, *rest) for part in parts], dim=1)
        return stacked.reshape(len(parts) * rows, *rest)


def _without_ones(tensor: Tensor) -> Tensor:
    return tensor.reshape(_shape_without_ones(tuple(tensor.shape)))


def _shape_without_ones(shape: Shape) -> Shape:
    """Return a shape without ones after the second axis, so that 1×1 convolutions equal linear layers."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


SAME = Change()


@dataclass(frozen=True)
class Rule:
    """Patterns of names below the prefixes of a section.

    Args:
        ours: Patterns of our names.
        file: Patterns of the file's names.
        change: How the tensors differ.
        also: Other patterns of the file's names, which are read but not written.
    """

    ours: tuple[str, ...]
    file: tuple[str, ...]
    change: Change = SAME
    also: tuple[tuple[str, ...], ...] = ()


def rename(*pairs: tuple[str, str], change: Change = SAME) -> tuple[Rule, ...]:
    """Return rules that rename modules, with everything below them; each pair is (our name, the file's)."""
    return tuple(Rule((f"{ours}.{{rest*}}",), (f"{file}.{{rest*}}",), change) for ours, file in pairs)


IDENTITY = (Rule(("{rest*}",), ("{rest*}",)),)


@dataclass(frozen=True)
class Section:
    """Rules for the names below a prefix of ours ("" for the root) and a prefix in the file.

    The section with the longest prefix of ours takes precedence.
    """

    ours: str
    file: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Step:
    """Some of our names, and the names in the file that hold their tensors."""

    ours: tuple[str, ...]
    file: tuple[str, ...]
    change: Change
    also: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Table:
    """The sections of one layout.

    Args:
        sections: The sections.
        ignore: Shell patterns of names in the file that are not needed.
        ones: Shell patterns of our names whose tensors are ones if the file has none of them.
    """

    sections: tuple[Section, ...]
    ignore: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()

    def implies(self, step: Step) -> bool:
        """Return whether the tensors of a step may be left out, because they are ones."""
        return any(fnmatch.fnmatchcase(name, pattern) for name in step.ours for pattern in self.ones)

    def plan(self, names: Iterable[str]) -> list[Step]:
        """Return the steps for a network with these names, in their order.

        Raises:
            ValueError: If a name has no rule, or two are mapped to one name in the file.
        """
        names = list(names)
        known, by_prefix = set(names), {section.ours: section for section in self.sections}
        steps: dict[tuple[str, ...], Step] = {}
        owner: dict[str, tuple[str, ...]] = {}
        for name in names:
            step = self._step(name, by_prefix)
            lost = [sibling for sibling in step.ours if sibling not in known]
            if lost:
                raise ValueError(
                    f"{name!r} shares one tensor of the file with {lost}, which the network does not have"
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
                    match = _pattern_regex(pattern).fullmatch(inner)
                    if match:
                        return _filled_step(rule, section, match.groupdict())
        raise ValueError(f"no rule for {name!r}")


@functools.cache
def _pattern_regex(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern, with a group for each placeholder."""
    text = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}").replace(r"\*", "*")
    return re.compile(
        re.sub(r"\{(\w+)(\*?)\}", lambda m: f"(?P<{m[1]}>.+)" if m[2] else f"(?P<{m[1]}>[^.]+)", text)
    )


@functools.cache
def _template(pattern: str) -> str:
    """Return a pattern as a format string, whose fields are its placeholders."""
    return pattern.replace("*}", "}")


def _filled_step(rule: Rule, section: Section, pieces: Mapping[str, str]) -> Step:
    """Return the step of a rule with its placeholders replaced."""

    def put(patterns: tuple[str, ...], prefix: str) -> tuple[str, ...]:
        texts = (_template(pattern).format_map(pieces) for pattern in patterns)
        return tuple(f"{prefix}.{text}" if prefix and text else prefix or text for text in texts)

    also = tuple(put(names, section.file) for names in rule.also)
    return Step(put(rule.ours, section.ours), put(rule.file, section.file), rule.change, also)


def file_shapes(table: Table, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the names and shapes that a file must hold for a network with these names and shapes."""
    found: dict[str, Shape] = {}
    for step in table.plan(shapes):
        found.update(zip(step.file, shapes_in_file(step, shapes), strict=True))
    return found


def shapes_in_file(step: Step, shapes: Mapping[str, Shape]) -> list[Shape]:
    """Return the shapes of a step's tensors in the file, for a network with these names and shapes."""
    if step.change == SAME and len(step.ours) == len(step.file):
        return [shapes[name] for name in step.ours]
    tensors = step.change.to_file(
        [torch.empty(shapes[name], device="meta", dtype=torch.float32) for name in step.ours], len(step.file)
    )
    return [tuple(tensor.shape) for tensor in tensors]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a file fits a network, in the file's names; true if it fits.

    Args:
        missing: Names that are expected and absent.
        extra: Names that are not expected.
        misshapen: Names with another shape, with both shapes.
    """

    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not (self.missing or self.extra or self.misshapen)

    def __str__(self) -> str:
        return mismatch(self.missing, self.extra, self.misshapen) or "all keys fit"


def fit_table(table: Table, have: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> Fit:
    """Compare the names and shapes in a file (``have``) with those of a network (``shapes``)."""
    return _matched_keys(table, have, shapes)[1]


def _matched_keys(
    table: Table, have: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> tuple[list[tuple[Step, tuple[str, ...]]], Fit]:
    """Return the steps with the names that the file has for each, and how the file fits."""
    chosen, missing, misshapen, used = [], [], [], set[str]()
    plan = table.plan(shapes)
    if table.ones:
        implied = [step for step in plan if table.implies(step)]
        if not any(name in have for step in implied for name in step.file):
            plan = [step for step in plan if step not in implied]
    for step in plan:
        keys = next(
            (names for names in (step.file, *step.also) if all(name in have for name in names)), step.file
        )
        used.update(keys)
        missing += [key for key in keys if key not in have]
        for key, need in zip(keys, shapes_in_file(step, shapes), strict=True):
            if key in have and _shape_without_ones(tuple(have[key])) != _shape_without_ones(need):
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
    """Return a file's tensors under our names, as views if possible.

    Args:
        table: The table of the file's layout.
        state: The file's tensors.
        shapes: Names and shapes of the network's state dict.
        source: The file, for messages.

    Raises:
        ValueError: If names are missing, unexpected or misshapen; one message lists all.
    """
    chosen, result = _matched_keys(table, {key: tuple(tensor.shape) for key, tensor in state.items()}, shapes)
    if not result:
        raise ValueError(f"{str(source)!r} does not fit: {result}")
    ours: dict[str, Tensor] = {}
    for step, keys in chosen:
        tensors = step.change.from_file([state[key] for key in keys], [shapes[name] for name in step.ours])
        ours.update(zip(step.ours, tensors, strict=True))
    if len(ours) < len(shapes):  # those that the table implies
        like = next(iter(ours.values()))
        ours |= {name: like.new_ones(shape) for name, shape in shapes.items() if name not in ours}
    return ours


def to_file(table: Table, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors under the file's names: the exact inverse of `from_file`."""
    found: dict[str, Tensor] = {}
    for step in table.plan(state):
        tensors = step.change.to_file([state[name] for name in step.ours], len(step.file))
        found.update(zip(step.file, tensors, strict=True))
    return found


def below(prefix: str, state: Mapping[str, V]) -> dict[str, V]:
    """Return the entries whose key starts with a prefix, such as "first_stage_model.", without the prefix."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
