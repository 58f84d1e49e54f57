"""Load a model by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.catalog.cards import Kind
from ldm.diffusion.interfaces import Prediction
from ldm.registry.dalle.reading import load_dvae, load_tokens
from ldm.registry.dtype_choice import settled_dtype
from ldm.registry.latent.reading import load_autoencoder, load_latent
from ldm.registry.locating import WeightsRequest, resolve_card
from ldm.registry.unclip.reading import load_prior, load_unclip
from ldm.support.device import pick_device
from ldm.weights.safety import load_safety

# The loader of each kind of card; its first argument is a card of that kind, hence Any.
LOADERS: Mapping[Kind, Callable[[Any, WeightsRequest], nn.Module]] = {
    "latent": load_latent,
    "autoencoder": load_autoencoder,
    "unclip": load_unclip,
    "prior": load_prior,
    "tokens": load_tokens,
    "dvae": load_dvae,
}
PIPELINES: tuple[Kind, ...] = ("latent", "unclip", "tokens")  # the kinds of models that take a safety checker


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
    """Return the model called ``name``, ready to sample.

    Files are read without executing anything in them, and local files are used without network access.

    Args:
        name: Name of the model (see `ldm.list_models`). None: the model whose card.yaml is in the folder
            ``weights``, or else "emoji-ldm".
        weights: A single file (.safetensors or .ckpt), a folder in diffusers layout (for Kandinsky also a
            folder that holds those of prior and decoder), a folder that `ldm.save` wrote, or "random" for
            random weights in the model's shapes. None: the embedded weights; else NAME, NAME.safetensors or
            NAME.ckpt below the folder LDM_HOME; else the hub.
        device: Where the model computes. None: the best device available.
        dtype: "float32", "bfloat16" or "float16"; "auto": by the free memory (`DtypeChoice`). None: the
            fastest that is safe on the device. On a CPU that does not multiply numbers of 16 bits,
            `ldm.optimize` widens such weights in each product.
        ema: Whether to load the averaged weights of a file that holds both. None: if it has them.
        variant: Variant of the files in a diffusers folder, such as "fp16".
        prediction: "eps", "x0" or "v", if the network predicts something else than the card states.
        vocabulary: BERT's vocab.txt, for the text models of LDM.
        safety: File or folder of the safety checker. None: images are not checked.
        black: Whether images that the safety checker flags are replaced by black ones.

    Returns:
        A `LatentDiffusion`, an `UnCLIP` or a `DalleMini`; the network alone for an autoencoder; a
        `PriorStage` for a prior. Its attribute `dtype_choice` states the dtype and the reason for it.

    Raises:
        ValueError: If the name is unknown, or the weights do not fit or belong to another model.
        FileNotFoundError: If there are no weights.
    """
    target = pick_device(device)
    choice = settled_dtype(dtype, name, weights, target)
    request = WeightsRequest(
        weights=weights,
        dtype=choice.dtype,
        ema=ema,
        variant=variant,
        prediction=prediction,
        vocabulary=vocabulary,
    )
    model = load_model(name, target, request, safety=safety, black=black)
    model.__dict__["dtype_choice"] = choice
    return model


def load_model(
    name: str | None,
    device: torch.device,
    request: WeightsRequest,
    *,
    safety: str | Path | None = None,
    black: bool = False,
) -> Any:
    """Return the model called ``name``; see `load`.

    Args:
        name: Name of the model, or None.
        device: Where the model computes.
        request: Which weights to load, and how.
        safety: File or folder of the safety checker. Default: None.
        black: Whether flagged images are replaced by black ones. Default: False.
    """
    card, embedded = resolve_card(name, request.weights)
    request = replace(request, embedded=embedded)
    model: Any = LOADERS[card.kind](card, request)
    if card.kind in PIPELINES:
        model.loaded = request.stated()
        if safety is not None:
            model.safety = load_safety(safety, black=black, variant=request.variant, dtype=torch.float32)
    return model.to(device)
