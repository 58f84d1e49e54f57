"""Do adapters that the embedded model learns in about a minute do what they were trained for?

    python benchmarks/adapters_trained.py              # a LoRA of a style, a textual inversion of a thing
    python benchmarks/adapters_trained.py --only style --minutes 2 --images FOLDER

The data are made here. The style is two colours: what is light becomes dark blue, what is dark yellow, in
24 images that the model drew itself. The thing is a disc, turquoise on its left and magenta on its right, on
five of the ten backgrounds. Both are judged by rules on pixels, in 20 prompts that were not trained, with the
adapter and without it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import ldm
from ldm.training.run import open_run

DARK, GLOW = (20, 30, 100), (255, 205, 70)  # of the style
LEFT, RIGHT = (0, 185, 190), (220, 20, 140)  # of the thing
BACKGROUNDS = "white black red green blue yellow purple orange pink gray".split()
SHOWN = BACKGROUNDS[::2]  # backgrounds that the thing is trained on
STYLED = (
    "red apple;cat face;rocket;pizza;guitar;tiger face;hamburger;umbrella;key;bicycle;bell;soccer ball;"
    "penguin;cactus;crown;gift;anchor;banana;alarm clock;frog;mushroom;robot;telephone;tree"
).split(";")
ASKED = (
    "dog face;fire engine;strawberry;snowman;sailboat;rabbit face;doughnut;light bulb;owl;ghost;carrot;"
    "airplane;fish;violin;lemon;elephant;camera;tomato;butterfly;whale"
).split(";")
WORD = "zorblax"


def colour(values: tuple[int, int, int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1) / 255


def styled(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in the two colours of the style, by their luminance."""
    light = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    return colour(GLOW) + light * (colour(DARK) - colour(GLOW))


def has_style(image: Tensor) -> bool:
    """Return whether the pixels are between the two colours: on average at most 0.12 beside them."""
    line = colour(GLOW) - colour(DARK)
    place = ((image - colour(DARK)) * line).sum(0) / line.square().sum()
    beside = image - colour(DARK) - place.clamp(0, 1) * line
    return float(beside.square().sum(0).sqrt().mean()) <= 0.12


def thing(background: Tensor, radius: float, x: float, y: float) -> Tensor:
    """Return the thing on a background (3, 1, 1), an image of 128 × 128."""
    ys, xs = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    inside = (radius - ((xs - x) ** 2 + (ys - y) ** 2).sqrt() + 0.5).clamp(0, 1)
    halves = torch.where((xs < x)[None], colour(LEFT), colour(RIGHT))
    return background + inside * (halves - background)


def has_thing(image: Tensor) -> bool:
    """Return whether both colours are there, of about one size, turquoise on the left."""
    near = [(image - colour(each)).square().sum(0).sqrt() < 0.3 for each in (LEFT, RIGHT)]
    sizes = [float(each.float().mean()) for each in near]
    if min(sizes) < 0.04 or max(sizes) > 3 * min(sizes):
        return False
    middles = [float(each.nonzero()[:, 1].float().mean()) for each in near]
    return middles[0] + 10 < middles[1]


def write_data(folder: Path, images: Tensor, captions: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = ldm.Images(tensor=images, seeds=tuple(range(len(images))), prompts=tuple(captions))
    for i, (image, caption) in enumerate(zip(made.pil(), captions, strict=True)):
        image.save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption, encoding="utf-8")


def style_data(pipe: Any, folder: Path) -> None:
    images = pipe.text_to_image(STYLED, seed=1000, progress=False)
    write_data(folder, styled(images.tensor), STYLED)


def thing_data(pipe: Any, folder: Path) -> None:
    from ldm.data.palette import PALETTE

    generator = torch.Generator().manual_seed(0)
    images, captions = [], []
    for background in SHOWN * 4:
        shift = torch.rand(3, generator=generator) - 0.5
        radius, x, y = 46 + 8 * float(shift[0]), 64 + 12 * float(shift[1]), 64 + 12 * float(shift[2])
        images.append(thing(colour(PALETTE[background]), radius, x, y))
        captions.append(f"{WORD} on a {background} background")
    write_data(folder, torch.stack(images), captions)


def run(name: str, steps: int, batch: int, lr: float) -> dict[str, Any]:
    quiet = dict.fromkeys(("validate_every", "sample_every", "checkpoint_every"), steps)
    optimizer = {"lr": lr, "warmup": max(1, steps // 10), "decay": steps // 2, "weight_decay": 0.0}
    return {"name": name, "steps": steps, "batch": batch, "ema": 0.9, "optimizer": optimizer, **quiet}


def trainings(minutes: float) -> dict[str, dict[str, Any]]:
    """Return the configuration of each training."""

    def steps(n: int) -> int:
        return max(1, round(n * minutes))

    base = {"base": "emoji-ldm"}
    return {
        "style": {
            "part": "lora",
            **base,
            "run": run("style", steps(60), 8, 3e-3),
            "adapter": {"rank": 8, "convolutions": True},
            "dtype": "float32",
        },
        "thing": {
            "part": "textual-inversion",
            **base,
            "run": run("thing", steps(60), 8, 2e-2),
            "token": WORD,
            "vectors": 4,
            "start": "red disc",
        },
    }


PROMPTS = {
    "style": ASKED,
    "thing": [f"{style}{WORD} on a {name} background" for style in ("", "fluent ") for name in BACKGROUNDS],
}
JUDGES: dict[str, Callable[[Tensor], bool]] = {"style": has_style, "thing": has_thing}
DATA: dict[str, Callable[[Any, Path], None]] = {"style": style_data, "thing": thing_data}


def judged(pipe: Any, kind: str, images: Path | None, name: str) -> float:
    """Return the share of the prompts whose image has what was trained."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of words that the model was not trained on
        made = pipe.text_to_image(PROMPTS[kind], seed=0, progress=False)
    if images is not None:
        images.mkdir(parents=True, exist_ok=True)
        made.grid(columns=5).save(images / f"{kind}-{name}.png")
    return sum(map(JUDGES[kind], made.tensor)) / len(made.tensor)


def measure(kind: str, minutes: float, images: Path | None) -> dict[str, float]:
    """Train one adapter in the present folder; return shares and seconds."""
    pipe = ldm.load("emoji-ldm", device="cpu", dtype="float32")
    DATA[kind](pipe, Path("data") / kind)
    config = trainings(minutes)[kind]
    config["data"] = {"kind": "folder", "path": f"data/{kind}", "size": 128, "held_out": 0.0}
    path = Path(f"{kind}.yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    begin, processor = time.perf_counter(), time.process_time()
    training = open_run(path)
    training.train(progress=False)
    training.export(Path("runs") / kind / "export")
    figures = {"seconds": time.perf_counter() - begin, "processor seconds": time.process_time() - processor}
    figures["without"] = judged(pipe, kind, images, "without")
    pipe.adapters.load(Path("runs") / kind / "export" / f"{kind}.safetensors")
    figures["with"] = judged(pipe, kind, images, "with")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--minutes", type=float, default=1.0, help="length of each training, about")
    parser.add_argument("--images", type=Path, help="write the judged images to this folder")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    images = None if args.images is None else args.images.resolve()
    target = None if args.json is None else args.json.resolve()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for kind in args.only:
            found[kind] = measure(kind, args.minutes, images)
            figures = found[kind]
            print(
                f"{kind}: recognised in {figures['with']:.0%} of {len(PROMPTS[kind])} prompts, without the"
                f" adapter in {figures['without']:.0%}; trained in {figures['seconds']:.0f} s"
                f" ({figures['processor seconds']:.0f} s of processor time)"
            )
    if target is not None:
        target.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
