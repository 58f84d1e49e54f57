"""The model that a fine-tuning begins with, and the hashes by which a change of it is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from ldm.catalog.cards import Card, ModelCard
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.loading import load
from ldm.training.inputs.beside import LACKING

AnyCard = TypeVar("AnyCard", bound=Card)


def network_hashes(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the `content_key` of each network."""
    return {name: content_key(network) for name, network in networks.items()}


def check_base(base: str | None, weights: str | None) -> None:
    """Raise ValueError unless a model is named, by its name or by its weights."""
    if base is None and weights is None:
        raise ValueError("expected the name of a model as base, or the folder of a model as weights")


def load_base(base: str | None, weights: str | None) -> LatentDiffusion:
    """Load the model that a training begins with, in float32.

    Raises:
        FileNotFoundError: If its weights are absent.
        ValueError: If it is not a latent diffusion model, or reads what a data set of images lacks.
    """
    pipe = load(base, weights=weights, device="cpu", dtype="float32")
    if not isinstance(pipe, LatentDiffusion):
        raise ValueError(
            f"base {base or weights!r}: expected a latent diffusion model, got a {type(pipe).__name__};"
            " `part: fine-tune-unclip` trains the decoder or the prior of an UnCLIP, and the part tokens the"
            " networks of a DalleMini from scratch"
        )
    card = pipe.card
    reads = "aesthetic scores" if card.vector == "aesthetic" else LACKING.get(card.concat or "")
    if reads is not None:
        raise ValueError(f"base {card.name!r} reads {reads}, which a data set of captioned images lacks")
    return pipe


def load_unclip_base(base: str | None, weights: str | None) -> UnCLIP:
    """Load the unCLIP model that a training begins with, in float32.

    Raises:
        FileNotFoundError: If its weights are absent.
        ValueError: If it is not an unCLIP model.
    """
    pipe = load(base, weights=weights, device="cpu", dtype="float32")
    if not isinstance(pipe, UnCLIP):
        raise ValueError(
            f"base {base or weights!r}: expected an unCLIP model, got a {type(pipe).__name__}; `part:"
            " fine-tune` trains latent diffusion models"
        )
    return pipe


def fine_tuned(pipe: LatentDiffusion, card: ModelCard) -> LatentDiffusion:
    """Return a pipeline with the networks of another one, and a card of its own."""
    card = unpublished(card)
    return LatentDiffusion(
        vae=pipe.vae,
        text=pipe.text,
        denoiser=card.make_denoiser(pipe.denoiser.net),
        latent_scale=pipe.latent_scale,
        card=card,
    ).eval()


def unpublished(card: AnyCard) -> AnyCard:
    """Return a card that names no weights, neither published nor embedded."""
    card = replace(card, hub=None, files=None, parts={})
    return replace(card, folder=None) if isinstance(card, ModelCard) else card


def content_key(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights and their names."""
    found = hashlib.sha256()
    state: dict[str, Any] = network.state_dict()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
