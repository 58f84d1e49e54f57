"""DALL·E Mini and its relatives, from wherever their weights are; DALL·E's autoencoder; and writing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.catalog.dalle_cards import DalleCard, DVAECard
from ldm.models.dalle.decoder import DalleDecoder
from ldm.models.dalle.encoder import DalleEncoder, StateEncoder
from ldm.pipelines.dalle.pipeline import DalleMini
from ldm.registry.dalle.sources import (
    TokenSource,
    dvae_from_path,
    tokens_from_folder,
    tokens_from_ldm,
    tokens_from_random,
)
from ldm.registry.dalle.tokenizer_files import write_tokenizer
from ldm.registry.locating import WeightsRequest
from ldm.registry.sources import origin_of, random_networks
from ldm.support.warn import warn_user
from ldm.weights.formats.exemplar_file import write_library
from ldm.weights.formats.ldm_folder import write_part, write_vocabulary
from ldm.weights.formats.ldm_model import CARD_FILE, write_card


def load_tokens(card: DalleCard, request: WeightsRequest) -> DalleMini:
    """Return a card's pipeline; see `ldm.registry.loading.load`."""
    refuse_other_options(card, request)
    read = read_token_source(card, request)
    for note in read.source.notes:
        warn_user(f"weights {str(request.weights)!r}: {note}")
    with request.naming():
        return assemble_tokens(card, read)


def read_token_source(card: DalleCard, request: WeightsRequest) -> TokenSource:
    """Read a model's networks and tokenizer from a folder in any layout, or at random."""
    if request.random:
        return tokens_from_random(card, request.dtype, request.embedded)
    path = request.path(card)
    if not path.is_dir():
        raise FileNotFoundError(
            f"weights {str(path)!r}: expected a folder with all parts of {card.name!r}, a folder that"
            ' ldm.save wrote, or "random" (docs/dalle.md)'
        )
    if (path / CARD_FILE).is_file():
        return tokens_from_ldm(card, path, request.dtype)
    return tokens_from_folder(card, path, request.dtype)


def assemble_tokens(card: DalleCard, read: TokenSource) -> DalleMini:
    """Return the pipeline of a card's networks, in evaluation mode.

    Raises:
        ValueError: If the networks are of other kinds, or do not fit each other.
    """
    networks = read.source.networks
    encoder, decoder = networks["encoder"], networks["decoder"]
    if not isinstance(encoder, DalleEncoder | StateEncoder) or not isinstance(decoder, DalleDecoder):
        raise ValueError(
            f"{card.name!r}: expected a DalleEncoder or a StateEncoder, and a DalleDecoder, got"
            f" {type(encoder).__name__} and {type(decoder).__name__}"
        )
    pipe = DalleMini(
        encoder=encoder,
        decoder=decoder,
        vae=networks["vae"],
        tokenizer=read.tokenizer,
        text=read.text,
        card=card,
        origin=origin_of(card, read.source, {}),
    )
    pipe.eval()
    return pipe


def load_dvae(card: DVAECard, request: WeightsRequest) -> nn.Module:
    """Return DALL·E's discrete autoencoder; see `ldm.registry.loading.load`."""
    refuse_other_options(card, request)
    if request.random:
        return random_networks(card.shapes(), request.dtype)["vae"]
    path = request.path(card)
    if not path.exists():
        raise FileNotFoundError(
            f'weights {str(path)!r}: expected a folder with encoder.pkl and decoder.pkl, or "random"'
        )
    return dvae_from_path(card, path, request.dtype)


def refuse_other_options(card: DalleCard | DVAECard, request: WeightsRequest) -> None:
    """Raise ValueError for options of diffusion models."""
    given = {"prediction": request.prediction, "vocabulary": request.vocabulary, "ema": request.ema}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{card.name!r} is no diffusion model: {', '.join(wrong)} is an option of those")


def write_tokens(
    pipe: DalleMini, folder: str | Path, *, dtype: torch.dtype | None = None, **facts: Any
) -> Path:
    """Write all parts of a model, its tokenizer and its card, in ldm layout.

    Args:
        pipe: The model.
        folder: The folder to write.
        dtype: Floating-point type of the weights; None keeps each network's own.
        **facts: Entries that are added to every part's YAML.

    Returns:
        The folder.
    """
    folder = Path(folder)
    text = pipe.text
    for part, network in pipe.networks().items():
        extra = {"layout_steps": text.layout_steps} if part == "layout" and text is not None else {}
        write_part(folder, part, network, network.config, dtype=dtype, **extra, **facts)
    if pipe.tokenizer is not None:
        write_tokenizer(folder, pipe.tokenizer)
    if text is not None:
        write_library(folder, text.library)
        write_vocabulary(folder, text.text.tokenizer, text.text.known_words)
    write_card(folder, replace(pipe.card, parts={}))
    return folder
