"""Models by name: `load`, `save`, `list_models`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.cards import ModelCard, embedded, find_card, read_card
from ldm.config import to_dict
from ldm.denoiser import Denoiser
from ldm.device import dtype_of, fast_dtype, pick_device
from ldm.files import write_atomically
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.pipelines.latent import LatentDiffusion
from ldm.weights.native import read_part, read_text, write_part, write_text


def list_models() -> list[str]:
    """The names that `load` knows, sorted."""
    return sorted(embedded())


def load(
    name: str = "emoji-ldm", *, weights: str | Path | None = None, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> LatentDiffusion:
    """A model by name, ready to sample.

    ``weights``: a folder in our own layout (`save` writes one) to use in place of the embedded weights. ``device``: None for the best there is.
    ``dtype``: None for the fastest that is safe on the device, else "float32" or "bfloat16". ValueError for an unknown name (the nearest is offered)
    or weights that do not fit; FileNotFoundError for files that are not there.
    """
    card, folder = find_card(name)
    if weights is not None:
        folder = Path(weights)
        if not folder.is_dir():
            raise FileNotFoundError(f"weights {str(weights)!r}: expected a folder with card.yaml, vae, text and unet")
        if (folder / "card.yaml").is_file() and (given := read_card(folder / "card.yaml")).name != name:
            raise ValueError(f"weights {str(weights)!r} are those of {given.name!r}, not of {name!r}")
    target = pick_device(device)
    return read_latent(card, folder, fast_dtype(target) if dtype is None else dtype_of(dtype)).to(target)


def read_latent(card: ModelCard, folder: Path, dtype: torch.dtype) -> LatentDiffusion:
    """A latent diffusion model from a folder in our own layout."""
    vae, about_vae = read_part(folder, "vae", VAEConfig, AutoencoderKL, dtype=dtype)
    net, about_net = read_part(folder, "unet", UNetConfig, UNet, dtype=dtype)
    text = read_text(folder, card.text, dtype=dtype)
    assert isinstance(vae, AutoencoderKL)
    hashes = {"vae": about_vae["sha256"], "unet": about_net["sha256"]}
    denoiser = Denoiser(net, card.schedule.make(), card.prediction)
    return LatentDiffusion(vae=vae, text=text, denoiser=denoiser, latent_scale=float(about_vae["latent_scale"]), card=card, origin=hashes).eval()


def save(pipe: LatentDiffusion, folder: str | Path, **facts: Any) -> Path:
    """Write a model as a folder in our own layout, in float16; `load(name, weights=folder)` reads it back."""
    import yaml

    folder = Path(folder)
    write_part(folder, "vae", pipe.vae, pipe.vae.config, latent_scale=pipe.latent_scale, **facts)
    write_part(folder, "unet", pipe.denoiser.net, pipe.denoiser.net.config, **facts)
    write_text(folder, pipe.text, words=sorted(pipe.text.words or ()), **facts)
    write_atomically(folder / "card.yaml", yaml.safe_dump(to_dict(pipe.card), sort_keys=False, width=140).encode())
    return folder
