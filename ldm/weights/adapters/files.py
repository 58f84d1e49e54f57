"""Read adapter files: tensors, metadata, and what a configuration beside them states."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.support.files import file_exists
from ldm.support.strict_json import parse_json, read_json
from ldm.support.text import errors_of, shown
from ldm.weights.adapters.embedding_images import embedding_in_image, is_image
from ldm.weights.adapters.peft_config import check_config, config_scale, config_terms
from ldm.weights.formats.pickle_machine import StandIn
from ldm.weights.formats.pickles import STATES, read_pickle
from ldm.weights.formats.safetensors import MAX_NAME, check_names, existing_file, map_safetensors, sha256
from ldm.weights.formats.single_file import SAFETENSORS_KIND, file_kind

CONFIG = "adapter_config.json"  # of peft
# Names of the tensors in folders that peft and diffusers write.
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
FOLDER_FILES = (*PEFT_FILES, "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
Value = str | int | float
MAX_DEPTH = 8  # of nested mappings in a pickle
MAX_PICKLED = 600_000  # in a pickle; it has no more instructions
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
        return config_scale(self.config, component, path, rank)

    def rotation_terms(self, component: str) -> int | None:
        """Return the number of terms of the series of peft's OFT for rotations; None for no series.

        Without a configuration it is peft's default, 5.

        Args:
            component: Beginning of the configuration's keys, such as "unet".

        Raises:
            ValueError: If the configuration has impossible values.
        """
        return config_terms(self.config, component)

    def check_config(self) -> tuple[str, ...]:
        """Return warnings about fields of peft's configuration that are not known.

        Raises:
            ValueError: If a field asks for what this library does not compute.
        """
        with errors_of(self.path):
            return check_config(self.config, f"peft's configuration of {str(self.path)!r}")


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
    return AdapterFile(path=path, tensors=tensors, values=values, config=config, digest=name)


def _flat(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Value]]:
    """Return the tensors, and texts and numbers, in the content of a pickle, with dots between nested keys.

    A state dict in one of the entries `STATES` stands for the whole file. Values are counted, as a pickle may
    hold one list in many places.

    Raises:
        ValueError: If there are no tensors, keys that are long or cannot be printed, or more values than the
            file has bytes.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Value] = {}
    left = min(path.stat().st_size, MAX_PICKLED)
    if isinstance(content, dict):
        states = [name for name in STATES if isinstance(content.get(name), dict)]
        if states:
            values = {str(key): each for key, each in content.items() if isinstance(each, str | int | float)}
            content = content[states[0]]

    def visit(value: Any, key: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0 or len(key) > MAX_NAME:
            raise ValueError(f"{str(path)!r} holds too many values in lists and mappings, or too long keys")
        if isinstance(value, StandIn) and isinstance(value.state, dict):  # torch's ParameterDict
            value = value.state.get("_parameters", {})
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, str | int | float):
            values[key] = value
        elif isinstance(value, Mapping | list | tuple) and depth < MAX_DEPTH:
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for name, each in items:
                if not isinstance(name, str | int):
                    raise ValueError(f"{str(path)!r}: the key {shown(name)}, expected a text or a number")
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
