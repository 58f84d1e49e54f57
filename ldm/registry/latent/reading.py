"""Latent diffusion models and autoencoders, from wherever their weights are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ldm.catalog.cards import AutoencoderCard, Card, ModelCard
from ldm.diffusion.prediction import check_prediction
from ldm.pipelines.latent import LatentDiffusion
from ldm.registry.latent.assembly import assemble_latent
from ldm.registry.latent.folders import latent_from_diffusers
from ldm.registry.latent.sources import (
    autoencoder_from_file,
    autoencoder_from_folder,
    latent_from_file,
    latent_from_ldm,
    latent_from_random,
)
from ldm.registry.locating import WeightsRequest
from ldm.registry.sources import Source, random_networks
from ldm.samplers.conventions import Convention
from ldm.support.warn import warn_user
from ldm.weights.formats.diffusers_folder import is_folder, list_variants
from ldm.weights.formats.ldm_model import CARD_FILE
from ldm.weights.stated import Stated

FLAX_FILE = "flax_model.msgpack"  # the weights in a folder of flax


def load_latent(card: ModelCard, request: WeightsRequest) -> LatentDiffusion:
    """Return a card's pipeline; see `ldm.registry.loading.load`."""
    if request.prediction is not None:
        check_prediction(request.prediction)
        card = replace(card, prediction=request.prediction)
    source = read_latent_source(card, request)
    for note in source.notes:
        warn_user(f"weights {str(request.weights)!r}: {note}")
    card = card_as_stated(card, source.stated, asked=request.prediction is not None)
    vocabulary = None if request.vocabulary is None else Path(request.vocabulary)
    with request.naming():
        return assemble_latent(card, source, vocabulary=vocabulary)


def card_as_stated(card: ModelCard, stated: Stated, *, asked: bool) -> ModelCard:
    """Return a card that follows what the weights state about their use.

    Args:
        card: The card that the user named.
        stated: What the weights state.
        asked: Whether the user asked for a prediction, which then counts.

    Raises:
        ValueError: If the user asked for another prediction than v and the weights state an EDM schedule.
    """
    schedule = stated.schedule or card.schedule
    if stated.zero_terminal_snr and not schedule.zero_terminal_snr:
        schedule = replace(schedule, zero_terminal_snr=True)
    changes: dict[str, Any] = {
        "schedule": schedule,
        "prediction": None if asked else stated.prediction,
        "zero_negative": stated.zero_negative,
        "latent_mean": stated.latent_mean or None,
        "latent_std": stated.latent_std or None,
        "text": None if stated.pad is None else replace(card.text, pad=stated.pad),
    }
    if card.text2 is not None and stated.pad2 is not None:
        changes["text2"] = replace(card.text2, pad=stated.pad2)
    if stated.spacing is not None:
        if asked and card.prediction != "v":
            raise ValueError(
                f"prediction {card.prediction!r}: the weights state an EDM schedule, expected 'v'"
            )
        grid = {"spacing": stated.spacing} | ({} if stated.rho is None else {"rho": stated.rho})
        changes["convention"] = Convention(grids={"*": grid})
    return replace(card, **{name: value for name, value in changes.items() if value is not None})


def load_autoencoder(card: AutoencoderCard, request: WeightsRequest) -> nn.Module:
    """Return the network of an autoencoder; see `ldm.registry.loading.load`."""
    if request.random:
        return random_networks(card.shapes(), request.dtype)["vae"]
    path = file_or_folder(card, request)
    path = path / FLAX_FILE if (path / FLAX_FILE).is_file() else path
    if path.is_file():
        return autoencoder_from_file(card, path, request.dtype, ema=request.ema)
    return autoencoder_from_folder(card, path, request.dtype, variant=request.variant)


def read_latent_source(card: ModelCard, request: WeightsRequest) -> Source:
    """Read a model's networks from a single file, a folder in diffusers or ldm layout, or at random."""
    if request.random:
        return latent_from_random(card, request.dtype, request.embedded)
    asked = request.prediction is not None
    path = file_or_folder(card, request)
    if path.is_file():
        return latent_from_file(card, path, request.dtype, ema=request.ema, asked=asked)
    native = (path / CARD_FILE).is_file() and (card.files is not None or (path / "unet.yaml").is_file())
    if native and is_folder(path) and card.files is None:
        raise ValueError(
            f"weights {str(path)!r}: the folder holds a model in ldm layout and one in diffusers layout;"
            f" remove {CARD_FILE} or model_index.json"
        )
    if is_folder(path) and not native:
        return latent_from_diffusers(card, path, request.dtype, variant=request.folder_variant, asked=asked)
    if not native:
        found = (
            "the weights of one part alone"
            if list_variants(path)
            else "neither model_index.json (diffusers layout) nor card.yaml (written by ldm.save)"
        )
        raise FileNotFoundError(
            f"weights {str(path)!r}: expected the folder of a model, but it holds {found}"
        )
    return latent_from_ldm(card, path, request.dtype)


def file_or_folder(card: Card, request: WeightsRequest) -> Path:
    """Return the path of a card's weights; FileNotFoundError if there is neither a file nor a folder."""
    path = request.path(card)
    if not path.is_file() and not path.is_dir():
        raise FileNotFoundError(
            f"weights {str(path)!r}: expected a single file, a folder in diffusers layout, a folder that"
            ' ldm.save wrote, or "random"'
        )
    return path
