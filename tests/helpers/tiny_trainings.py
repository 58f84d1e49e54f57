"""Training configurations that are small enough for a test, as mappings in the form of the YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


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


def write(config: dict[str, Any], path: Path) -> Path:
    """Write a configuration as YAML, and return its path."""
    path.write_text(yaml.safe_dump(config))
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
