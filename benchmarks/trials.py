"""Short trainings that differ in one choice: ``python benchmarks/trials.py text size batch kl``.

They need the data set, and the finished stages autoencoder, clip, draft and draft-refinement of
``configs/emoji-unet`` in ``runs/``.

All trials of a question see the same draws for the same number of images. Figures: ``loss`` on fixed images,
noise and timesteps (comparable within one latent space), and the mean squared error between samples and the
images of their captions (comparable across latent spaces). A trial that has been run before is read.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from ldm.support.config import to_dict
from ldm.support.files import write_atomically
from ldm.training.recipe import find_stage
from ldm.training.run import open_run
from ldm.training.stages import set_dotted

CONFIGS = Path(__file__).parents[1] / "configs" / "emoji-unet"
FOLDER = Path("runs") / "trials"
# one style on white: the latents of these images are computed in seconds
PLAIN = {
    "styles": {"noto": 1.0},
    **dict.fromkeys(("style", "two", "count", "small", "placed", "colour", "background"), 0.0),
}

Changes = dict[str, Any]  # dotted key -> value, such as "run.batch": 8
Trial = list[tuple[str, Changes]]  # the stages of a trial in order, with the changes of each


def unet_trial(changes: Changes, seed: Changes) -> Trial:
    """Return a trial that trains the UNet alone, on the recipe's draft and autoencoder."""
    return [("unet", {**changes, **seed})]


def kl_trial(kl: float, samples: int, seed: Changes) -> Trial:
    """Return a trial of the KL weight: autoencoder, draft and UNet on one style on white."""
    autoencoder = ("autoencoder", {"data.mix": PLAIN, "loss.kl": kl, "run.steps": samples // 8, **seed})
    on_latents = {
        "data.mix": PLAIN,
        "data.drawn": None,
        "variants": 0,
        **seed,
        "vae": f"{FOLDER}/{run_name(*autoencoder, samples)}/export",
    }
    draft = ("draft", {**on_latents, "run.steps": 4 * samples // 64})
    unet = ("unet", {**on_latents, "text.folder": f"{FOLDER}/{run_name(*draft, samples)}/export"})
    return [autoencoder, draft, unet]


def run_name(stage: str, changes: Changes, samples: int) -> str:
    """Return the name of a run, which depends on nothing but the arguments: questions share equal runs."""
    digest = hashlib.sha256(json.dumps([changes, samples], sort_keys=True).encode()).hexdigest()
    return f"{stage}-{digest[:8]}"


def trials(samples: int, seed: int | None = None) -> dict[str, dict[str, Trial]]:
    """Return the trials by question and answer; a seed of None is the configurations' own."""
    seeded: Changes = {} if seed is None else {"run.seed": seed}
    return {
        "text": {
            "frozen": unet_trial({}, seeded),
            "tuned": unet_trial({"text.tuned": True, "text.prior": 1.0}, seeded),
        },
        "size": {
            "64-128-224": unet_trial({}, seeded),
            # takes about as long as the larger networks
            "64-128-224, twice the images": unet_trial({"run.steps": 2 * samples // 16}, seeded),
            "96-160-192": unet_trial({"model.channels": [96, 160, 192]}, seeded),
            "64-128-192, 2 blocks": unet_trial({"model.channels": [64, 128, 192], "model.blocks": 2}, seeded),
        },
        "batch": {
            "16": unet_trial({}, seeded),
            "32": unet_trial({"run.batch": 32}, seeded),
            "32, lr halved": unet_trial({"run.batch": 32, "run.optimizer.lr": 6e-4}, seeded),
            "8": unet_trial({"run.batch": 8}, seeded),
        },
        "shift": {"1": unet_trial({}, seeded), "2": unet_trial({"diffusion.shift": 2.0}, seeded)},
        "kl": {f"{kl:g}": kl_trial(kl, samples, seeded) for kl in (2e-4, 2e-3, 2e-2)},
    }


def trial_config(name: str, changes: Changes, samples: int) -> dict[str, Any]:
    """Return the configuration of one stage of a trial.

    Args:
        name: Name of the stage in ``configs/emoji-unet``.
        changes: Changes by dotted key.
        samples: Number of images to train on; the learning rate falls over the last third.
    """
    stage = find_stage(CONFIGS / f"{name}.yaml")
    config = {"part": stage.part, **copy.deepcopy(to_dict(stage.config))}
    for key, value in changes.items():
        set_dotted(config, key, value)
    run = config["run"]
    steps = changes.get("run.steps", samples // run["batch"])
    intervals = {
        "validate_every": steps,
        "sample_every": steps,
        "checkpoint_every": steps,
        "log_every": max(1, steps // 20),
    }
    run.update(name=run_name(name, changes, samples), steps=steps, ema=0.99, **intervals)
    run["optimizer"].update(warmup=min(run["optimizer"]["warmup"], steps // 10), decay=steps // 3)
    return config


def run_stage(name: str, changes: Changes, samples: int) -> dict[str, float]:
    """Train and export one stage of a trial; return the last figures of its metrics."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    config = trial_config(name, changes, samples)
    path = FOLDER / f"{config['run']['name']}.yaml"
    write_atomically(path, yaml.safe_dump(config).encode())
    run = open_run(path, runs=FOLDER)
    run.train()
    if not (run.folder / "export").is_dir():
        run.export(run.folder / "export")
    figures: dict[str, float] = {}
    for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        figures.update(json.loads(line))
    return figures


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Short trainings that differ in one choice.")
    parser.add_argument("questions", nargs="+", choices=list(trials(0)), help="the choices to try")
    parser.add_argument(
        "--samples",
        type=int,
        default=12800,
        help="images that each UNet is trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, help="seed of weights and draws (default: that of each configuration)"
    )
    parser.add_argument("--json", type=Path, default=None, help="file to write the figures to")
    options = parser.parse_args(arguments)
    if options.samples < 640:
        parser.error("--samples: expected at least 640")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the trials of the questions asked for, and print a table."""
    options = parse_arguments(arguments)
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(
        "| question | answer | loss | sample error | images per second | seconds |\n|---|---|---|---|---|---|"
    )
    for question in options.questions:
        for answer, trial in trials(options.samples, options.seed)[question].items():
            for stage, changes in trial:
                figures = run_stage(stage, changes, options.samples)
                results.setdefault(question, {})[f"{answer} ({stage})"] = figures
            loss, error = figures["validation/loss"], figures["validation/sample_mse"]
            pace, seconds = figures["samples_per_second"], figures["seconds"]
            print(
                f"| {question} | {answer} | {loss:.4f} | {error:.4f} | {pace:.0f} | {seconds:.0f} |",
                flush=True,
            )
    if options.json is not None:
        content = {"samples": options.samples, "seed": options.seed, "figures": results}
        write_atomically(options.json, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
