"""Training configurations that are small enough for a test, as mappings in the form of the YAML files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm.training.run import open_run

PRIOR = {"embed_dim": 16, "text_dim": 16, "length": 24, "width": 16, "layers": 1, "heads": 2, "head_dim": 8}
X0 = {"prediction": "x0", "drop": 0.2}
UNET = {"channels": [8, 16], "depth": [0, 1], "blocks": 1, "heads": 2, "context_dim": 16, "embedded": True}
CONDITION = {
    "embed_dim": 16,
    "text_dim": 16,
    "pooled_dim": 16,
    "norms": ["image", "tokens", "text", "pooled"],
}
UPSAMPLER = {
    "in_channels": 6,
    "out_channels": 3,
    "channels": [8, 16],
    "depth": [0, 0],
    "mid_depth": 0,
    "blocks": 1,
    "heads": 1,
    "context_dim": None,
    "attention": "block",
}
TOWERS = {"text": "runs/clip/export", "vision": "runs/clip/export"}


def run(name: str, **changes: Any) -> dict[str, Any]:
    optimizer = {"lr": 1e-3, "warmup": 2, "decay": 2}
    quiet = {"log_every": 1, "validate_every": 4, "sample_every": 4, "checkpoint_every": 2}
    return {
        "name": name,
        "steps": 6,
        "batch": 4,
        "precision": "float32",
        "ema": 0.9,
        "optimizer": optimizer,
        **quiet,
        **changes,
    }


def configs(data: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """Return the configuration of each part over a data set's folder; `changes` go to the run sections."""
    source = {"folder": str(data), "size": 32, "mix": {"background": 0.5, "small": 0.2, "two": 0.2}}
    vae = {
        "part": "vae",
        "run": run("vae", **changes),
        "data": source,
        "loss": {"l1": 1.0, "mse": 1.0, "kl": 1e-3},
        "model": {"channels": [8, 16], "blocks": 1, "latent_channels": 4, "patch": 2},
    }
    tower = {"layers": 1, "heads": 2, "activation": "gelu", "embed_dim": 16}
    clip = {
        "part": "clip",
        "run": run("clip", **changes),
        "data": source,
        "model": {
            "text": {"width": 16, **tower},
            "vision": {"width": 16, "image_size": 32, "patch_size": 8, **tower},
        },
    }
    draft = {
        "part": "draft",
        "run": run("draft", **changes),
        "data": source,
        "vae": "runs/vae/export",
        "text": "runs/clip/export",
        "variants": 5,
        "model": {"embed_dim": 16, "width": 16, "channels": 4, "size": 8},
    }
    unet = {
        "part": "unet",
        "run": run("unet", **changes),
        "data": source,
        "vae": "runs/vae/export",
        "variants": 5,
        "text": {"folder": "runs/draft/export", "tuned": True, "prior": 1.0},
        "diffusion": {"schedule": "cosine", "prediction": "v", "drop": 0.1},
        "model": {
            "in_channels": 8,
            "channels": [8, 16],
            "depth": [0, 1],
            "blocks": 1,
            "heads": 2,
            "context_dim": 16,
            "pooled_dim": 16,
        },
    }
    return {"vae": vae, "clip": clip, "draft": draft, "unet": unet}


def unclip_configs(data: Path) -> dict[str, dict[str, Any]]:
    """Return configurations of all networks of unCLIP, in the order in which they read one another.

    They read the exports of clip, vae and unet as well.
    """
    source = configs(data)["vae"]["data"]
    cached = {"data": source, "variants": 5}
    priors = {"part": "prior", **cached, **TOWERS, "diffusion": X0, "measured": 40}
    codes = {"components": 4, "buckets": 16, "similarities": 4}
    decoders = decoder_configs(cached)
    upsampler = {
        "part": "upsampler",
        "data": source,
        "crop": 16,
        "diffusion": {"prediction": "v", "drop": 0.0},
        "degradation": {"blur": 0.6, "noise": 0.1, "blocks": 0.1},
        "model": UPSAMPLER,
    }
    made: dict[str, dict[str, Any]] = {
        "clip-text": {"part": "clip-text", **cached, **TOWERS},
        "prior": {**priors, "model": PRIOR},
        "prior-ar": {**priors, "autoregressive": {**PRIOR, **codes}},
        "decoder": decoders["decoder"],
        "decoder-begun": decoders["decoder-begun"],
        "decoder-from-prior": decoders["decoder-from-prior"],
        "upsampler": upsampler,
    }
    return {name: {**config, "run": run(name)} for name, config in made.items()}


def decoder_configs(cached: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return configurations of decoders: new, begun with another one, and of a prior's embeddings too."""
    decoder = {
        "part": "decoder",
        **cached,
        **TOWERS,
        "vae": "runs/vae/export",
        "length": 24,
        "diffusion": {"prediction": "v", "drop": 0.5},
    }
    model = {"unet": UNET, "condition": CONDITION}
    return {
        "decoder": {**decoder, "model": model},
        "decoder-begun": {
            **decoder,
            "text": "runs/clip-text/export",
            "net": "runs/decoder/export",
            "model": model,
        },
        "decoder-from-prior": {
            **decoder,
            "net": "runs/decoder-begun/export",
            "model": model,
            "from_prior": {"prior": "runs/prior/export", "steps": 1},
        },
    }


def write(config: dict[str, Any], path: Path) -> Path:
    """Write a configuration as YAML, and return its path."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config))), encoding="utf-8")  # without aliases
    return path


def latent_stages(data: Path) -> dict[str, dict[str, Any]]:
    """Return the stage files of a tiny recipe, without what they read from each other."""
    made = configs(data)
    stages = {"autoencoder": made["vae"], "clip": made["clip"], "draft": made["draft"], "unet": made["unet"]}
    for stage in stages.values():
        del stage["run"]["name"]
        for key in ("vae", "text"):
            stage.pop(key, None)
    stages["unet"]["text"] = {"tuned": True, "prior": 1.0}
    return stages


def unclip_stages(data: Path) -> dict[str, dict[str, Any]]:
    """Return the stage files of a tiny unCLIP recipe, which shares `latent_stages`."""
    made = unclip_configs(data)
    stages = {name: made[name] for name in ("clip-text", "prior", "upsampler")}
    stages["decoder"] = made["decoder-from-prior"]
    for stage in stages.values():
        del stage["run"]["name"]
        stage["run"]["steps"] = 2
        for key in ("vae", "text", "vision", "net"):
            stage.pop(key, None)
        stage.get("from_prior", {}).pop("prior", None)
    return stages


def latent_recipe() -> dict[str, Any]:
    """Return the recipe of `latent_stages`."""
    return {
        "name": "tiny-ldm",
        "machine": "any machine",
        "stages": [
            {"stage": "autoencoder", "hours": 0.1},
            {"stage": "clip", "hours": 0.1},
            {"stage": "draft", "reads": {"vae": "autoencoder", "text": "clip"}, "hours": 0.1},
            {"stage": "unet", "reads": {"vae": "autoencoder", "text.folder": "draft"}, "hours": 0.2},
        ],
        "bundle": {
            "card": "card.yaml",
            "parts": {"vae": "autoencoder", "text": "unet", "draft": "unet", "unet": "unet"},
        },
    }


def unclip_recipe() -> dict[str, Any]:
    """Return the recipe of `unclip_stages`."""
    towers = {"text": "clip-text", "vision": "clip"}
    reads = {
        "clip-text": {"text": "draft", "vision": "clip"},
        "prior": towers,
        "decoder": {
            "vae": "autoencoder",
            **towers,
            "from_prior.prior": "prior",
        },
        "upsampler": {},
    }
    own = [{"stage": name, "reads": sources, "hours": 0.1} for name, sources in reads.items()]
    shared = [{"stage": f"../tiny-ldm/{entry['stage']}"} for entry in latent_recipe()["stages"]]
    parts = {"prior": "prior", "decoder": "decoder", "vae": "autoencoder", "upsampler": "upsampler"}
    return {
        "name": "tiny-unclip",
        "machine": "any machine",
        "stages": shared + own,
        "bundle": {"card": "card.yaml", "parts": {**towers, **parts}},
    }


def write_recipe(
    folder: Path, recipe: dict[str, Any], stages: dict[str, dict[str, Any]], card: dict[str, Any]
) -> Path:
    """Write a recipe, its stage files and its card, and return the folder."""
    folder.mkdir(parents=True)
    write(recipe, folder / "recipe.yaml")
    write(card, folder / "card.yaml")
    for name, stage in stages.items():
        write(stage, folder / f"{name}.yaml")
    return folder


def interrupted(config: Callable[[str], dict[str, Any]], folder: Path) -> list[dict[str, Tensor]]:
    """Return the weights of a run as a whole, and of one that is interrupted twice.

    Args:
        config: Makes the configuration of a run by its name.
        folder: The working folder.
    """
    states = []
    for name, stops in (("whole", ()), ("parts", (1, 3))):
        made = config(name)
        made["run"]["checkpoint_every"] = 1
        path = write(made, folder / f"{name}.yaml")
        for stop in (*stops, None):
            open_run(path).train(until=stop, progress=False)
        states.append(torch.load(folder / f"runs/{name}/checkpoint.pt", weights_only=True)["model"])
    return states
