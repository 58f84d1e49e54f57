"""Read the networks of DALL·E Mini and its relatives from files and folders.

The parts are found by their content: every file of weights in the folder, and in the folders in it, is
opened, and its keys tell what it holds. So a folder may be min-dalle's (encoder.pt, decoder.pt, detoker.pt),
one of flax files, of files that were converted from them, or a mixture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.dalle_cards import EXEMPLAR_PARTS, TOKEN_PARTS, DalleCard, DVAECard
from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.models.clip.towers import TextTower
from ldm.models.dalle.detokenizer import DetokenizerConfig
from ldm.models.dalle.encoder import StateEncoder
from ldm.models.dit import DiT
from ldm.models.text.byte_bpe import ByteTokenizer
from ldm.models.vq import VQConfig
from ldm.registry.dalle.model_config import check_model_config
from ldm.registry.dalle.tokenizer_files import find_tokenizer, read_tokenizer
from ldm.registry.sources import Source, part_dtype, part_shapes, random_networks, read_parts
from ldm.support.text import escaped
from ldm.weights.detection import Detection, detect
from ldm.weights.formats.exemplar_file import layout_steps, read_library
from ldm.weights.formats.ldm_folder import SLOT_TEXT, read_vocabulary
from ldm.weights.formats.ldm_model import library_folder
from ldm.weights.formats.single_file import (
    AUTOENCODER_PREFIXES,
    autoencoder_alone,
    read_tensors,
    split_parts,
    without_wrapper,
)
from ldm.weights.hashing import FileHashes
from ldm.weights.parts import build_network, fill_network

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".safetensors", ".msgpack")
MOST_FILES = 40  # of weights, in a folder and those in it
# families of files that hold parts of a model
PIECES = (
    *("dalle-mini", "dalle-mini-encoder", "dalle-mini-decoder", "dalle-mini-detokenizer"),
    "first-stage-vq",
)
HALVES = {"encoder": "dalle-dvae-encoder", "decoder": "dalle-dvae-decoder"}
# a tensor by which models of different sizes differ
TELLING = {"encoder": "embed_tokens.weight", "decoder": "embed_tokens.weight"}


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """The networks, and what is read with them.

    Attributes:
        source: The networks.
        tokenizer: The tokenizer of a model without exemplars.
        text: The conditioner of a model with exemplars.
    """

    source: Source
    tokenizer: ByteTokenizer | None = None
    text: ExemplarConditioner | None = None


@dataclass(kw_only=True)
class FoundParts:
    """The parts that the files of a folder hold.

    Args:
        states: Tensors by part.
        paths: The file of each part.
        others: Families of the files that hold no part of the model.
    """

    states: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def tokens_from_random(card: DalleCard, dtype: torch.dtype, folder: Path | None) -> TokenSource:
    """Return random weights in the card's shapes, with a tokenizer that spells.

    Args:
        card: The model's card.
        dtype: Floating-point type of the networks.
        folder: Folder of an embedded model, for its shapes and its tokenizer; None if it is not embedded.
    """
    shapes = part_shapes(card, None if folder is None else card.part_folders(folder))
    source = Source(networks=random_networks(shapes, dtype), latent_scale=1.0, origin={"random": "seed 0"})
    if folder is not None and shapes.keys() >= set(EXEMPLAR_PARTS):
        return TokenSource(source=source, text=conditioner_of(source, card.part_folders(folder)))
    return TokenSource(
        source=source, tokenizer=ByteTokenizer.spelling() if folder is None else read_tokenizer(folder)
    )


def tokens_from_ldm(card: DalleCard, folder: Path, dtype: torch.dtype) -> TokenSource:
    """Read a folder in the ldm layout."""
    source = read_parts(card, folder, dtype, latent_scale=None)
    if source.networks.keys() >= set(EXEMPLAR_PARTS):
        return TokenSource(source=source, text=conditioner_of(source, source.folders))
    return TokenSource(source=source, tokenizer=read_tokenizer(folder))


def conditioner_of(source: Source, folders: Mapping[str, Path]) -> ExemplarConditioner:
    """Return the conditioner of a model with exemplars.

    Args:
        source: The networks.
        folders: Folder of each part, where the tokenizer and the library are.

    Raises:
        ValueError: If a network is of another kind.
    """
    tower, layout, encoder = (source.networks[part] for part in ("text", "layout", "encoder"))
    if not (isinstance(tower, TextTower) and isinstance(layout, DiT) and isinstance(encoder, StateEncoder)):
        raise ValueError(
            "text, layout, encoder: expected a TextTower, a DiT and a StateEncoder, got"
            f" {type(tower).__name__}, {type(layout).__name__} and {type(encoder).__name__}"
        )
    tokenizer, words = read_vocabulary(folders["text"])
    return ExemplarConditioner(
        TextConditioner(tower, tokenizer, SLOT_TEXT, words),
        layout,
        read_library(library_folder(folders)),
        cell=encoder.config.cell,
        layout_steps=layout_steps(folders["layout"]),
    )


def tokens_from_folder(card: DalleCard, folder: Path, dtype: torch.dtype) -> TokenSource:
    """Read a folder of published files.

    Raises:
        FileNotFoundError: If a part or the tokenizer is absent.
        ValueError: If a file is damaged, refused, does not fit, or states another model.
    """
    shapes = card.shapes()
    found = find_parts(folder, shapes)
    if missing := [part for part in TOKEN_PARTS if part not in found.states]:
        others = f"; it holds {', '.join(sorted(set(found.others)))}" if found.others else ""
        raise FileNotFoundError(
            f"weights {str(folder)!r}: no {', '.join(missing)} of {card.name!r}; expected encoder.pt,"
            f" decoder.pt and detoker.pt of min-dalle, or flax_model.msgpack with a folder vqgan{others}"
            " (docs/dalle.md)"
        )
    homes = list(dict.fromkeys((found.paths["encoder"].parent, folder)))
    check_model_config(card, homes[0])
    suffix = "_mini" if found.paths["encoder"].stem.endswith("_mini") else ""
    tokenizer, files = find_tokenizer(homes, card.cleaning, suffix)
    files |= {part_file_name(folder, path): path for path in found.paths.values()}
    networks = {part: token_network(part, shapes[part], found, dtype) for part in TOKEN_PARTS}
    source = Source(networks=networks, latent_scale=1.0, origin=FileHashes(files))
    return TokenSource(source=source, tokenizer=tokenizer)


def part_file_name(folder: Path, path: Path) -> str:
    """Return the name of a file in a folder, or in a folder in it, for recipes."""
    return path.relative_to(folder).as_posix()


def token_network(part: str, config: Any, found: FoundParts, dtype: torch.dtype) -> nn.Module:
    """Return the network of a part, filled from its file, whose tensors are released.

    A file without an encoder of images is read as a `Detokenizer`.

    Args:
        part: Name of the part.
        config: Its configuration.
        found: What the folder holds.
        dtype: Floating-point type of the network.
    """
    state = found.states.pop(part)
    if isinstance(config, VQConfig) and not any(key.startswith("encoder.") for key in state):
        config = DetokenizerConfig(**vars(config))
    return fill_network(
        build_network(config), state, "original", source=found.paths[part], dtype=part_dtype(part, dtype)
    )


def find_parts(folder: Path, shapes: Mapping[str, Any]) -> FoundParts:
    """Return the parts in a folder and the folders in it; of several files, the first one that fits.

    Args:
        folder: The folder.
        shapes: Configurations by part.

    Raises:
        ValueError: If a file is damaged or refused, or there are too many.
    """
    found, sized = FoundParts(), set[str]()
    for path in weight_files(folder):
        detected, parts = pieces_of(path)
        if not parts:
            found.others.append(detected)
        for part, state in parts.items():
            fits = has_size(part, state, shapes[part])
            if part in sized or (part in found.states and not fits):
                continue
            found.states[part], found.paths[part] = state, path
            sized |= {part} if fits else set()
    return found


def weight_files(folder: Path) -> Iterator[Path]:
    """Yield the files of weights in a folder, then those in the folders in it, by name."""
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    paths = [path for place in (folder, *inner) for path in sorted(place.iterdir())]
    files = [path for path in paths if path.suffix in WEIGHT_SUFFIXES and path.is_file()]
    if len(files) > MOST_FILES:
        raise ValueError(
            f"weights {str(folder)!r}: {len(files)} files of weights, expected at most {MOST_FILES}"
        )
    yield from files


def pieces_of(path: Path) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """Return the family of a file, in words, and its tensors by part; no parts for another family."""
    state = without_wrapper(read_tensors(path)[0])
    if any(key.startswith(AUTOENCODER_PREFIXES) for key in state):
        state = autoencoder_alone(state)
    try:
        found = detect({key: tuple(tensor.shape) for key, tensor in state.items()}, source=path)
    except ValueError:
        return f"{escaped(path.name, 100)}, of no known family", {}
    if found.name not in PIECES:
        return f"{escaped(path.name, 100)}, {found.family.title}", {}
    return found.name, piece_parts(state, found, path)


def piece_parts(state: Mapping[str, Tensor], found: Detection, path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a file by part; ValueError if some belong to none."""
    parts, left = split_parts(state, found)
    if left:
        raise ValueError(
            f"{str(path)!r} ({found.family.title}) holds tensors of no part of it: {', '.join(left[:5])}"
        )
    return parts


def has_size(part: str, state: Mapping[str, Tensor], config: Any) -> bool:
    """Return whether a part is of the size that a configuration states; models may be in one folder."""
    if part not in TELLING:
        return True
    name = TELLING[part]
    rows = config.vocabulary + (1 if part == "decoder" else 0)
    return name in state and tuple(state[name].shape) == (rows, config.width)


def dvae_from_path(card: DVAECard, path: Path, dtype: torch.dtype) -> nn.Module:
    """Return DALL·E's autoencoder from a folder with encoder.pkl and decoder.pkl, or a file of both halves.

    Raises:
        FileNotFoundError: If a half is absent.
        ValueError: If a file is damaged, refused, or does not fit.
    """
    state: dict[str, Tensor] = {}
    if path.is_file():
        state = read_tensors(path)[0]
    else:
        for file in weight_files(path):
            tensors = read_tensors(file)[0]
            name = detect({key: tuple(tensor.shape) for key, tensor in tensors.items()}, source=file).name
            half = next((half for half, family in HALVES.items() if family == name), None)
            state |= {f"{half}.{key}" if half else key: tensor for key, tensor in tensors.items()}
    for half in HALVES:
        if not any(key.startswith(f"{half}.") for key in state):
            raise FileNotFoundError(
                f"weights {str(path)!r}: no {half} of {card.name!r}; expected a folder with encoder.pkl and"
                " decoder.pkl"
            )
    network = build_network(card.vae)
    return fill_network(network, state, "original", source=path, dtype=part_dtype("vae", dtype))
