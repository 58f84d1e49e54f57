"""Published latent diffusion models at reduced width: cards in YAML on top of the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import ldm
import ldm.catalog.cards
from ldm.catalog.cards import ModelCard
from ldm.catalog.lookup import REGISTERED

VAE = {"channels": [32, 64], "blocks": 1}
VQ = {"channels": [32, 64], "blocks": 1, "codes": 48}
CLIP = {"width": 32, "layers": 2, "heads": 2, "embed_dim": None}
CLIP_PENULTIMATE = CLIP | {"layers": 3}
BIGG = {"width": 48, "layers": 3, "heads": 3, "embed_dim": 24, "activation": "gelu"}
BERT = {"vocabulary": 90, "width": 32, "layers": 2, "heads": 2, "head_dim": 16, "length": 77}
UNET = {"channels": [32, 64], "depth": [1, 0], "blocks": 1, "heads": 4, "context_dim": 32}
SD2 = UNET | {"heads": None, "head_dim": 16, "linear_projection": True}
# the transformer blocks are on the lower levels; the vector is the pooled text embedding and six (refiner:
# five) numbers, embedded in 256 values each
SDXL = {
    "channels": [32, 64],
    "depth": [0, 2],
    "mid_depth": 2,
    "blocks": 1,
    "heads": None,
    "head_dim": 16,
    "context_dim": 80,
    "linear_projection": True,
    "pooled_dim": 24 + 6 * 256,
}
BLOCK = {
    "channels": [32, 64],
    "depth": [0, 1],
    "blocks": 1,
    "heads": None,
    "head_dim": 16,
    "context_dim": None,
    "attention": "block",
}
VQ_UNET = {"in_channels": 3, "out_channels": 3}
RESAMPLED = {
    "channels": [32, 64],
    "depth": [1, 0],
    "blocks": 1,
    "heads": 4,
    "context_dim": None,
    "attention": "block",
    "resample": "resblock",
}

# name of the published model: its networks
NETWORKS: dict[str, dict[str, Any]] = {
    "sd-v1-5": {"unet": UNET, "vae": VAE, "text": CLIP},
    "sd-v1-5-inpainting": {"unet": UNET | {"in_channels": 9}, "vae": VAE, "text": CLIP},
    "instruct-pix2pix": {"unet": UNET | {"in_channels": 8}, "vae": VAE, "text": CLIP},
    "lcm-sd-v1-5": {"unet": UNET | {"guidance_dim": 32}, "vae": VAE, "text": CLIP},
    "sd-v2-1": {"unet": SD2, "vae": VAE, "text": CLIP | {"activation": "gelu"}},
    "sd-v2-inpainting": {"unet": SD2 | {"in_channels": 9}, "vae": VAE, "text": CLIP | {"activation": "gelu"}},
    "sd-v2-depth": {"unet": SD2 | {"in_channels": 5}, "vae": VAE, "text": CLIP | {"activation": "gelu"}},
    "sd-x4-upscaler": {
        "unet": (
            UNET
            | {
                "in_channels": 7,
                "depth": [0, 1],
                "only_cross": [True, False],
                "classes": 1000,
                "linear_projection": True,
            }
        ),
        "vae": VAE | {"channels": [32, 32, 64]},
        "text": CLIP | {"activation": "gelu"},
    },
    "sd-turbo": {"unet": SD2, "vae": VAE, "text": CLIP | {"activation": "gelu"}},
    "sdxl-base": {"unet": SDXL, "vae": VAE, "text": CLIP_PENULTIMATE, "text2": BIGG},
    "sdxl-inpainting": {
        "unet": SDXL | {"in_channels": 9},
        "vae": VAE,
        "text": CLIP_PENULTIMATE,
        "text2": BIGG,
    },
    "sdxl-refiner": {
        "unet": SDXL | {"context_dim": 48, "pooled_dim": 24 + 5 * 256},
        "vae": VAE,
        "text2": BIGG,
    },
    "sdxl-turbo": {"unet": SDXL, "vae": VAE, "text": CLIP_PENULTIMATE, "text2": BIGG},
    "lcm-sdxl": {"unet": SDXL | {"guidance_dim": 32}, "vae": VAE, "text": CLIP_PENULTIMATE, "text2": BIGG},
    "ldm-text2img-large": {"unet": UNET, "vae": VAE, "text": BERT},
    "ldm-text2img256": {"unet": UNET | VQ_UNET, "vae": VQ, "text": BERT},
    "ldm-celebahq": {"unet": BLOCK | VQ_UNET, "vae": VQ},
    "ldm-lsun-churches": {"unet": RESAMPLED | {"scale_shift": True}, "vae": VAE},
    "ldm-cin256": {"unet": UNET, "vae": VQ | {"latent_channels": 4}, "text": {"classes": 10, "width": 32}},
    "ldm-cin256-v2": {"unet": UNET | VQ_UNET, "vae": VQ, "text": {"classes": 1001, "width": 32}},
    "ldm-inpainting-big": {
        "unet": RESAMPLED | {"in_channels": 7, "out_channels": 3},
        "vae": VQ | {"mid_attention": False},
    },
    "ldm-bsr-sr": {
        "unet": BLOCK | {"in_channels": 6, "out_channels": 3},
        "vae": VQ | {"channels": [32, 32, 64]},
    },
}
SIDE = 32


def register(base: str, folder: Path, **changes: Any) -> ModelCard:
    """Register a published model at reduced width as "tiny-BASE", and return its card."""
    name = f"tiny-{base}"
    card = ldm.catalog.lookup.known_cards()[base]
    assert isinstance(card, ModelCard)
    defaults = {
        "sampler": card.defaults.sampler,
        "steps": 3,
        "guidance": card.defaults.guidance,
        "height": SIDE,
        "width": SIDE,
    }
    path = folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base": base,
                "name": name,
                "summary": "a model of the tests",
                "networks": NETWORKS[base],
                "defaults": defaults,
                **changes,
            }
        ),
        encoding="utf-8",
    )
    REGISTERED.pop(name, None)
    return ldm.register(path)


def load(name: str, **options: Any) -> Any:
    """Load a model with random weights on the CPU in float32; options override these."""
    return ldm.load(name, **{"device": "cpu", "dtype": "float32", "weights": "random", **options})
