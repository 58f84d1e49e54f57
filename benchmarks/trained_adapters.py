"""Train adapters of the embedded model in about a minute each, and judge by rule what they draw.

    python benchmarks/trained_adapters.py                    # a style, a thing, edges
    python benchmarks/trained_adapters.py --tasks edges --images edges

Each row trains on a few images of the emoji data set, with the commands that train a user's own, and draws 20
prompts that are not among their captions, with the adapter and without it, from the same seeds.

`style`: a LoRA of images in two inks, dark blue on cream. An image has the style if the RMS distance of its
pixels from the straight line between the inks is at most `INK` levels, and shows what the plain model draws
if the brightnesses of both correlate by at least `ALIKE`. Both are required.
`thing`: an image of a thing of its own, learned from images that show it on different backgrounds
(`part: exemplar-image`). The judge is `emoji_judge`: of all images of the data set, one of the thing's name
has to be the nearest. The thing is one whose name the model does not have.
`edges`: a ControlNet. The figure is the intersection over union of Canny's edges of the hint and of the image
drawn, each widened by a pixel. Hints are those of images that the model does not have, in styles that it
does not have of these names. The figure of a control that is not trained is that of the layout alone, which
is fitted to the hint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from common import add_quick, where
from emoji_judge import EmojiJudge
from emoji_scenes import real
from PIL import Image
from torch import Tensor

import ldm
from ldm.data import PALETTE, EmojiData, Facts, Scene, Thing, caption, draw_layout
from ldm.images.hints import LUMA, canny
from ldm.support.files import write_atomically
from ldm.training.run import open_run

TASKS = ("style", "thing", "edges")
BASE = "emoji-ldm"
SIZE = 128
DARK, LIGHT = (40, 30, 110), (255, 240, 200)  # the inks of the style
INK = 12.0  # levels of 255
ALIKE = 0.9  # correlation
NOTHING = 1e-9  # strength of a control that settles the layout and adds nothing
BARS = {"with": 80.0, "without": 20.0, "ratio": 2.0}
TRAINED = {"style": 12, "thing": 8, "edges": 12}  # images
QUIET = dict.fromkeys(("validate_every", "sample_every", "checkpoint_every"), 10**6)
RUNS: Mapping[str, Mapping[str, Any]] = {
    "style": {
        "part": "lora",
        "adapter": {"rank": 64},
        "diffusion": {"drop": 0.0},
        "run": {"steps": 80, "batch": 12, "optimizer": {"lr": 1.5e-3, "warmup": 5, "decay": 40}, "ema": 0.9},
    },
    "thing": {
        "part": "exemplar-image",
        "diffusion": {"drop": 0.0},
        "run": {"steps": 150, "batch": 8, "optimizer": {"lr": 5e-2, "warmup": 5, "decay": 75}, "ema": 0.9},
    },
    "edges": {
        "part": "control-net",
        "hints": {"kind": "canny"},
        "diffusion": {"drop": 0.0},
        "run": {"steps": 20, "batch": 12, "optimizer": {"lr": 1e-4, "warmup": 4, "decay": 10}, "ema": 0.9},
    },
}


# Training


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, where trainings keep their runs and caches."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_images(folder: Path, images: Tensor, captions: Sequence[str]) -> None:
    """Write images (B, 3, H, W) in [0, 1] with their captions, as trainings read them."""
    folder.mkdir()
    for i, (image, text) in enumerate(zip(to_bytes(images), captions, strict=True)):
        Image.fromarray(image).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")


def to_bytes(images: Tensor) -> np.ndarray:
    """Return images (B, 3, H, W) in [0, 1] as (B, H, W, 3) uint8."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def train(
    task: str, folder: Path, images: Tensor, captions: Sequence[str], **more: Any
) -> tuple[Path, dict[str, Any]]:
    """Train an adapter in a folder; return the folder that it is exported to, and the time of all."""
    start, begun = time.perf_counter(), time.process_time()
    with inside(folder):
        write_images(Path(task), images, captions)
        given = RUNS[task]
        data = {"kind": "folder", "path": task, "size": SIZE, "held_out": 0}
        config = {"base": BASE, **given, "data": data, "run": {"name": task, **given["run"], **QUIET}, **more}
        Path(f"{task}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        run = open_run(f"{task}.yaml")
        run.train(progress=False)
        export = Path("runs") / task / "export"
        run.export(export)
        seconds = {
            "seconds": time.perf_counter() - start,
            "processor seconds": time.process_time() - begun,
        }
        return export.absolute(), seconds


# Prompts


def drawn_scenes(data: EmojiData, rows: Sequence[int], rng: np.random.Generator) -> list[Scene]:
    """Return a scene of each row's image, in a place, size and tilt of its own, on white."""
    things = [Thing(name=data.index[row].name, style=data.index[row].style) for row in rows]
    return [draw_layout(Facts(things=(thing,)), data.index, rng) for thing in things]


def name_prompts(data: EmojiData, rows: Sequence[int]) -> list[str]:
    """Return prompts that name the things of rows and nothing else."""
    return [caption(Facts(things=(Thing(name=data.index[row].name),)), data.index) for row in rows]


def distinct_rows(data: EmojiData, rows: np.ndarray, rng: np.random.Generator, least: int = 2) -> list[int]:
    """Return rows in random order, one of each name of which the model has images in `least` other styles."""
    found: dict[str, int] = {}
    for row in map(int, rng.permutation(rows)):
        name = data.index[row].name
        others = [each for each in data.index.rows_of[name] if each != row and not data.index[each].held_out]
        if len(others) >= least:
            found.setdefault(name, row)
    return list(found.values())


# Style


def in_two_inks(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] in two inks, mixed by brightness."""
    dark, light = (torch.tensor(ink).view(3, 1, 1) / 255 for ink in (DARK, LIGHT))
    return dark + (light - dark) * brightness(images)


def brightness(images: Tensor) -> Tensor:
    """Return the brightness of images (B, 3, H, W), (B, 1, H, W)."""
    return (images * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def ink_distance(images: Tensor) -> Tensor:
    """Return the RMS distance of pixels from the line between the inks, in levels of 255, (B,)."""
    dark, light = (torch.tensor(ink, dtype=torch.float32) for ink in (DARK, LIGHT))
    along = (light - dark) / (light - dark).norm()
    off = 255 * images.permute(0, 2, 3, 1) - dark  # (B, H, W, 3)
    off = off - (off @ along)[..., None] * along
    return off.square().sum(-1).mean((1, 2)).sqrt()


def has_style(images: Tensor, plain: Tensor) -> Tensor:
    """Return whether images have the style and show what the plain model draws, bool (B,)."""
    a, b = (
        each - each.mean(1, keepdim=True)
        for each in (brightness(images).flatten(1), brightness(plain).flatten(1))
    )
    return (ink_distance(images) <= INK) & (F.cosine_similarity(a, b) >= ALIKE)


def measure_style(data: EmojiData, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a LoRA of a style."""
    rng = np.random.default_rng(options.seed)
    rows = distinct_rows(data, data.train, rng)
    n = TRAINED["style"]
    scenes = drawn_scenes(data, rows[:n], rng)
    images = in_two_inks(real(scenes, data, SIZE))
    export, figures = train("style", folder, images, [caption(scene.facts, data.index) for scene in scenes])
    prompts, seeds = name_prompts(data, rows[n : n + options.prompts]), list(range(options.prompts))
    pipe = ldm.load(BASE)
    plain = drawn(pipe, prompts, seeds)
    pipe.adapters.load(export / "style.safetensors")
    made = drawn(pipe, prompts, seeds)
    held = real(drawn_scenes(data, rows[-100:], rng), data, SIZE)
    rendered = in_two_inks(held)
    save(options.images, "style", prompts, plain, made)
    return figures | {
        "with": percent(has_style(made, plain)),
        "without": percent(has_style(plain, plain)),
        "distance with": float(ink_distance(made).mean()),
        "distance without": float(ink_distance(plain).mean()),
        "rule on rendered images": percent(has_style(rendered, held)),
        "rule on plain images": percent(has_style(held, held)),
    }


# Edges


def edge_overlap(images: Tensor, hints: Tensor) -> Tensor:
    """Return the intersection over union of the edges of images and of hints, widened by a pixel, (B,)."""
    a, b = (F.max_pool2d(each[:, :1], 3, stride=1, padding=1) > 0 for each in (canny(images), hints))
    return (a & b).flatten(1).sum(1) / (a | b).flatten(1).sum(1).clamp_min(1)


def measure_edges(data: EmojiData, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of a ControlNet of edges."""
    rng = np.random.default_rng(options.seed)
    rows = distinct_rows(data, data.train, rng)[: TRAINED["edges"]]
    images = real(drawn_scenes(data, rows, rng), data, SIZE)
    export, figures = train("edges", folder, images, name_prompts(data, rows))
    pipe = ldm.load(BASE)
    pipe.controls.load(export / "edges.safetensors")
    for which, among in (("", data.held_out), (" (images of the library)", data.train)):
        asked = [row for row in distinct_rows(data, among, rng) if row not in rows][: options.prompts]
        hints = canny(real(drawn_scenes(data, asked, rng), data, SIZE))
        prompts, seeds = name_prompts(data, asked), list(range(options.prompts))
        plain = drawn(pipe, prompts, seeds)
        layout = drawn(pipe, prompts, seeds, controls=[ldm.Control("edges", hints, strength=NOTHING)])
        made = drawn(pipe, prompts, seeds, controls=[ldm.Control("edges", hints)])
        found = {"plain": plain, "layout alone": layout, "control": made}
        overlaps = {name: float(edge_overlap(each, hints).mean()) for name, each in found.items()}
        figures |= {f"{name}{which}": value for name, value in overlaps.items()}
        figures[f"ratio{which}"] = overlaps["control"] / overlaps["plain"]
        save(options.images, f"edges{which}", prompts, hints, plain, layout, made)
    return figures


# Thing


def thing_prompts(name: str) -> tuple[list[str], list[str | None]]:
    """Return prompts of a thing on each background, whole and small, and their backgrounds."""
    backgrounds = [None if colour == "white" else colour for colour in PALETTE]
    wholes = [f"a {name}" if each is None else f"a {name} on a {each} background" for each in backgrounds]
    smalls = [prompt.replace(f"a {name}", f"a small {name} on the left", 1) for prompt in wholes]
    return [*wholes, *smalls], [*backgrounds, *backgrounds]


def measure_thing(data: EmojiData, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of an exemplar that is learned of a held-out image, shown on some backgrounds."""
    rng = np.random.default_rng(options.seed)
    row = distinct_rows(data, data.held_out, rng)[0]
    name, style = data.index[row].name, data.index[row].style
    colours = ["white", "red", "green", "blue", "yellow", "black", "purple", "gray"][: TRAINED["thing"]]
    facts = [
        Facts(things=(Thing(name=name, style=style),), background=None if each == "white" else each)
        for each in colours
    ]
    images = real([draw_layout(each, data.index, rng) for each in facts], data, SIZE)
    captions = [
        "a zorb" if each.background is None else f"a zorb on a {each.background} background" for each in facts
    ]
    export, figures = train("thing", folder, images, captions, thing="zorb")
    pipe, judge = ldm.load(BASE), EmojiJudge(data)
    pipe.exemplars.add("zorb", export / "thing.png")
    figures["thing"] = f"{name} ({style})"
    for side, word in (("with", "zorb"), ("without", data.index[row].phrase)):
        prompts, backgrounds = (each[: options.prompts] for each in thing_prompts(word))
        made = drawn(pipe, prompts, list(range(len(prompts))))
        verdicts = judge(made, [name] * len(made), backgrounds)
        right = [
            each.rank == 0 and each.nearest_style == style and each.background_right for each in verdicts
        ]
        figures[side] = 100 * float(np.mean(right))
        save(options.images, f"thing {side}", prompts, made)
    return figures


# The rest


def drawn(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Tensor:
    """Return the images of prompts, (B, 3, H, W) in [0, 1]."""
    made: Tensor = pipe.text_to_image(list(prompts), seed=list(seeds), progress=False, **options).tensor
    return made


def percent(right: Tensor) -> float:
    """Return the share of what is true, in per cent."""
    return 100 * float(right.float().mean())


def save(folder: Path | None, name: str, prompts: Sequence[str], *rows: Tensor) -> None:
    """Write images as one PNG, a row for each tensor (B, 3, H, W), and the prompts beside it."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = [np.concatenate(list(to_bytes(row)), axis=1) for row in rows]
    Image.fromarray(np.concatenate(lines)).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text("\n".join(prompts), encoding="utf-8")


def is_met(task: str, figures: Mapping[str, Any]) -> bool:
    """Return whether the figures of a task meet its bar."""
    if task == "edges":
        return bool(figures["ratio"] >= BARS["ratio"])
    return bool(figures["with"] >= BARS["with"] and figures["without"] <= BARS["without"])


def table(task: str, figures: Mapping[str, Any]) -> str:
    """Return the figures of a task as a Markdown table with its bar."""
    bar = "twice the plain model's" if task == "edges" else "80 % with, at most 20 % without"
    shown = {
        key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in figures.items()
    }
    rows = [f"| {key} | {value} |" for key, value in shown.items()]
    return "\n".join(
        [f"| {task} | bar: {bar}, {'met' if is_met(task, figures) else 'NOT MET'} |", "|---|---|", *rows]
    )


MEASURES = {"style": measure_style, "thing": measure_thing, "edges": measure_edges}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; exit with a message for impossible ones."""
    parser = argparse.ArgumentParser(
        description="Train adapters of the embedded model, and judge by rule what they draw.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what is trained")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="folder of the data set")
    parser.add_argument("--prompts", type=int, default=20, help="prompts of each task, at most 20")
    parser.add_argument("--seed", type=int, default=0, help="chooses things and prompts")
    parser.add_argument("--threads", type=int, help="threads; all cores if left out")
    parser.add_argument("--work", type=Path, help="keep the trainings in this folder, which must be absent")
    parser.add_argument("--images", type=Path, help="write the images to this folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    add_quick(parser, prompts=5)
    options = parser.parse_args(arguments)
    if not 1 <= options.prompts <= 20:
        parser.error("--prompts: expected a number from 1 to 20")
    if options.work is not None and options.work.exists():
        parser.error(f"--work: {str(options.work)!r} exists")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure the tasks, print a table of each and write the figures."""
    options = parse(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    data = EmojiData.open(options.data)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) / "work" if options.work is None else options.work.absolute()
        work.mkdir(parents=True)
        for task in options.tasks:
            found[task] = MEASURES[task](data, work, options)
            print(f"{table(task, found[task])}\n", flush=True)
    if options.json is not None:
        settings = {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
        }
        report = {"settings": settings, "where": where(torch.get_num_threads()), "figures": found}
        write_atomically(options.json, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
