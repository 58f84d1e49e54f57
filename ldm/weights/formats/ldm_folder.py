"""Our own layout: a folder with NAME.safetensors and NAME.yaml for each part, which says what the network is
and where the weights come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.catalog.cards import Card
from ldm.conditioning.conditioner import TextConditioner, TextConvention
from ldm.models.clip.towers import TextConfig, TextTower
from ldm.models.draft import Draft, DraftConfig
from ldm.models.meta import on_meta
from ldm.models.text.bpe import Tokenizer
from ldm.support.config import build, nearest, read_yaml, to_dict
from ldm.support.files import write_atomically
from ldm.weights.formats.safetensors import read_safetensors, sha256, write_safetensors
from ldm.weights.parts import NETWORKS
from ldm.weights.strict import load_strict

# how the models trained here read their text tower
EMOJI_TEXT = TextConvention(length=None, pad=0, masked=True, pooled=True)


def write_part(
    folder: Path,
    name: str,
    module: nn.Module,
    config: Any,
    *,
    dtype: torch.dtype | None = torch.float16,
    **facts: Any,
) -> None:
    """Write a network: ``name``.safetensors in a dtype (None: its own), and ``name``.yaml with its kind and
    shape, the file's hash and the facts."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.safetensors"
    state = {key: narrow(key, value, dtype) for key, value in module.state_dict().items()}
    write_safetensors(weights, state, {"format": "pt", "part": name})
    about = {
        "network": type(module).__name__,
        "model": to_dict(config),
        "sha256": sha256(weights),
        **to_dict(facts),
    }
    write_atomically(folder / f"{name}.yaml", yaml.safe_dump(about, sort_keys=False, width=140).encode())


def narrow(key: str, value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor in a dtype; ValueError if a number leaves the dtype's range or is not finite."""
    value = value.detach().cpu()
    if dtype is None or not value.is_floating_point() or value.dtype == dtype:
        return value.contiguous()
    small = value.to(dtype)
    if not torch.isfinite(small).all():
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{key}: not all numbers are finite in {name} (largest {float(value.abs().max()):.3g})"
        )
    return small.contiguous()


def about_part(folder: str | Path, name: str) -> dict[str, Any]:
    """What ``name``.yaml says; FileNotFoundError if the part is not there, whole."""
    about, weights = Path(folder) / f"{name}.yaml", Path(folder) / f"{name}.safetensors"
    for path in (about, weights):
        if not path.is_file():
            raise FileNotFoundError(
                f"no {name} in {str(folder)!r}: {path.name} is absent (`python -m ldm export CONFIG` writes"
                " it after training)"
            )
    return read_yaml(about)


def read_part(
    folder: str | Path,
    name: str,
    config: type,
    network: type[nn.Module],
    *,
    dtype: torch.dtype = torch.float32,
    check: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a part and what its YAML says, in a dtype, ready for use.

    ValueError if the weights are not those that the YAML was written with (``check``: their sha256 is
    compared), or do not fit.
    """
    about, weights = about_part(folder, name), Path(folder) / f"{name}.safetensors"
    if check and sha256(weights) != about["sha256"]:
        raise ValueError(
            f"{str(weights)!r} is not the file that {name}.yaml was written with: its sha256 differs"
        )
    with on_meta():
        module = network(build(config, about["model"], f"{name}.yaml: model"))
    load_strict(module, read_safetensors(weights), source=weights, dtype=dtype)
    return module.eval().requires_grad_(False), about


def kind_of(folder: str | Path, name: str) -> tuple[type, type[nn.Module]]:
    """The configuration's and the network's class of a part, as its YAML states them (the first exports state
    none)."""
    kinds = {network.__name__: (config, network) for config, network in NETWORKS.items()}
    usual = {
        "vae": "AutoencoderKL",
        "unet": "UNet",
        "text": "TextTower",
        "vision": "VisionTower",
        "draft": "Draft",
    }
    kind = about_part(folder, name).get("network", usual.get(name))
    if kind not in kinds:
        raise ValueError(f"{name}.yaml in {str(folder)!r}: network {kind!r}; {nearest(kind, kinds)}")
    return kinds[kind]


def read_part_config(folder: str | Path, name: str) -> Any:
    """The shape of a part, as its YAML states it."""
    return build(kind_of(folder, name)[0], about_part(folder, name)["model"], f"{name}.yaml: model")


def read_network(
    folder: str | Path, name: str, *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a part, of the kind that its YAML states, and what the YAML says; see `read_part`."""
    return read_part(folder, name, *kind_of(folder, name), dtype=dtype)


def write_card(folder: Path, card: Card) -> None:
    """Write card.yaml."""
    import yaml

    content = yaml.safe_dump(to_dict(card), sort_keys=False, width=140)
    write_atomically(folder / "card.yaml", content.encode())


def begin_with(module: nn.Module, folder: str | Path, name: str, *, leave: str | None = None) -> None:
    """Give a network the weights of a part; ``leave``: a module that stays as it is, there or not. ValueError
    if they do not fit."""
    begun, _ = read_network(folder, name)
    own, state = (
        {
            key: value
            for key, value in net.state_dict().items()
            if leave is None or not key.startswith(f"{leave}.")
        }
        for net in (module, begun)
    )
    wanted, found = ({key: tuple(value.shape) for key, value in weights.items()} for weights in (own, state))
    if wanted != found:
        differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise ValueError(
            f"the {name} in {str(folder)!r} has another shape, first at {differing[0]!r}: expected"
            f" {wanted.get(differing[0])}, got {found.get(differing[0])}"
        )
    module.load_state_dict({**module.state_dict(), **state})


def write_text(folder: Path, text: TextConditioner, *, words: Sequence[str], **facts: Any) -> None:
    """Write a text tower, its draft if it has one, and vocabulary.json: the tokens that it embeds and the
    words that training saw."""
    for part, network in text.networks().items():
        write_part(folder, part, network, network.config, **facts)
    write_vocabulary(folder, text.tokenizer, words)


def write_vocabulary(
    folder: Path, tokenizer: Tokenizer, words: Sequence[str] | frozenset[str] | None
) -> None:
    """Write vocabulary.json: the tokens that a tower embeds (None: all), and the words that its training saw
    (None: not known)."""
    vocabulary = {"tokens": tokenizer.vocabulary, "words": None if words is None else sorted(words)}
    write_atomically(folder / "vocabulary.json", json.dumps(vocabulary, separators=(",", ":")).encode())


def read_vocabulary(folder: str | Path) -> tuple[Tokenizer, frozenset[str] | None]:
    """The tokenizer of a folder and the words that training saw."""
    path = Path(folder) / "vocabulary.json"
    if not path.is_file():
        raise FileNotFoundError(f"no vocabulary in {str(folder)!r}: {path.name} is absent")
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    words = vocabulary["words"]
    return Tokenizer(vocabulary=vocabulary["tokens"]), None if words is None else frozenset(words)


def read_text(
    folder: str | Path,
    convention: TextConvention = EMOJI_TEXT,
    *,
    dtype: torch.dtype = torch.float32,
    check: bool = True,
) -> TextConditioner:
    """The text conditioner in a folder."""
    tower, _ = read_part(folder, "text", TextConfig, TextTower, dtype=dtype, check=check)
    assert isinstance(tower, TextTower)
    tokenizer, words = read_vocabulary(folder)
    draft = (
        read_part(folder, "draft", DraftConfig, Draft, dtype=dtype, check=check)[0]
        if (Path(folder) / "draft.yaml").is_file()
        else None
    )
    assert draft is None or isinstance(draft, Draft)
    return TextConditioner(tower, tokenizer, convention, words, draft)
