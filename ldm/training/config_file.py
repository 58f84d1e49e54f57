"""Stage files: YAML configurations that can build on each other with ``base``.

A `base` that ends in .yaml or .yml is another file. Any other is the name of a model, which a part reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.support.config import build, nearest, read_yaml
from ldm.support.text import escaped, shown
from ldm.training.kinds import part_kinds


def read_stage_file(path: str | Path) -> dict[str, Any]:
    """Read a stage file, merged into the file that its ``base`` names.

    The path is relative to the file. Nested mappings are merged key by key; any other value replaces
    the base's. A run without a name is named after the file.

    Raises:
        FileNotFoundError: If the file or a base is absent.
        ValueError: If a file is no YAML mapping, or bases form a cycle.
    """
    path = Path(path)
    mapping = _read_with_base(path, ())
    if isinstance(run := mapping.get("run"), dict):
        mapping["run"] = {"name": path.stem, **run}
    return mapping


def _read_with_base(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    mapping = read_yaml(path)
    if path.resolve() in [reader.resolve() for reader in readers]:
        raise ValueError(f"base: a cycle of files: {' -> '.join(str(reader) for reader in (*readers, path))}")
    base = mapping.get("base")
    if base is None or (isinstance(base, str) and not base.endswith((".yaml", ".yml"))):
        return mapping
    if not isinstance(base, str):
        raise ValueError(
            f"{shown(str(path))}: base: expected the relative path of a YAML file or the name of a model, got"
            f" {shown(base)}"
        )
    del mapping["base"]
    return merge(_read_with_base(path.parent / base, (*readers, path)), mapping)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `changes`; nested mappings are merged, other values replaced."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def build_stage_config(mapping: Mapping[str, Any], path: str | Path) -> tuple[str, Any]:
    """Build the configuration of a stage from the mapping in its file.

    Returns:
        The name of the part that it trains (see `part_kinds`), and the part's configuration.

    Raises:
        ValueError: If the part is unknown, a key is unknown or missing, or a value is impossible; the
            message names it and the file.
    """
    mapping = dict(mapping)
    kinds, part = part_kinds(), mapping.pop("part", None)
    if not isinstance(part, str) or part not in kinds:
        raise ValueError(f"{shown(str(path))}: part {shown(part)}; {nearest(part, kinds)}")
    try:
        return part, build(kinds[part].config, mapping)
    except ValueError as error:
        raise ValueError(f"{shown(str(path))}: {escaped(error)}") from None
