"""Measure whether a model composes what a prompt asks for, on held-out combinations.

    python benchmarks/composition.py --model emoji-ldm
    python benchmarks/composition.py --real --shuffled
    python benchmarks/composition.py --variety
    python benchmarks/composition.py --added

The six tasks are those of GenEval (Ghosh et al. 2023), with the things of the emoji data set: a single thing,
two things, a count, a colour, a position, and a colour for each of two things. An image counts only if
everything that its prompt states is right; see `scene_judge`. With `--real`, scenes drawn from the data set
are judged instead of a model's images; with `--shuffled`, every image is judged by another prompt as well.
With `--added`, the held-out images of the data set are added to the model's exemplars, and prompts ask for
them alone and in compositions.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import add_quick, where
from scene_judge import SceneJudge, SceneVerdict
from scene_prompts import ADDED, TASKS, added_prompts, task_prompts, variety_prompts

import ldm
from ldm.data import EmojiData, Facts, caption, draw_layout, render_batch
from ldm.data.nouns import plural
from ldm.support.files import write_atomically

BARS = {"single": 95, "two": 70, "count": 70, "colour": 80, "position": 65, "attribution": 45, "mean": 70}
BARS |= {"added": 80, "added, composed": 60}
DEGRADED = ("as drawn", "blurred", "noisy", "jpeg")
Draw = Callable[[Sequence[Facts], Sequence[int]], np.ndarray]  # facts, seeds -> (B, S, S, 3) uint8


def model_images(options: argparse.Namespace, data: EmojiData) -> Draw:
    """Return a model as a function of facts and seeds; it reads their canonical captions."""
    folder = Path(options.model).is_dir()
    pipe = ldm.load(weights=options.model) if folder else ldm.load(options.model)
    if options.added:
        for row in map(int, data.held_out):
            image = torch.from_numpy(data.images[row].copy()).permute(2, 0, 1).float() / 255
            name = data.index[row].name
            many = plural(name.replace("-", " "))
            pipe.exemplars.add(name, image, style=data.index[row].style, nouns=[many] if many else [])
    settings = {
        key: getattr(options, key) for key in ("steps", "guidance") if getattr(options, key) is not None
    }
    if isinstance(pipe, ldm.UnCLIP):
        settings |= {"n": 1, "upsample": False}
    elif isinstance(pipe, ldm.DalleMini):
        settings |= {"n": 1}

    def draw(facts: Sequence[Facts], seeds: Sequence[int]) -> np.ndarray:
        prompts = [caption(one, data.index) for one in facts]
        parts = []
        for start in range(0, len(prompts), options.batch):
            chosen = slice(start, start + options.batch)
            made = pipe.text_to_image(prompts[chosen], seed=list(seeds[chosen]), progress=False, **settings)
            parts.append((made.tensor.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(parts).permute(0, 2, 3, 1).numpy()

    return draw


def real_images(data: EmojiData, degraded: str) -> Draw:
    """Return scenes of the data set as a function of facts and seeds, each with a layout of its own."""

    def draw(facts: Sequence[Facts], seeds: Sequence[int]) -> np.ndarray:
        keys = [[seed, *caption(one, data.index).encode()] for one, seed in zip(facts, seeds, strict=True)]
        scenes = [
            draw_layout(one, data.index, np.random.default_rng(key))
            for one, key in zip(facts, keys, strict=True)
        ]
        images = render_batch(scenes, data.images)
        return np.stack(
            [
                degrade(image, degraded, np.random.default_rng(key))
                for image, key in zip(images, keys, strict=True)
            ]
        )

    return draw


def degrade(image: np.ndarray, how: str, rng: np.random.Generator) -> np.ndarray:
    """Return an image (S, S, 3) uint8 as drawn, or degraded.

    "blurred" has a standard deviation of 1 pixel, "noisy" an RMS of 6 levels, and "jpeg" a quality of 60.
    """
    from PIL import Image, ImageFilter

    if how == "blurred":
        return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))
    if how == "noisy":
        return (image + rng.normal(0, 6, image.shape)).round().clip(0, 255).astype(np.uint8)
    if how == "jpeg":
        with io.BytesIO() as file:
            Image.fromarray(image).save(file, format="JPEG", quality=60)
            return np.array(Image.open(file, formats=("JPEG",)))
    return image


def measure_task(
    draw: Draw, judge: SceneJudge, task: str, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the figures of a task, and a record of each image."""
    draw_prompts = added_prompts if task in ADDED else task_prompts
    prompts = draw_prompts(judge.index, task, options.prompts)
    asked = [facts for facts in prompts for _ in range(options.seeds)]
    seeds = [seed for _ in prompts for seed in range(options.seeds)]
    start = time.perf_counter()
    images = draw(asked, seeds)
    drawn = time.perf_counter()
    verdicts = [judge(image, facts) for image, facts in zip(images, asked, strict=True)]
    judged = time.perf_counter()
    figures: dict[str, Any] = {
        "n": len(asked),
        "right": share(verdicts),
        "faults": Counter(fault.partition(":")[0] for verdict in verdicts for fault in verdict.faults),
        "seconds_to_draw": (drawn - start) / len(asked),
        "seconds_to_judge": (judged - drawn) / len(asked),
    }
    if options.shuffled:
        n = len(prompts)
        others = [prompts[(i // options.seeds + 1 + i % (n - 1)) % n] for i in range(len(asked))]
        figures["shuffled"] = share([judge(*pair) for pair in zip(images, others, strict=True)])
    records = [
        {"task": task, "prompt": caption(facts, judge.index), "seed": seed, "faults": verdict.faults}
        for facts, seed, verdict in zip(asked, seeds, verdicts, strict=True)
    ]
    if options.images is not None:
        save_images(options.images, images, records)
    return figures, records


def measure_variety(
    draw: Draw, judge: SceneJudge, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the figures of variety over the seeds of prompts that state a name alone, and records."""
    styles, differences, rights, records = [], [], [], []
    for facts in variety_prompts(judge.index, options.prompts):
        images = draw([facts] * options.seeds, range(options.seeds))
        verdicts = [judge(image, facts) for image in images]
        right = [verdict for verdict in verdicts if verdict.is_right]
        rows = [part.placement.row for verdict in right for part in verdict.parts]
        styles.append(len({judge.index[row].style for row in rows}))
        differences.append(mean_pairwise_rms(images))
        rights += verdicts
        made = [
            {"task": "variety", "prompt": caption(facts, judge.index), "seed": seed, "faults": verdict.faults}
            for seed, verdict in enumerate(verdicts)
        ]
        if options.images is not None:
            save_images(options.images, images, made)
        records += made
    return {
        "n": len(rights),
        "styles": float(np.mean(styles)),
        "rms": float(np.mean(differences)),
        "right": share(rights),
    }, records


def mean_pairwise_rms(images: np.ndarray) -> float:
    """Return the mean over pairs of images (B, S, S, 3) uint8 of their RMS difference, in levels of 255."""
    values = images.reshape(len(images), -1).astype(np.float64)
    pairs = [(i, j) for i in range(len(values)) for j in range(i)]
    return float(np.mean([np.sqrt(np.square(values[i] - values[j]).mean()) for i, j in pairs]))


def share(verdicts: Sequence[SceneVerdict]) -> float:
    """Return the share of verdicts without a fault, in per cent."""
    return 100 * float(np.mean([verdict.is_right for verdict in verdicts]))


def save_images(folder: Path, images: np.ndarray, records: Sequence[dict[str, Any]]) -> None:
    """Write images as PNG files whose names say the task, the prompt, the seed and whether all is right."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for image, record in zip(images, records, strict=True):
        words = "-".join(record["prompt"].split())
        name = f"{record['task']}-{words}-{record['seed']}-{'wrong' if record['faults'] else 'right'}.png"
        Image.fromarray(image).save(folder / name.replace("/", "-"))


HEADER = "| task | images | right | bar | by another prompt | faults |\n|---|---|---|---|---|---|"


def task_row(task: str, figures: dict[str, Any]) -> str:
    """Return a task as a row of a Markdown table, with its bar and its most frequent faults."""
    other = f"{figures['shuffled']:.1f} %" if "shuffled" in figures else ""
    faults = ", ".join(f"{kind} {count}" for kind, count in figures["faults"].most_common(4))
    return f"| {task} | {figures['n']} | {figures['right']:.1f} % | {BARS[task]} % | {other} | {faults} |"


def mean_row(figures: dict[str, dict[str, Any]]) -> str:
    """Return the mean over tasks as a row of the table."""
    mean = float(np.mean([one["right"] for one in figures.values()]))
    return f"| mean | | {mean:.1f} % | {BARS['mean']} % | | |"


def variety_table(figures: dict[str, Any]) -> str:
    """Return the figures of variety as a Markdown table with their bars."""
    return "\n".join(
        [
            "| variety | figure | bar |\n|---|---|---|",
            f"| styles among the images of a prompt that are right | {figures['styles']:.2f} | 3 |",
            f"| mean pairwise RMS | {figures['rms']:.1f} levels | 40 |",
            f"| right | {figures['right']:.1f} % | 90 % |",
        ]
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; exit with a message for impossible ones."""
    parser = argparse.ArgumentParser(description="Measure whether a model composes what a prompt asks for.")
    parser.add_argument("--model", default="emoji-ldm", help="name or folder (default: %(default)s)")
    parser.add_argument("--data", default="data/emoji", help="folder of the data set (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="tasks (default: all)")
    parser.add_argument("--prompts", type=int, default=50, help="prompts of each task (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help="images of each prompt (default: 4; 8 for --variety)")
    parser.add_argument("--variety", action="store_true", help="measure variety instead of the tasks")
    parser.add_argument(
        "--real", choices=DEGRADED, nargs="?", const=DEGRADED[0], help="judge scenes of the data"
    )
    parser.add_argument("--shuffled", action="store_true", help="judge every image by another prompt as well")
    parser.add_argument("--added", action="store_true", help="measure held-out images that are added")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model card's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model card's)")
    parser.add_argument("--batch", type=int, default=20, help="images per batch (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads (default: one per core)")
    parser.add_argument("--json", type=Path, help="write the figures and every verdict to this file")
    parser.add_argument("--images", type=Path, help="write every image to this folder")
    add_quick(parser, prompts=5, seeds=2)
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (8 if options.variety else 4)
    if options.prompts < 2 or options.seeds < 1 or options.batch < 1:
        parser.error("--prompts must be at least 2, --seeds and --batch at least 1")
    if options.variety and (options.shuffled or options.seeds < 2):
        parser.error("--variety: expected at least 2 --seeds, and no --shuffled")
    if options.added and (options.variety or options.real):
        parser.error("--added: expected neither --variety nor --real")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"no such folder: {str(options.json.parent)!r}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure the tasks or the variety, print a table and write the figures."""
    options = parse(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    data = EmojiData.open(options.data)
    judge = SceneJudge(data)
    draw = model_images(options, data) if options.real is None else real_images(data, options.real)
    figures: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    if options.variety:
        figures, records = measure_variety(draw, judge, options)
        print(variety_table(figures))
    else:
        print(HEADER, flush=True)
        for task in ADDED if options.added else options.tasks:
            figures[task], made = measure_task(draw, judge, task, options)
            records += made
            print(task_row(task, figures[task]), flush=True)
        if not options.added:
            print(mean_row(figures))
    if options.json is not None:
        report = {
            "settings": {
                key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
            },
            "where": where(torch.get_num_threads()),
            "figures": figures,
            "images": records,
        }
        write_atomically(options.json, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
