"""Published unCLIP models at reduced width: cards in YAML on top of the published ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

import ldm
from ldm.catalog.lookup import REGISTERED, known_cards
from ldm.catalog.unclip_cards import PriorCard, StageCard, UnCLIPCard
from ldm.support.config import to_dict

E = 24
TEXT = {"width": E, "layers": 2, "heads": 2, "embed_dim": E}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "embed_dim": E}
PRIOR = {"embed_dim": E, "text_dim": E, "width": 32, "layers": 2, "heads": 4, "head_dim": 8}
PIXELS = {
    "in_channels": 3,
    "out_channels": 6,
    "channels": [32, 64],
    "depth": [0, 1],
    "blocks": 1,
    "heads": None,
    "head_dim": 16,
    "context_dim": 40,
    "attention": "block",
    "resample": "resblock",
    "scale_shift": True,
    "embedded": True,
}
LATENTS = PIXELS | {"in_channels": 4, "out_channels": 8}
SR = PIXELS | {
    "in_channels": 6,
    "out_channels": 3,
    "depth": [0, 0],
    "mid_depth": 0,
    "context_dim": None,
    "scale_shift": False,
    "embedded": None,
}
MOVQ = {"channels": [32, 64], "blocks": 1, "latent_channels": 4, "attention_levels": [1], "codes": 50}
CLIP = {"text": TEXT, "vision": VISION, "prior": PRIOR}
STABLE = {
    "decoder": {
        "channels": [32, 64],
        "depth": [1, 0],
        "blocks": 1,
        "heads": None,
        "head_dim": 16,
        "context_dim": 32,
        "linear_projection": True,
        "class_dim": 2 * E,
    },
    "noise": {"embed_dim": E},
    "vae": {"channels": [32, 64], "blocks": 1},
    "words": {"width": 32, "layers": 2, "heads": 2, "embed_dim": None, "activation": "gelu"},
}
WORDS = {
    "vocabulary": 60,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "mlp_width": 48,
    "positions": 80,
    "embed_dim": 20,
    "length": 30,
}
KANDINSKY21 = {
    "embed_dim": E,
    "tokens": 10,
    "interleaved": False,
    "text_dim": 32,
    "pooled_dim": 20,
    "norms": ["pooled"],
    "null_image": False,
}
KANDINSKY22 = {
    "embed_dim": E,
    "tokens": 32,
    "interleaved": False,
    "text_dim": None,
    "pooled_dim": None,
    "norms": ["image", "tokens"],
    "null_image": False,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "karlo-v1-alpha": {
        **CLIP,
        "decoder": {"unet": PIXELS, "condition": {"embed_dim": E, "text_dim": E, "pooled_dim": E}},
        "upsamplers": [SR],
        "last": True,
    },
    "sd-v2-1-unclip-l": {**CLIP, **STABLE},
    "sd-v2-1-unclip-h": {"vision": VISION | {"activation": "gelu"}, **STABLE},
    "kandinsky-2-1": {
        **CLIP,
        "decoder": {"unet": LATENTS, "condition": KANDINSKY21},
        "words": WORDS,
        "vae": MOVQ,
    },
    "kandinsky-2-2": {**CLIP, "decoder": {"unet": LATENTS, "condition": KANDINSKY22}, "vae": MOVQ},
}
for name in ("kandinsky-2-1", "kandinsky-2-2"):
    decoder = NETWORKS[name]["decoder"]
    NETWORKS[f"{name}-inpaint"] = {
        **NETWORKS[name],
        "decoder": {**decoder, "unet": LATENTS | {"in_channels": 9}},
    }
SIDES = {"karlo-v1-alpha": 16}


def stage(card: StageCard, side: int, steps: int) -> StageCard:
    return replace(card, defaults=replace(card.defaults, steps=steps, height=side, width=side))


def register(base: str, folder: Path, **changes: Any) -> UnCLIPCard:
    """Register a published model at reduced width as "tiny-BASE", and return its card."""
    card, side = known_cards()[base], SIDES.get(base, 32)
    assert isinstance(card, UnCLIPCard)
    stages = {
        "decoder": stage(card.decoder, side, 3),
        "upsamplers": [stage(one, 2 * side, 3) for one in card.upsamplers],
    }
    if card.prior is not None:
        stages["prior"] = stage(card.prior, 16, 3)
    return _register(base, folder, {**stages, "networks": NETWORKS[base], **changes})


def register_prior(folder: Path, **changes: Any) -> PriorCard:
    """Register a prior without a decoder as "tiny-dalle2-laion-prior", and return its card."""
    network = {
        "embed_dim": E,
        "text_dim": E,
        "length": 80,
        "width": E,
        "layers": 2,
        "heads": 2,
        "head_dim": 40,
        "blocks": "cosine",
        "timesteps": 1000,
        "normalize": "unit",
    }
    return _register("dalle2-laion-prior", folder, {"network": network, **changes})


def _register(base: str, folder: Path, fields: dict[str, Any]) -> Any:
    name = f"tiny-{base}"
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({"base": base, "name": name, "summary": "a model of the tests", **to_dict(fields)}),
        encoding="utf-8",
    )
    REGISTERED.pop(name, None)
    return ldm.register(folder / f"{name}.yaml")


def load(name: str, **options: Any) -> Any:
    """Load a model with random weights on the CPU in float32; options override these."""
    return ldm.load(name, **{"device": "cpu", "dtype": "float32", "weights": "random", **options})
