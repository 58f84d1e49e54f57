"""What was decided by measurement: short trainings that differ in one thing, ``python benchmarks/trials.py
text size batch kl``.

This needs the data set, and the exports of emoji-vae, emoji-clip and emoji-draft in ``runs/``.

Every trial sees the same draws for the same number of pictures. Figures: ``loss`` on fixed pictures, noise
and timesteps (comparable within one latent space), and the mean squared error of samples against what was
asked (comparable across them). A trial that has run before is read, not run again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from ldm.support.files import write_atomically
from ldm.training.run import open_run

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDER = Path("runs") / "trials"
# one style on white: a latent cache of seconds
PLAIN = {"noto": 1, "fluent": 0, "twemoji": 0, "background": 0.0, "small": 0.0, "two": 0.0}

Changes = dict[str, Any]  # "run.batch": 8
Stage = tuple[str, Changes]  # a configuration's name, and what is changed in it


def alone(changes: Changes, again: Changes) -> list[Stage]:
    """A trial of the UNet's training alone, on the draft and the autoencoder that stand."""
    return [("emoji-ldm", {**changes, **again})]


def chain(kl: float, samples: int, again: Changes) -> list[Stage]:
    """A trial of the autoencoder's KL weight: autoencoder, draft and UNet one after the other, on one style
    on white."""
    vae = ("emoji-vae", {"data.mix": PLAIN, "loss.kl": kl, "run.steps": samples // 8, **again})
    encoded = {
        "data.mix": PLAIN,
        "variants": 0,
        **again,
        "vae": f"{FOLDER}/{stage_name(*vae, samples)}/export",
    }
    draft = ("emoji-draft", {**encoded, "run.steps": 4 * samples // 64})
    return [
        vae,
        draft,
        ("emoji-ldm", {**encoded, "text.folder": f"{FOLDER}/{stage_name(*draft, samples)}/export"}),
    ]


def stage_name(base: str, changes: Changes, samples: int) -> str:
    """The name of a stage's run, which two questions share where they ask for the same."""
    return f"{base}-{hashlib.sha256(json.dumps([changes, samples], sort_keys=True).encode()).hexdigest()[:8]}"


def trials(samples: int, seed: int = 0) -> dict[str, dict[str, list[Stage]]]:
    """Question → answers → stages; seed 0 is the configurations' own."""
    again: Changes = {"run.seed": seed} if seed else {}
    return {
        "text": {"frozen": alone({}, again), "tuned": alone({"text.tuned": True, "text.prior": 1.0}, again)},
        "size": {
            "64-128-224": alone({}, again),
            "64-128-224, twice the pictures": alone(
                {"run.steps": 2 * samples // 16}, again
            ),  # in about the time that the larger ones take
            "96-160-192": alone({"model.channels": [96, 160, 192]}, again),
            "64-128-192, 2 blocks": alone({"model.channels": [64, 128, 192], "model.blocks": 2}, again),
        },
        "batch": {
            "16": alone({}, again),
            "32": alone({"run.batch": 32}, again),
            "32, lr halved": alone({"run.batch": 32, "run.optimizer.lr": 6e-4}, again),
            "8": alone({"run.batch": 8}, again),
        },
        "shift": {"1": alone({}, again), "2": alone({"diffusion.shift": 2.0}, again)},
        "kl": {f"{kl:g}": chain(kl, samples, again) for kl in (2e-4, 2e-3, 2e-2)},
    }


def change(config: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """The configuration with dotted keys set."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *path, last = key.split(".")
        target = config
        for part in path:
            target = target[part]
        target[last] = value
    return config


def stage_config(base: str, changes: Changes, samples: int) -> dict[str, Any]:
    """The configuration of one stage: the base's, changed, for ``samples`` pictures, its learning rate
    falling over the last third."""
    config = change(yaml.safe_load((CONFIGS / f"{base}.yaml").read_text()), changes)
    run = config["run"]
    steps = changes.get("run.steps", samples // run["batch"])
    often = {
        "validate_every": steps,
        "sample_every": steps,
        "checkpoint_every": steps,
        "log_every": max(1, steps // 20),
    }
    run.update(name=stage_name(base, changes, samples), steps=steps, ema=0.99, **often)
    run["optimizer"].update(warmup=min(run["optimizer"]["warmup"], steps // 10), decay=steps // 3)
    return config


def run_stage(base: str, changes: Changes, samples: int) -> dict[str, float]:
    """Train one stage and export it; the last figures of its metrics, and the seconds it took."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    config = stage_config(base, changes, samples)
    path = FOLDER / f"{config['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    run = open_run(path, runs=FOLDER)
    run.train()
    if not (run.folder / "export").is_dir():
        run.export(run.folder / "export")
    figures: dict[str, float] = {}
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        figures.update(json.loads(line))
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Short trainings that differ in one thing.")
    parser.add_argument("questions", nargs="+", choices=list(trials(0)), help="what to decide")
    parser.add_argument(
        "--samples",
        type=int,
        default=12800,
        help="pictures that each UNet is trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, draws and noise (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    options = parser.parse_args(arguments)
    if options.samples < 640:
        parser.error("--samples: expected at least 640")
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(
        "| question | answer | loss | samples' error | pictures a second | seconds"
        " |\n|---|---|---|---|---|---|"
    )
    for question in options.questions:
        for answer, stages in trials(options.samples, options.seed)[question].items():
            for base, changes in stages:
                figures = run_stage(base, changes, options.samples)
                results.setdefault(question, {})[f"{answer} ({base})"] = figures
            loss, error = figures["validation/loss"], figures["validation/sample_mse"]
            pace, seconds = figures["samples_per_second"], figures["seconds"]
            print(
                f"| {question} | {answer} | {loss:.4f} | {error:.4f} | {pace:.0f} | {seconds:.0f} |",
                flush=True,
            )
    if options.json is not None:
        write_atomically(
            options.json,
            (
                json.dumps({"samples": options.samples, "seed": options.seed, "figures": results}, indent=1)
                + "\n"
            ).encode(),
        )


if __name__ == "__main__":
    main()
