"""Models by name: `load`, `save`, `list_models`, `register`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.catalog.cards import AutoencoderCard, Card, ModelCard
from ldm.catalog.lookup import find_card, read_card
from ldm.catalog.unclip_cards import PriorCard, UnCLIPCard
from ldm.diffusion.interfaces import Prediction
from ldm.diffusion.prediction import check_prediction
from ldm.registry.latent.assembly import assemble_latent
from ldm.registry.latent.sources import (
    Source,
    autoencoder_folder,
    latent_from_file,
    latent_from_folder,
    latent_from_native,
    latent_from_random,
)
from ldm.registry.unclip.reading import load_prior, load_unclip
from ldm.support.device import dtype_of, fast_dtype, pick_device
from ldm.weights.formats.diffusers_folder import is_folder, list_variants
from ldm.weights.formats.hub import download, local_path
from ldm.weights.safety import load_safety


def load(
    name: str | None = None,
    *,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    prediction: Prediction | None = None,
    vocabulary: str | Path | None = None,
    safety: str | Path | None = None,
    black: bool = False,
) -> Any:
    """A model by name, ready to sample: a `LatentDiffusion` or an `UnCLIP`; for a first stage or a tiny
    autoencoder (kl-f8, taesd), its network alone; for a prior alone, its stage.

    ``name``: None for the model whose card lies in the folder of ``weights``, else "emoji-ldm". ``weights``:
    a single file (.safetensors or .ckpt, which is read without executing anything), a folder in the layout of
    diffusers (or, for Kandinsky, one that holds those of prior and decoder), a folder that `save` wrote, or
    "random" for small random weights in the model's shapes. None: the embedded weights, else NAME below
    LDM_HOME, else the hub. Local files never touch the network. ``device``: None for the best there is.
    ``dtype``: None for the fastest that is safe on the device, else "float32", "bfloat16" or "float16".

    ``ema``: the averaged weights, where a file has both (None: if it has them). ``variant``: of a folder's
    files, such as "fp16". ``prediction``: what the network predicts where that differs from the card ("eps"
    or "v", which keys cannot tell). ``vocabulary``: BERT's vocab.txt, for LDM's text models. ``safety``: the
    safety checker's file or folder; ``black``: whether flagged pictures become black.

    ValueError for an unknown name (the nearest is offered), or weights that do not fit or belong to another
    card; FileNotFoundError for files that are not there.
    """
    card, folder = find_weighed(name, weights)
    target = pick_device(device)
    kind = fast_dtype(target) if dtype is None else dtype_of(dtype)
    if isinstance(card, UnCLIPCard | PriorCard):
        if prediction is not None or vocabulary is not None:
            raise ValueError(
                f"{card.name!r} is of the unCLIP family: prediction and vocabulary are options of latent"
                " diffusion models"
            )
        path = None if weights == "random" else locate(card, folder, weights)
        if isinstance(card, PriorCard):
            return load_prior(card, path, kind).to(target)
        pipe: Any = load_unclip(card, folder, path, kind, ema=ema, variant=variant)
    else:
        if prediction is not None and isinstance(card, ModelCard):
            check_prediction(prediction)
            card = replace(card, prediction=prediction)
        source = read_latent_source(card, folder, weights, kind, ema=ema, variant=variant)
        for note in source.notes:
            warnings.warn(f"weights {str(weights)!r}: {note}", stacklevel=2)
        if isinstance(card, AutoencoderCard):
            return source.networks["vae"].to(target)
        pipe = assemble_latent(card, source, vocabulary=None if vocabulary is None else Path(vocabulary))
    if safety is not None:
        pipe.safety = load_safety(safety, black=black, variant=variant, dtype=torch.float32)
    return pipe.to(target)


def find_weighed(name: str | None, weights: str | Path | None) -> tuple[Card, Path | None]:
    """The card of a name, or the one in the folder of weights where that is of this name or none was given;
    ValueError if it is of another."""
    path = None if weights in (None, "random") else Path(weights) / "card.yaml"  # type: ignore[arg-type]
    if path is None or not path.is_file():
        return find_card("emoji-ldm" if name is None else name)
    given = read_card(path)
    if name not in (None, given.name):
        find_card(name)  # type: ignore[arg-type]
        raise ValueError(f"weights {str(weights)!r} are those of {given.name!r}, not of {name!r}")
    return given, None


def locate(card: Card, embedded_in: Path | None, weights: str | Path | None) -> Path:
    """Where a card's weights lie: what was given, the embedded ones, those below LDM_HOME, or the hub's."""
    return Path(weights) if weights is not None else embedded_in or local_path(card.name) or from_hub(card)


def read_latent_source(
    card: Card,
    embedded_in: Path | None,
    weights: str | Path | None,
    dtype: torch.dtype,
    *,
    ema: bool | None,
    variant: str | None,
) -> Source:
    """A card's networks from wherever its weights are; see `load`."""
    if weights == "random":
        return latent_from_random(card, dtype, embedded_in)
    path = locate(card, embedded_in, weights)
    if path.is_file():
        return latent_from_file(card, path, dtype, ema=ema)
    if not path.is_dir():
        raise FileNotFoundError(
            f"weights {str(path)!r}: expected a single file, a folder of diffusers, a folder that ldm.save"
            ' wrote, or "random"'
        )
    if isinstance(card, AutoencoderCard):
        return autoencoder_folder(card, path, dtype, variant=variant)
    if is_folder(path):
        return latent_from_folder(card, path, dtype, ema=ema, variant=variant)
    if not (path / "card.yaml").is_file() and not (path / "unet.yaml").is_file():
        what = (
            "weights of one part alone"
            if list_variants(path)
            else "neither model_index.json (of diffusers) nor card.yaml (of ldm.save)"
        )
        raise FileNotFoundError(f"weights {str(path)!r}: expected the folder of a model, it holds {what}")
    return latent_from_native(card, path, dtype)


def from_hub(card: Card) -> Path:
    """The path of a card's weights in the hub's cache, downloaded if need be."""
    if card.hub is None:
        raise FileNotFoundError(
            f"the weights of {card.name!r} are not on this machine, and its card names no place in the hub:"
            " pass weights=PATH"
        )
    return download(card.name, card.hub.repo, card.hub.file, sha256=card.hub.sha256, stated=card.hub.stated)
