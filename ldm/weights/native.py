"""Our own layout: a folder with NAME.safetensors and NAME.yaml for each part, which says what the network is and where the weights come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.config import build, read_yaml, to_dict
from ldm.files import write_atomically
from ldm.models.clip import TextConfig, TextTower
from ldm.models.conditioner import TextConditioner, TextConvention
from ldm.models.draft import Draft, DraftConfig
from ldm.models.tokenizer import Tokenizer
from ldm.nn.meta import on_meta
from ldm.weights.io import load_strict, read_safetensors, sha256, write_safetensors

EMOJI_TEXT = TextConvention(length=None, pad=0, masked=True, pooled=True)  # how the models trained here read their text tower


def write_part(folder: Path, name: str, module: nn.Module, config: Any, **facts: Any) -> None:
    """Write a network: ``name``.safetensors in float16, and ``name``.yaml with its configuration, the file's hash and the facts."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.safetensors"
    write_safetensors(weights, {key: half(key, value) for key, value in module.state_dict().items()}, {"format": "pt", "part": name})
    about = {"model": to_dict(config), "sha256": sha256(weights), **to_dict(facts)}
    write_atomically(folder / f"{name}.yaml", yaml.safe_dump(about, sort_keys=False, width=140).encode())


def half(key: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor in float16; ValueError if a number leaves float16's range or is not finite."""
    value = value.detach().cpu()
    if not value.is_floating_point():
        return value
    small = value.to(torch.float16)
    if not torch.isfinite(small).all():
        raise ValueError(f"{key}: not all numbers are finite in float16 (largest {float(value.abs().max()):.3g})")
    return small.contiguous()


def about_part(folder: str | Path, name: str) -> dict[str, Any]:
    """What ``name``.yaml says; FileNotFoundError if the part is not there, whole."""
    about, weights = Path(folder) / f"{name}.yaml", Path(folder) / f"{name}.safetensors"
    for path in (about, weights):
        if not path.is_file():
            raise FileNotFoundError(f"no {name} in {str(folder)!r}: {path.name} is absent (`python -m ldm export CONFIG` writes it after training)")
    return read_yaml(about)


def read_part(
    folder: str | Path, name: str, config: type, network: type[nn.Module], *, dtype: torch.dtype = torch.float32, check: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a part and what its YAML says, in a dtype, ready for use.

    ValueError if the weights are not those that the YAML was written with (``check``: their sha256 is compared), or do not fit.
    """
    about, weights = about_part(folder, name), Path(folder) / f"{name}.safetensors"
    if check and sha256(weights) != about["sha256"]:
        raise ValueError(f"{str(weights)!r} is not the file that {name}.yaml was written with: its sha256 differs")
    with on_meta():
        module = network(build(config, about["model"], f"{name}.yaml: model"))
    load_strict(module, read_safetensors(weights), source=weights, dtype=dtype)
    return module.eval().requires_grad_(False), about


def write_text(folder: Path, text: TextConditioner, *, words: Sequence[str], **facts: Any) -> None:
    """Write a text tower, its draft if it has one, and vocabulary.json: the tokens that it embeds and the words that training saw."""
    write_part(folder, "text", text.tower, text.tower.config, **facts)
    if text.draft is not None:
        write_part(folder, "draft", text.draft, text.draft.config, **facts)
    vocabulary = {"tokens": text.tokenizer.vocabulary, "words": sorted(words)}
    write_atomically(folder / "vocabulary.json", json.dumps(vocabulary, separators=(",", ":")).encode())


def read_text(
    folder: str | Path, convention: TextConvention = EMOJI_TEXT, *, dtype: torch.dtype = torch.float32, check: bool = True
) -> TextConditioner:
    """The text conditioner in a folder."""
    tower, _ = read_part(folder, "text", TextConfig, TextTower, dtype=dtype, check=check)
    path = Path(folder) / "vocabulary.json"
    if not path.is_file():
        raise FileNotFoundError(f"no vocabulary in {str(folder)!r}: {path.name} is absent")
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(tower, TextTower)
    draft = read_part(folder, "draft", DraftConfig, Draft, dtype=dtype, check=check)[0] if (Path(folder) / "draft.yaml").is_file() else None
    assert draft is None or isinstance(draft, Draft)
    return TextConditioner(tower, Tokenizer(vocabulary=vocabulary["tokens"]), convention, frozenset(vocabulary["words"]), draft)
