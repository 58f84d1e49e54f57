"""Read adapter files: tensors, metadata, and what a configuration beside them states."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.support.files import file_exists
from ldm.support.strict_json import parse_json, read_json
from ldm.support.text import shown
from ldm.weights.adapters.embedding_images import embedding_in_image, is_image
from ldm.weights.formats.pickle_machine import StandIn
from ldm.weights.formats.pickles import STATES, read_pickle
from ldm.weights.formats.safetensors import check_names, existing_file, map_safetensors, sha256
from ldm.weights.formats.single_file import SAFETENSORS_KIND, file_kind

CONFIG = "adapter_config.json"  # of peft
# Names of the tensors in folders that peft and diffusers write.
FOLDER_FILES = (
    *(f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")),
    *(f"pytorch_lora_weights.{suffix}" for suffix in ("safetensors", "bin")),
)
Value = str | int | float
MOST_TERMS = 64  # of a series in a configuration
MAX_DEPTH = 8  # of nested mappings in a pickle
PEFT_METADATA = "lora_adapter_metadata"  # key of a configuration in a header, a JSON text


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterFile:
    """The content of an adapter file.

    Args:
        path: The file with the tensors.
        tensors: The tensors by key, memory-mapped.
        values: The strings and numbers beside them.
        config: What peft's configuration states, by its keys; those of a part begin with its name and a dot.
        digest: SHA-256 of the file, and of its configuration if that is another file.
    """

    path: Path
    tensors: dict[str, Tensor]
    values: Mapping[str, Value] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """The strings beside the tensors."""
        return {key: value for key, value in self.values.items() if isinstance(value, str)}

    def scale(self, component: str, path: str, rank: int) -> float:
        """Return the factor c of a module's change, for a file that has no alpha for it.

        Args:
            component: Beginning of the configuration's keys, such as "unet".
            path: Name of the module.
            rank: Its rank; 0 for a change without one, whose rank the configuration states.

        Raises:
            ValueError: If the configuration has impossible values.
        """
        own = {key.removeprefix(f"{component}."): value for key, value in self.config.items()}
        if "lora_alpha" not in own and "alpha" not in own:
            return 1.0
        kind = str(own.get("peft_type", "LORA")).upper()
        if rank == 0 and kind == "LORA":
            return 1.0
        alpha = _pattern_value(own.get("alpha_pattern"), path, own.get("lora_alpha", own.get("alpha")))
        rank = rank or int(_pattern_value(own.get("rank_pattern"), path, own.get("r")))
        if rank < 1:
            raise ValueError(f"{str(self.path)!r}: its configuration states the rank {rank}")
        return alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)

    def rotation_terms(self, component: str) -> int | None:
        """Return the number of terms of the series of peft's OFT for rotations; None for no series.

        Without a configuration it is peft's default, 5.

        Args:
            component: Beginning of the configuration's keys, such as "unet".

        Raises:
            ValueError: If the configuration has impossible values.
        """
        own = {key.removeprefix(f"{component}."): value for key, value in self.config.items()}
        if not own.get("use_cayley_neumann", True):
            return None
        terms = own.get("num_cayley_neumann_terms", 5)
        if isinstance(terms, bool) or not isinstance(terms, int) or not 1 <= terms <= MOST_TERMS:
            raise ValueError(f"num_cayley_neumann_terms: expected 1 to {MOST_TERMS}, got {shown(terms)}")
        return terms


def _pattern_value(patterns: Any, path: str, default: Any) -> float:
    """Return the number that a configuration has for a module: that of the name it ends with, or the default.

    Raises:
        ValueError: If it is no number, or a pattern is more than a name.
    """
    value = default
    for name, each in patterns.items() if isinstance(patterns, Mapping) else ():
        plain = str(name).removeprefix("^").removesuffix("$")
        if any(sign in plain for sign in "*+?()[]{}|\\"):
            raise ValueError(f"pattern {shown(name)}: expected the name of a module, or the end of one")
        if path == plain or path.endswith(f".{plain}"):
            value = each
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"rank or alpha: expected a number, got {shown(value)}")
    return float(value)


def read_adapter(path: str | Path, *, digest: bool = True) -> AdapterFile:
    """Return the content of an adapter file, or of a folder that peft or diffusers wrote.

    Nothing in it is executed.

    Args:
        path: The file or folder.
        digest: Whether to compute its SHA-256, which reads every byte. Default: True.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or refused; the message names it.
    """
    path = _tensor_file(path)
    name = adapter_digest(path) if digest else ""
    if path.suffix == ".safetensors" or file_kind(path) == SAFETENSORS_KIND:
        tensors, metadata = map_safetensors(path)
        values: Mapping[str, Value] = metadata
    elif is_image(path):
        tensors, values = _flat(embedding_in_image(path), path)
        metadata = {}
    else:
        tensors, values = _flat(read_pickle(path), path)
        metadata = {}
    config: Mapping[str, Any] = {}
    if PEFT_METADATA in metadata:
        config = parse_json(metadata[PEFT_METADATA], f"{str(path)!r}: {PEFT_METADATA}")
    elif (beside := _config_beside(path)) is not None:
        config = read_json(beside)
    if config.get("fan_in_fan_out"):
        raise ValueError(f"{str(path)!r}: fan_in_fan_out is not supported: no network here is transposed")
    return AdapterFile(path=path, tensors=tensors, values=values, config=config, digest=name)


def _flat(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Value]]:
    """Return the tensors, and texts and numbers, in the content of a pickle, with dots between nested keys.

    A state dict in one of the entries `STATES` stands for the whole file.

    Raises:
        ValueError: If there are no tensors, or keys that cannot be printed.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Value] = {}
    if isinstance(content, dict):
        states = [name for name in STATES if isinstance(content.get(name), dict)]
        if states:
            values = {str(key): each for key, each in content.items() if isinstance(each, str | int | float)}
            content = content[states[0]]

    def visit(value: Any, key: str, depth: int) -> None:
        if isinstance(value, StandIn) and isinstance(value.state, dict):  # torch's ParameterDict
            value = value.state.get("_parameters", {})
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, str | int | float):
            values[key] = value
        elif isinstance(value, Mapping | list | tuple) and depth < MAX_DEPTH:
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for name, each in items:
                visit(each, f"{key}.{name}" if key else str(name), depth + 1)

    visit(content, "", 0)
    if not tensors:
        raise ValueError(f"{str(path)!r} holds no tensors")
    check_names(tensors, path)
    return tensors, values


def adapter_digest(path: str | Path) -> str:
    """Return the SHA-256 of an adapter's file, and of peft's configuration beside it if there is one."""
    path = _tensor_file(path)
    digest, beside = sha256(path), _config_beside(path)
    return digest if beside is None else hashlib.sha256(f"{digest} {sha256(beside)}".encode()).hexdigest()


def _tensor_file(path: str | Path) -> Path:
    """Return the file with the tensors of an adapter, given the file or its folder."""
    path = Path(path)
    if not path.is_dir():
        return existing_file(path)
    found = [path / name for name in FOLDER_FILES if file_exists(path / name)]
    if not found:
        raise FileNotFoundError(f"{str(path)!r} has none of {', '.join(FOLDER_FILES)}")
    return found[0]


def _config_beside(path: Path) -> Path | None:
    """Return peft's configuration beside a file of peft's name; None if there is none."""
    beside = path.with_name(CONFIG)
    return beside if path.name.startswith("adapter_model.") and file_exists(beside) else None
