"""Read and write the ldm layout: a folder with NAME.safetensors and NAME.yaml for each part.

NAME.yaml states the class of the network and its configuration, the SHA-256 of the weights, and facts such as
how they were trained. A text tower has its vocabulary in vocabulary.json, and a whole model its card.yaml.
"""

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

CARD_FILE = "card.yaml"
TOKENIZER_FILES = ("vocabulary.json", "vocab.txt", "words-tokenizer.json")

# How the text tower of the models that this repository trained is read.
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
    """Write the weights and the YAML of a part.

    Args:
        folder: The folder to write; it is created.
        name: Name of the part.
        module: The network.
        config: Its configuration, a dataclass.
        dtype: Floating-point type of the weights; None keeps the network's own. Default: float16.
        **facts: Further entries of the YAML.

    Raises:
        ValueError: If a number leaves the range of ``dtype``.
    """
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
    """Return a tensor on the CPU in a dtype (None: its own).

    Raises:
        ValueError: If a number leaves the range of the dtype or is not finite.
    """
    value = value.detach().cpu()
    if dtype is None or not value.is_floating_point() or value.dtype == dtype:
        return value.contiguous()
    small = value.to(dtype)
    if not torch.isfinite(small).all():
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{key}: not all numbers are finite in {name} (largest magnitude {float(value.abs().max()):.3g})"
        )
    return small.contiguous()


def about_part(folder: str | Path, name: str) -> dict[str, Any]:
    """Return the content of ``name``.yaml; FileNotFoundError if it or the weights are absent."""
    about, weights = Path(folder) / f"{name}.yaml", Path(folder) / f"{name}.safetensors"
    for path in (about, weights):
        if not path.is_file():
            raise FileNotFoundError(
                f"no {name} in {str(folder)!r}: {path.name} is absent (`ldm export CONFIG` writes it after"
                " training)"
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
    """Return the network of a part in evaluation mode, and the content of its YAML.

    Args:
        folder: The folder.
        name: Name of the part.
        config: Class of the configuration.
        network: Class of the network.
        dtype: Floating-point type of the network. Default: float32.
        check: Whether to compare the SHA-256 of the weights with the YAML. Default: True.

    Raises:
        FileNotFoundError: If the part is absent.
        ValueError: If the weights have another SHA-256 or do not fit.
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
    """Return the classes of a part's configuration and network.

    The YAML states the network's class; if it does not, the name of the part decides.

    Raises:
        FileNotFoundError: If the part is absent.
        ValueError: If the class is unknown.
    """
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
    """Return the configuration of a part, as its YAML states it."""
    return build(kind_of(folder, name)[0], about_part(folder, name)["model"], f"{name}.yaml: model")


def read_network(
    folder: str | Path, name: str, *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a part, of the class that its YAML states, and the content of the YAML."""
    return read_part(folder, name, *kind_of(folder, name), dtype=dtype)


def write_card(folder: Path, card: Card) -> None:
    """Write card.yaml."""
    import yaml

    content = yaml.safe_dump(to_dict(card), sort_keys=False, width=140)
    write_atomically(folder / CARD_FILE, content.encode())


def model_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are parts of a model in ldm layout, or belong to its tokenizers."""
    parts = [path for path in folder.glob("*.yaml") if path.with_suffix(".safetensors").is_file()]
    weights = [path.with_suffix(".safetensors") for path in parts]
    return [*parts, *weights, *(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())]


def begin_with(module: nn.Module, folder: str | Path, name: str, *, leave: str | None = None) -> None:
    """Load the weights of a part into a network.

    Args:
        module: The network.
        folder: The folder of the part.
        name: Name of the part.
        leave: Dotted name of a sub-module that keeps its weights, whether or not the part has it; None for
            none.

    Raises:
        ValueError: If the part has other tensors than the network.
    """
    source, _ = read_network(folder, name)
    own, state = (
        {
            key: value
            for key, value in net.state_dict().items()
            if leave is None or not key.startswith(f"{leave}.")
        }
        for net in (module, source)
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
    """Write a text tower, its draft network if it has one, and its vocabulary.

    Args:
        folder: The folder to write.
        text: The text tower with its tokenizer.
        words: The words that its training saw.
        **facts: Further entries of each part's YAML.
    """
    for part, network in text.networks().items():
        write_part(folder, part, network, network.config, **facts)
    write_vocabulary(folder, text.tokenizer, words)


def write_vocabulary(
    folder: Path, tokenizer: Tokenizer, words: Sequence[str] | frozenset[str] | None
) -> None:
    """Write vocabulary.json.

    Args:
        folder: The folder to write.
        tokenizer: The tokenizer, whose tokens are those that the text tower embeds.
        words: The words that its training saw; None if they are not known.
    """
    vocabulary = {"tokens": tokenizer.vocabulary, "words": None if words is None else sorted(words)}
    write_atomically(folder / "vocabulary.json", json.dumps(vocabulary, separators=(",", ":")).encode())


def read_vocabulary(folder: str | Path) -> tuple[Tokenizer, frozenset[str] | None]:
    """Return the tokenizer of a folder, and the words that the training of its text tower saw, if known."""
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
    """Return the text tower in a folder, with its tokenizer and, if present, its draft network.

    Args:
        folder: The folder.
        convention: How the text tower is read. Default: that of the models in this package.
        dtype: Floating-point type of the networks. Default: float32.
        check: Whether to compare the SHA-256 of the weights with the YAML. Default: True.
    """
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
