"""Read and write the ldm layout: a folder with NAME.safetensors and NAME.yaml for each part.

NAME.yaml states the class of the network and its configuration, the SHA-256 of the weights, and facts such as
how they were trained. A text tower has its vocabulary in vocabulary.json. For whole models see `ldm_model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.conditioning.conditioner import TextConditioner, TextConvention
from ldm.models.clip.towers import TextConfig, TextTower
from ldm.models.draft import Draft, DraftConfig
from ldm.models.text.bpe import Tokenizer
from ldm.support.config import MAX_SIZE, build, check_between, nearest, read_yaml, to_dict
from ldm.support.files import file_exists, write_atomically
from ldm.support.scalars import check_above_zero
from ldm.support.strict_json import read_json
from ldm.support.strict_yaml import format_yaml
from ldm.support.text import escaped, shown
from ldm.weights.formats.safetensors import read_safetensors, sha256, write_safetensors
from ldm.weights.hashing import FileHashes
from ldm.weights.parts import NETWORKS, build_network
from ldm.weights.strict import load_strict

# How the text tower of the models that this repository trained is read.
LARGEST_LAYOUT_STEPS = 1000  # timesteps of the prior's schedule
EMOJI_TEXT = TextConvention(length=None, pad=0, masked=True, pooled=True)
SLOT_TEXT = TextConvention(length=None, pad=0, masked=True)  # of models with exemplars
VOCABULARY, WORDS_VOCABULARY = "vocabulary.json", "words-vocabulary.json"
"""Files of the vocabularies of a model's text tower, and of a decoder's own."""


@dataclass(frozen=True, kw_only=True)
class PartFacts:
    """The entries of a part's YAML that the library reads; others are not looked at.

    Args:
        model: Configuration of the network.
        sha256: SHA-256 of the weights.
        network: Class of the network; None if the name of the part decides.
        clip: Name of the CLIP that it was trained on.
        latent_scale: Scale of an autoencoder's latents.
        factor: How many times an upsampler enlarges.
        residual: See `StageCard`.
        layout_steps: Evaluations that a prior over layouts was trained to draw a layout in; None for
            `ldm.conditioning.layouts.LAYOUT_STEPS`.
    """

    model: Mapping[str, Any]
    sha256: str
    network: str | None = None
    clip: str | None = None
    latent_scale: float | None = None
    factor: int | None = None
    residual: float | None = None
    layout_steps: int | None = None

    def __post_init__(self) -> None:
        check_above_zero(latent_scale=self.latent_scale)
        if self.layout_steps is not None and not 1 <= self.layout_steps <= LARGEST_LAYOUT_STEPS:
            raise ValueError(
                f"layout_steps: expected 1 to {LARGEST_LAYOUT_STEPS}, got {shown(self.layout_steps)}"
            )
        check_between(1, MAX_SIZE, factor=self.factor)


PART_FACTS = tuple(each.name for each in fields(PartFacts))


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The content of vocabulary.json: see `write_vocabulary`."""

    tokens: tuple[int, ...] | None
    words: tuple[str, ...] | None


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
        ValueError: If a number leaves the range of ``dtype``, or a fact cannot be written as YAML.
    """
    about = {"network": type(module).__name__, "model": to_dict(config), "sha256": ""}
    if taken := sorted(about.keys() & facts.keys()):
        raise ValueError(f"fact {taken[0]!r}: the YAML of a part has an entry of this name")
    about |= to_dict(facts)
    format_yaml(about, f"{name}.yaml")
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.safetensors"
    state = {key: narrow(key, value, dtype) for key, value in module.state_dict().items()}
    write_safetensors(weights, state, {"format": "pt", "part": name})
    about["sha256"] = sha256(weights)
    write_atomically(folder / f"{name}.yaml", format_yaml(about, f"{name}.yaml"))


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
    """Return the content of ``name``.yaml.

    Raises:
        FileNotFoundError: If it or the weights are absent.
        ValueError: If it is damaged, or an entry of `PartFacts` is missing or wrong.
    """
    path, weights = Path(folder) / f"{name}.yaml", Path(folder) / f"{name}.safetensors"
    for each in (path, weights):
        if not file_exists(each):
            raise FileNotFoundError(
                f"no {name} in {shown(str(folder))}: {each.name} is absent (`ldm export CONFIG` writes it"
                " after training)"
            )
    about = read_yaml(path)
    build(PartFacts, {key: about[key] for key in PART_FACTS if key in about}, shown(str(path)))
    return about


def read_part(
    folder: str | Path,
    name: str,
    config: type,
    network: type[nn.Module],
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a part in evaluation mode, and the content of its YAML.

    Args:
        folder: The folder.
        name: Name of the part.
        config: Class of the configuration.
        network: Class of the network.
        dtype: Floating-point type of the network. Default: float32.

    Raises:
        FileNotFoundError: If the part is absent.
        ValueError: If the weights have another SHA-256 than the YAML states, or do not fit.
    """
    about = about_part(folder, name)
    if about.get("network", network.__name__) != network.__name__:
        raise ValueError(
            f"{name}.yaml in {str(folder)!r}: expected a {network.__name__}, got a {about['network']}"
        )
    about = {**about, "network": network.__name__}
    hashes = FileHashes({f"{name}.safetensors": Path(folder) / f"{name}.safetensors"})
    module = fill_part(folder, name, about, dtype=dtype)
    check_part_hash(folder, name, about, hashes)
    return module, about


def fill_part(folder: str | Path, name: str, about: Mapping[str, Any], *, dtype: torch.dtype) -> nn.Module:
    """Return the network of a part in evaluation mode, without looking at its SHA-256.

    Args:
        folder: The folder.
        name: Name of the part.
        about: The content of its YAML.
        dtype: Floating-point type of the network.

    Raises:
        ValueError: If the weights do not fit.
    """
    config, weights = part_config(folder, name, about), Path(folder) / f"{name}.safetensors"
    try:
        module = build_network(config)
    except ValueError as error:
        raise ValueError(f"{shown(str(weights.with_suffix('.yaml')))}: {error}") from None
    load_strict(module, read_safetensors(weights), source=weights, dtype=dtype)
    return module.eval().requires_grad_(False)


def check_part_hash(
    folder: str | Path, name: str, about: Mapping[str, Any], hashes: Mapping[str, str]
) -> None:
    """Compare the weights of a part with the SHA-256 that its YAML states.

    Args:
        folder: The folder.
        name: Name of the part.
        about: The content of its YAML.
        hashes: SHA-256 of the files by name.

    Raises:
        ValueError: If they differ.
    """
    if hashes[f"{name}.safetensors"] != about["sha256"]:
        weights = Path(folder) / f"{name}.safetensors"
        raise ValueError(
            f"{str(weights)!r} is not the file that {name}.yaml was written with: its sha256 differs"
        )


def network_class(folder: str | Path, name: str, about: Mapping[str, Any]) -> tuple[type, type[nn.Module]]:
    """Return the classes of a part's configuration and network.

    The YAML states the network's class; if it does not, the name of the part decides.

    Args:
        folder: The folder, for messages.
        name: Name of the part.
        about: The content of its YAML.

    Raises:
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
    kind = about.get("network", usual.get(name))
    if kind not in kinds:
        raise ValueError(f"{name}.yaml in {str(folder)!r}: network {shown(kind)}; {nearest(kind, kinds)}")
    return kinds[kind]


def part_config(folder: str | Path, name: str, about: Mapping[str, Any]) -> Any:
    """Return the configuration of a part.

    Args:
        folder: The folder, for messages.
        name: Name of the part.
        about: The content of its YAML.
    """
    where = f"{shown(str(Path(folder) / f'{name}.yaml'))}: model"
    return build(network_class(folder, name, about)[0], about["model"], where)


def read_part_config(folder: str | Path, name: str) -> Any:
    """Return the configuration of a part, as its YAML states it."""
    return part_config(folder, name, about_part(folder, name))


def read_network(
    folder: str | Path, name: str, *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a part, of the class that its YAML states, and the content of the YAML."""
    return read_part(folder, name, *network_class(folder, name, about_part(folder, name)), dtype=dtype)


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
    folder: Path,
    tokenizer: Tokenizer,
    words: Sequence[str] | frozenset[str] | None,
    *,
    name: str = VOCABULARY,
) -> None:
    """Write the vocabulary of a text tower.

    Args:
        folder: The folder to write.
        tokenizer: The tokenizer, whose tokens are those that the text tower embeds.
        words: The words that its training saw; None if they are not known.
        name: Name of the file. Default: vocabulary.json.
    """
    vocabulary = {"tokens": tokenizer.vocabulary, "words": None if words is None else sorted(words)}
    write_atomically(folder / name, json.dumps(vocabulary, separators=(",", ":")).encode())


def read_vocabulary(folder: str | Path, *, name: str = VOCABULARY) -> tuple[Tokenizer, frozenset[str] | None]:
    """Return the tokenizer of a folder, and the words that the training of its text tower saw, if known.

    Args:
        folder: The folder.
        name: Name of the file. Default: vocabulary.json.

    Raises:
        FileNotFoundError: If there is no vocabulary.
        ValueError: If it is damaged.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"no vocabulary in {str(folder)!r}: {path.name} is absent")
    read = build(Vocabulary, read_json(path), shown(str(path)))
    try:
        return Tokenizer(vocabulary=read.tokens), None if read.words is None else frozenset(read.words)
    except ValueError as error:
        raise ValueError(f"{shown(str(path))}: {escaped(error, 300)}") from None


def read_text(
    folder: str | Path,
    convention: TextConvention = EMOJI_TEXT,
    *,
    dtype: torch.dtype = torch.float32,
) -> TextConditioner:
    """Return the text tower in a folder, with its tokenizer and, if present, its draft network.

    Args:
        folder: The folder.
        convention: How the text tower is read. Default: that of the models in this package.
        dtype: Floating-point type of the networks. Default: float32.
    """
    tower, _ = read_part(folder, "text", TextConfig, TextTower, dtype=dtype)
    assert isinstance(tower, TextTower)
    tokenizer, words = read_vocabulary(folder)
    draft = (
        read_part(folder, "draft", DraftConfig, Draft, dtype=dtype)[0]
        if (Path(folder) / "draft.yaml").is_file()
        else None
    )
    assert draft is None or isinstance(draft, Draft)
    return TextConditioner(tower, tokenizer, convention, words, draft)
