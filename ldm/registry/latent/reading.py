"""Latent diffusion models and autoencoders, from wherever their weights are."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

from torch import nn

from ldm.catalog.cards import AutoencoderCard, Card, ModelCard
from ldm.diffusion.prediction import check_prediction
from ldm.pipelines.latent import LatentDiffusion
from ldm.registry.latent.assembly import assemble_latent
from ldm.registry.latent.sources import (
    autoencoder_from_file,
    autoencoder_from_folder,
    latent_from_diffusers,
    latent_from_file,
    latent_from_ldm,
    latent_from_random,
)
from ldm.registry.locating import WeightsRequest
from ldm.registry.sources import Source, random_networks
from ldm.weights.formats.diffusers_folder import is_folder, list_variants


def load_latent(card: ModelCard, request: WeightsRequest) -> LatentDiffusion:
    """Return a card's pipeline; see `ldm.registry.loading.load`."""
    if request.prediction is not None:
        check_prediction(request.prediction)
        card = replace(card, prediction=request.prediction)
    source = read_latent_source(card, request)
    for note in source.notes:
        warnings.warn(f"weights {str(request.weights)!r}: {note}", stacklevel=3)
    vocabulary = None if request.vocabulary is None else Path(request.vocabulary)
    return assemble_latent(card, source, vocabulary=vocabulary)


def load_autoencoder(card: AutoencoderCard, request: WeightsRequest) -> nn.Module:
    """Return the network of an autoencoder; see `ldm.registry.loading.load`."""
    if request.random:
        return random_networks(card.shapes(), request.dtype)["vae"]
    path = file_or_folder(card, request)
    if path.is_file():
        return autoencoder_from_file(card, path, request.dtype, ema=request.ema)
    return autoencoder_from_folder(card, path, request.dtype, variant=request.variant)


def read_latent_source(card: ModelCard, request: WeightsRequest) -> Source:
    """Read a model's networks from a single file, a folder in diffusers or ldm layout, or at random."""
    if request.random:
        return latent_from_random(card, request.dtype, request.embedded)
    path = file_or_folder(card, request)
    if path.is_file():
        return latent_from_file(card, path, request.dtype, ema=request.ema)
    if is_folder(path):
        return latent_from_diffusers(card, path, request.dtype, variant=request.folder_variant)
    if not (path / "card.yaml").is_file() and not (path / "unet.yaml").is_file():
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
