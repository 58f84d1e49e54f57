"""Read the files of controls: tensors, and the configuration beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.weights.adapters.files import read_adapter
from ldm.weights.formats.diffusers_folder import Component, find_weights, read_component
from ldm.weights.formats.safetensors import existing_file, sha256
from ldm.weights.keymap import below

# what programs write before every key
WRAPPERS = ("control_model.", "module.", "adapter.", "controlnet.")
# what an original file of a ControlNet may hold beside it: the model that it was trained with
BASE_MODEL = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
BUFFERS = ("betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "logvar", "lvlb_weights")
CONTROL_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlFile:
    """The content of a file or folder of a control.

    Args:
        path: The file or folder.
        tensors: The tensors by key, without what programs write before every key.
        component: The folder in diffusers layout; None for a file.
        metadata: The strings beside the tensors.
        beside: Number of tensors of the model that it was trained with, which are not read.
        digest: Its SHA-256.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    component: Component | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: int = 0
    digest: str = ""

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json of a folder; empty for a file."""
        return {} if self.component is None else self.component.config


def read_control(path: str | Path, *, digest: bool = True) -> ControlFile:
    """Return the content of a control's file, or of its folder in diffusers layout. Nothing is executed.

    Args:
        path: The file or folder.
        digest: Whether to compute its SHA-256, which reads every byte. Default: True.

    Raises:
        FileNotFoundError: If there is no such file, or no weights in the folder.
        ValueError: If it is damaged or refused; the message names it.
    """
    path = Path(path)
    name = control_digest(path) if digest else ""
    if path.is_dir():
        component = read_component(path)
        tensors, _ = unwrapped(component.tensors)
        return ControlFile(path=path, tensors=tensors, component=component, digest=name)
    content = read_adapter(existing_file(path), digest=False)
    tensors, beside = unwrapped(content.tensors)
    return ControlFile(path=path, tensors=tensors, metadata=content.metadata, beside=beside, digest=name)


def unwrapped(tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], int]:
    """Return tensors without the prefix that all of them have, and the number of those of another model."""
    own = below("control_model.", tensors)
    if own:
        left = {key for key in tensors if not key.startswith("control_model.")}
        others = {key for key in left if key.startswith((*BASE_MODEL, *BUFFERS))}
        return {**own, **{key: tensors[key] for key in sorted(left - others)}}, len(others)
    for wrapper in WRAPPERS:
        if tensors and all(key.startswith(wrapper) for key in tensors):
            return below(wrapper, tensors), 0
    return tensors, 0


def control_digest(path: str | Path) -> str:
    """Return the SHA-256 of a control's file; of a folder, that of its weights and its config.json."""
    path = Path(path)
    if not path.is_dir():
        return sha256(existing_file(path))
    files = [*find_weights(path)[0], *([path / CONTROL_CONFIG] if (path / CONTROL_CONFIG).is_file() else [])]
    return hashlib.sha256(" ".join(map(sha256, files)).encode()).hexdigest()
