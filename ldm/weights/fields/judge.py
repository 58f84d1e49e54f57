"""Judge a configuration of another library field by field.

A table states for each field of a class the value that the other library takes where the field is absent, and
what this library does with the field:

    followed    the loader acts on the value
    card        the value must be that of the card's network, which the shapes of the tensors do not determine
    fixed       the value must be one of those that this library computes
    sampling    the value concerns a sampler of the other library; a warning says if the card differs
    shapes      the names and shapes of the tensors determine it, and loading compares these
    ignored     the value does not change what is computed; the note says why

A field that no table knows is reported, unless its value is null, false or empty: newer releases add fields
that are off by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ldm.support.text import shown

Action = Literal["followed", "card", "fixed", "sampling", "shapes", "ignored", "unknown"]
Config = Mapping[str, Any]  # a configuration read from JSON; Any: not checked yet
LIMIT = 80  # characters of a word in a message
COMPUTED = "what this library computes"
ANY = object()  # an expected value that every value equals


@dataclass(frozen=True)
class Field:
    """What is done with one field.

    Args:
        default: The value that the other library takes where the field is absent or null.
        action: What is done with it; see the module.
        note: How it is followed, or why it is ignored.
        accepted: The values that a fixed field may have; the first one is the usual one.
    """

    default: object
    action: Action
    note: str = ""
    accepted: tuple[object, ...] = ()


Fields = Mapping[str, Field]


@dataclass(frozen=True)
class Finding:
    """One field of a configuration, judged.

    Args:
        name: Name of the field.
        value: The value that is stated, or the default.
        action: What is done with it.
        note: How, or why.
        expected: The value that is required; None if none is.
        wrong: Whether the value differs from the required one.
    """

    name: str
    value: object
    action: Action
    note: str = ""
    expected: object = None
    wrong: bool = False

    def __str__(self) -> str:
        return f"{self.name} {named(self.value)}, expected {named(self.expected)}"


def followed(default: object, how: str) -> Field:
    """Return the field of a value that the loader acts on."""
    return Field(default, "followed", how)


def by_card(default: object) -> Field:
    """Return the field of a value that must be that of the card's network."""
    return Field(default, "card", "compared with the card")


def fixed(default: object, *also: object) -> Field:
    """Return the field of a value that must be the default, or one of ``also``, which compute the same."""
    return Field(default, "fixed", COMPUTED, (default, *also))


def sampling(default: object, note: str) -> Field:
    """Return the field of a value that only a warning follows from, if it is not that of the card."""
    return Field(default, "sampling", note)


def by_shapes(default: object) -> Field:
    """Return the field of a value that the names and shapes of the tensors determine."""
    return Field(default, "shapes", "the shapes of the tensors determine it")


def ignored(default: object, why: str) -> Field:
    """Return the field of a value that does not change what is computed."""
    return Field(default, "ignored", why)


def judge_fields(
    stated: Config, fields: Fields, expected: Mapping[str, object] | None = None
) -> list[Finding]:
    """Return what is done with each field of a table, and with the stated fields that it does not know.

    Args:
        stated: The configuration. Names that begin with "_" are those of the file format.
        fields: The table of its class.
        expected: The values of the card's network, by field; the default of a field that is left out. None:
            there is no card, and the fields that depend on it are not compared.
    """
    found = []
    for name, field in fields.items():
        value = stated.get(name)
        value = field.default if value is None else value
        wanted: object = None
        wrong = False
        if field.action == "fixed":
            wanted = field.accepted[0]
            wrong = not any(same(value, choice) for choice in field.accepted)
        elif field.action in ("card", "sampling") and expected is not None:
            wanted = expected.get(name, field.default)
            wrong = wanted is not ANY and not same(value, wanted)
        found.append(Finding(name, value, field.action, field.note, wanted, wrong))
    for name, value in stated.items():
        if name not in fields and not name.startswith("_") and value not in (None, False, "", [], {}):
            found.append(Finding(name, value, "unknown", "no table knows it"))
    return found


def conflicts(findings: list[Finding]) -> list[str]:
    """Return a description of each field whose value is not the required one."""
    return [str(finding) for finding in findings if finding.wrong and finding.action != "sampling"]


def warnings_of(findings: list[Finding], where: str) -> tuple[str, ...]:
    """Return a warning for each field that no table knows, and for each that asks for another sampling.

    Args:
        findings: The fields of a configuration, judged.
        where: The configuration, for messages.
    """
    found = [
        f"{where} states {each}: {each.note}" for each in findings if each.action == "sampling" and each.wrong
    ]
    unknown = [f"{named(each.name)} {named(each.value)}" for each in findings if each.action == "unknown"]
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        found.append(
            f"{where} states fields that are not known here and not followed: {', '.join(unknown[:8])}{more}"
        )
    return tuple(found)


def same(value: object, wanted: object) -> bool:
    """Return whether two values of a configuration are equal; one number equals a list of this number.

    True and 1 differ. Lists and tuples are equal if their entries are.
    """
    if isinstance(wanted, list | tuple) and wanted and not isinstance(value, list | tuple):
        return all(same(value, entry) for entry in wanted)
    if isinstance(value, list | tuple) and value and not isinstance(wanted, list | tuple):
        return all(same(entry, wanted) for entry in value)
    if isinstance(value, list | tuple) and isinstance(wanted, list | tuple):
        return len(value) == len(wanted) and all(map(same, value, wanted))
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    return value == wanted


def named(value: object) -> str:
    """Return a value for a message: a plain word as it is, anything else as `shown` does."""
    if isinstance(value, str) and value.isascii() and value.isidentifier() and len(value) <= LIMIT:
        return value
    return shown(value)
