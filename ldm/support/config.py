"""Strict conversion between frozen dataclasses and the plain mappings that YAML and JSON files hold.

The library works with frozen dataclasses. YAML is read and written at the edge only: `read_yaml` gives a
mapping, `build` turns it into a dataclass and rejects everything that does not fit, `to_dict` goes back.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from ldm.support.files import file_exists
from ldm.support.scalars import python_scalar
from ldm.support.strict_yaml import parse_yaml
from ldm.support.text import escaped, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")
MOST_CHOICES = 200  # that a message lists
MOST_COMPARED = 5000  # with which a wrong name is compared
MAX_SIZE = 2**22  # of a width or a vocabulary; the largest published one is 250,002


def nearest(name: object, choices: Iterable[object]) -> str:
    """Return the end of an error message about a wrong name: the nearest choice, then all choices.

    Args:
        name: The name that is not among the choices.
        choices: The valid names, in any order; they are listed sorted.

    Returns:
        `"did you mean 'ddim'? Choices: ddim, euler"`, without the question if no choice is similar.
    """
    names = sorted(escaped(choice, 100) for choice in choices)
    more = f" and {len(names) - MOST_CHOICES} more" if len(names) > MOST_CHOICES else ""
    wanted = name if isinstance(name, str) else shown(name)
    near = names if len(names) <= MOST_COMPARED else []
    close = difflib.get_close_matches(wanted[:100], near, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Choices: {', '.join(names[:MOST_CHOICES])}{more}"


def build(cls: type[C], mapping: Mapping[str, Any], where: str = "") -> C:
    """Build a dataclass from a mapping and check every key and type on the way.

    Nested dataclasses, tuples, mappings, `Literal` and optional fields are converted by their annotations. An
    int is accepted where a float is expected; a bool is accepted only where a bool is expected.

    Args:
        cls: The dataclass.
        mapping: Its fields by name. Fields that have a default may be missing.
        where: Path of the mapping inside a larger configuration, used in error messages. Default: none.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: For an unknown or a missing key, a value of the wrong type, or a value that the dataclass
            itself rejects.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where or cls.__name__}: expected a mapping, got {shown(mapping)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = annotations_of(cls)
    for key in mapping:
        if key not in fields:
            raise ValueError(f"{where or cls.__name__}: unknown key {shown(key)}; {nearest(key, fields)}")
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        )
        if name not in mapping and not optional:
            raise ValueError(f"{where or cls.__name__}: missing key {name!r}")
    values = {
        key: convert(value, hints[key], f"{where}.{key}" if where else key) for key, value in mapping.items()
    }
    try:
        return cls(**values)
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{where}: {escaped(error)}" if where else escaped(error)) from None


@functools.cache
def annotations_of(target: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the annotations of a class or a function by name, resolved once."""
    return types.MappingProxyType(typing.get_type_hints(target))


# `Any` below: a value read from YAML has no static type, and an annotation is not always a class.
def convert(value: Any, hint: Any, where: str) -> Any:
    """Return a value converted to an annotation, by the rules of `build`.

    Args:
        value: The value.
        hint: The annotation.
        where: Path of the value inside a configuration, used in error messages.

    Raises:
        ValueError: If the value does not fit.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_to_union(value, args, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: {shown(value)}; {nearest(value, args)}")
        return value
    if origin is tuple:
        return _convert_to_tuple(value, args, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a mapping, got {shown(value)}")
        return {
            convert(key, args[0], where): convert(item, args[1], f"{where}.{escaped(key, 100)}")
            for key, item in value.items()
        }
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max or math.isnan(value):
            raise ValueError(f"{where}: expected a finite number, got {shown(value)}")
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: expected {hint.__name__}, got {shown(value)}")
    return value


def _convert_to_union(value: Any, args: tuple[Any, ...], where: str) -> Any:
    """Return `value` converted to the first member of a union that accepts it."""
    if value is None and type(None) in args:
        return None
    errors = []
    classes = [arg for arg in args if dataclasses.is_dataclass(arg)] if isinstance(value, Mapping) else []
    for arg in _of_kind(classes, value, where) or args:
        if arg is type(None):
            continue
        try:
            return convert(value, arg, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; ".join(errors))


def _of_kind(classes: list[Any], value: Any, where: str) -> list[Any]:
    """Return the class that the key `kind` of a mapping chooses, where each class has a kind; else all.

    A class has the kinds of the `Literal` that its field `kind` is annotated with. Without the key, it is the
    class whose field has a default.
    """
    fields = [{field.name: field for field in dataclasses.fields(cls)}.get("kind") for cls in classes]
    if len(classes) < 2 or None in fields:
        return classes
    kinds = {kind: cls for cls in classes for kind in typing.get_args(annotations_of(cls)["kind"])}
    if "kind" in value:
        if not isinstance(value["kind"], str) or value["kind"] not in kinds:
            raise ValueError(f"{where}.kind: {shown(value['kind'])}; {nearest(value['kind'], kinds)}")
        return [kinds[value["kind"]]]
    usual = [
        cls
        for cls, field in zip(classes, fields, strict=True)
        if field is not None and field.default is not dataclasses.MISSING
    ]
    if not usual:
        raise ValueError(f"{where}: missing key 'kind'; choices: {', '.join(sorted(kinds))}")
    return usual


def filled(cls: type[C], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration with the defaults of fields that were added since.

    Args:
        cls: The dataclass.
        mapping: The record, as `to_dict` made it. If it does not fit the class, it is returned as it is.
    """
    try:
        found: dict[str, Any] = to_dict(build(cls, mapping))
    except ValueError:
        return dict(mapping)
    return found


def _convert_to_tuple(value: Any, args: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    """Return the list or tuple `value` as a `tuple[X, ...]` or a tuple of fixed length."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: expected a list, got {shown(value)}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise ValueError(f"{where}: expected {len(args)} values, got {shown(value)}")
    return tuple(
        convert(item, arg, f"{where}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True))
    )


def check_between(least: int, most: int, /, **values: int | None) -> None:
    """Raise ValueError for the first value outside [least, most]; None stands for no value."""
    for name, value in values.items():
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name}: expected {least:,} to {most:,}, got {shown(value)}")


def check_sizes(config: object, where: str) -> None:
    """Raise ValueError if a whole number in a configuration is larger than any network's; it is named.

    Args:
        config: A dataclass, or a value in one.
        where: Start of the message.
    """
    if dataclasses.is_dataclass(config):
        for each in dataclasses.fields(config):
            check_sizes(getattr(config, each.name), f"{where}.{each.name}")
    elif isinstance(config, tuple):
        for value in config:
            check_sizes(value, where)
    elif isinstance(config, int) and abs(config) > MAX_SIZE:
        raise ValueError(f"{where}: expected at most {MAX_SIZE:,}, got {shown(config)}")


def to_dict(config: Any) -> Any:
    """Return a dataclass as plain mappings, lists and scalars, as YAML and JSON can hold them."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(item) for item in config]
    return python_scalar(config)


def config_sha256(config: Any) -> str:
    """Return the SHA-256 of a dataclass, mapping or list by its values, in 64 hexadecimal digits.

    Fields that have their default do not count, so that a field which is added later changes nothing.
    """
    text = json.dumps(_without_defaults(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _without_defaults(config: Any) -> Any:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
        defaults = {
            each.name: each.default_factory() if callable(each.default_factory) else each.default
            for each in dataclasses.fields(config)
        }
        config = {name: value for name, value in values.items() if value != defaults[name]} | {
            "is": type(config).__name__
        }
    if isinstance(config, Mapping):
        return {key: _without_defaults(value) for key, value in config.items()}
    return [_without_defaults(item) for item in config] if isinstance(config, list | tuple) else config


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; see `ldm.support.strict_yaml` for what is read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not valid YAML, gives a key twice, or holds no mapping at the top.
    """
    path = Path(path)
    if not file_exists(path):
        raise FileNotFoundError(f"no such configuration file: {shown(str(path))}")
    mapping = parse_yaml(path)
    if not isinstance(mapping, dict):
        raise ValueError(f"{shown(str(path))}: expected a mapping at the top, got {type(mapping).__name__}")
    return mapping
