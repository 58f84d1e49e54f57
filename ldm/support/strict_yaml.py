"""YAML restricted to what a configuration needs, read in a time and a memory that the limits below bound.

Mappings, sequences, texts, numbers, truth values and null are read. Anchors and aliases (with which a few
bytes stand for gigabytes), tags, merge keys and keys that are given twice are refused. Numbers such as 1e-4
are floats, as YAML 1.2 defines; dates are texts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.support.text import escaped, read_utf8, shown

if TYPE_CHECKING:
    from yaml import Mark, Node, SafeLoader

MAX_YAML_BYTES = 1 << 17  # of a file; the largest in this repository has 5 KB
MAX_YAML_VALUES = 10_000  # with keys; PyYAML takes about 0.1 ms for each
MAX_YAML_DEPTH = 32
MAX_YAML_DIGITS = 40  # characters of a whole number
YAML_TAG = "tag:yaml.org,2002:"
YAML_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_UNREAD = {"anchor": "anchors and aliases are not read", "tag": "tags are not read"}


def parse_yaml(path: Path) -> Any:  # Any: what a file holds
    """Return the content of a YAML file.

    Raises:
        ValueError: If the file is too large, not UTF-8, not valid YAML, or holds what is not read. The
            message names the file and the place.
    """
    return parse_yaml_text(read_utf8(path, MAX_YAML_BYTES), shown(str(path)))


def parse_yaml_text(text: str, where: str) -> Any:
    """Return the content of YAML; see `parse_yaml`. ``where`` begins the messages."""
    import yaml

    try:
        loader = _loader()(text)
        try:
            return _construct(loader, loader.get_single_node())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        raise ValueError(f"{where} is not valid YAML: {escaped(error.problem)}{_place(place)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML: {escaped(error, 300)}") from None


def format_yaml(mapping: Mapping[str, Any], where: str) -> bytes:
    """Return a mapping as YAML that `parse_yaml` reads.

    Args:
        mapping: Mappings, lists and scalars.
        where: Start of error messages.

    Raises:
        ValueError: If the mapping holds something else, or more than is read.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    Dumper.add_implicit_resolver(
        f"{YAML_TAG}float", YAML_FLOAT, list("-+.0123456789")
    )  # quotes the text "1e-5"
    try:
        text: str = yaml.dump(mapping, Dumper=Dumper, sort_keys=False, width=140)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} cannot be written as YAML: {escaped(error, 300)}") from None
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"{where}: expected at most {MAX_YAML_BYTES:,} bytes of YAML, got {len(text):,}")
    parse_yaml_text(text, where)
    return text.encode()


def _place(mark: Mark | None) -> str:
    """Return where a mark is, in parentheses."""
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"


def _error(problem: str, mark: Mark) -> Exception:
    import yaml

    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


@functools.cache
def _loader() -> type[SafeLoader]:
    """Return PyYAML's safe loader, which composes neither aliases nor tags and limits the depth."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = values = 0

        def compose_node(self, parent: Node | None, index: Any) -> Node | None:
            event = self.peek_event()
            for name, problem in _UNREAD.items():
                if getattr(event, name, None) is not None:
                    raise _error(problem, event.start_mark)
            self.depth, self.values = self.depth + 1, self.values + 1
            if self.depth > MAX_YAML_DEPTH:
                raise _error(f"expected at most {MAX_YAML_DEPTH} levels", event.start_mark)
            if self.values > MAX_YAML_VALUES:
                raise _error(f"expected at most {MAX_YAML_VALUES:,} keys and values", event.start_mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    Loader.add_implicit_resolver(f"{YAML_TAG}float", YAML_FLOAT, list("-+.0123456789"))
    return Loader


def _construct(loader: SafeLoader, node: Node | None) -> Any:
    """Return the value of a node; a document without content is None."""
    import yaml

    if node is None:
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(loader, node)
    kind, text = node.tag.removeprefix(YAML_TAG), node.value
    if kind == "merge":
        raise _error("merge keys (<<) are not read", node.start_mark)
    if kind == "int" and len(text) > MAX_YAML_DIGITS:
        raise _error(f"expected a number of at most {MAX_YAML_DIGITS} characters", node.start_mark)
    if kind in ("int", "float", "bool", "null"):
        try:
            return loader.construct_object(node)
        except ValueError:
            raise _error(f"{shown(text)} is no number", node.start_mark) from None
    return text


def _construct_mapping(loader: SafeLoader, node: Node) -> dict[str | int, Any]:
    """Return the mapping of a node; every key is a text or a whole number, and is given once."""
    mapping: dict[str | int, Any] = {}
    for key_node, value_node in node.value:
        key = _construct(loader, key_node)
        if not isinstance(key, str | int):
            raise _error(f"expected a text as the key, got {shown(key)}", key_node.start_mark)
        if key in mapping:
            raise _error(f"key {shown(key)} is given twice", key_node.start_mark)
        mapping[key] = _construct(loader, value_node)
    return mapping
