"""Measure how often an emoji model draws what was asked.

    python benchmarks/emoji_quality.py
    python benchmarks/emoji_quality.py --real

Rows (judged by `emoji_judge`): random names, half of them on a random background; held-out (name, background)
pairs; the background colour; the autoencoder on held-out images; and the Fréchet distance to the data (Heusel
et al. 2017, with the model's own CLIP image tower instead of Inception) of samples, of reconstructions and of
other images of the data. With `--real`, the judge itself is measured: on images of the data set in places,
sizes and tilts of the training's scenes, by their own names and by each other's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import add_quick
from emoji_judge import EmojiJudge, Verdict
from emoji_scenes import asked, draw_held_out_backgrounds, draw_held_out_images, draw_training, real
from torch import Tensor
from torch.nn.functional import normalize

import ldm
from ldm.analysis.metrics.bootstrap import Bootstrap, Estimate
from ldm.analysis.metrics.features import extract, folder_clip
from ldm.analysis.metrics.frechet import frechet_estimate
from ldm.catalog.lookup import ASSETS
from ldm.data import STYLES, EmojiData, Mix, caption, draw_layout, sample_scene
from ldm.support.files import open_atomically, write_atomically

Generate = Callable[[Sequence[str], Sequence[int]], Tensor]  # prompts, seeds -> (B, 3, H, W) in [0, 1]


def score(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the shares, in per cent, of hits in a list of verdicts."""
    share = {
        "top1": [verdict.rank == 0 for verdict in verdicts],
        "top5": [verdict.rank < 5 for verdict in verdicts],
        "background": [verdict.background_right for verdict in verdicts],
    }
    return {name: 100 * float(np.mean(hits)) if hits else float("nan") for name, hits in share.items()}


@torch.inference_mode()
def reconstruct(pipe: Any, images: Tensor, batch: int = 16) -> Tensor:
    """Encode and decode images (B, 3, H, W) in [0, 1] by the posterior's mode; clamp to [0, 1]."""
    like = next(pipe.vae.parameters())
    latents = (pipe.vae.encode((part * 2 - 1).to(like)).mode() for part in images.split(batch))
    parts = [pipe.vae.decode(latent.to(like)).float().cpu() for latent in latents]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def mean_psnr(a: Tensor, b: Tensor) -> float:
    """Return the mean over images in [0, 1] of each one's PSNR in dB."""
    return float((-10 * (a - b).square().flatten(1).mean(1).clamp_min(1e-12).log10()).mean())


def mean_gradient(images: Tensor) -> float:
    """Return the mean magnitude of the gradient of images (B, 3, H, W), by differences of neighbours."""
    down, right = images.diff(dim=-2)[..., :, :-1], images.diff(dim=-1)[..., :-1, :]
    return float((down.square() + right.square()).sqrt().mean())


def frechet_rows(
    pipe: Any,
    generate: Generate,
    data: EmojiData,
    size: int,
    rng: np.random.Generator,
    options: argparse.Namespace,
) -> tuple[dict[str, Estimate], float]:
    """Return Fréchet distances to n images of the data with their bootstrap intervals, and the sharpness.

    They are those of n samples, of n reconstructions, and of n other images of the data, which is the
    distance that chance gives. The features are CLIP's embeddings, scaled to length 1. The sharpness is the
    `mean_gradient` of the samples relative to that of the images of the same captions.
    """
    clip, n = folder_clip(options.clip), options.frechet_n
    styles = dict.fromkeys(options.styles, 1.0)
    mix = Mix(styles=styles, two=0.0, count=0.0, small=0.0, placed=0.0, colour=0.0, style=1.0)
    reference, wanted = ([sample_scene(rng, data.index, mix) for _ in range(n)] for _ in range(2))
    to = normalize(extract(real(reference, data, size), clip, batch=100))
    fresh = real(wanted, data, size)
    samples = generate([caption(scene.facts, data.index) for scene in wanted], range(10**6, 10**6 + n))
    made = {"samples": samples, "reconstructions": reconstruct(pipe, fresh), "data": fresh}
    distances = {
        name: frechet_estimate(normalize(extract(images, clip, batch=100)), to, clip.name, Bootstrap())
        for name, images in made.items()
    }
    return distances, mean_gradient(samples) / mean_gradient(fresh)


def generator(pipe: Any, options: argparse.Namespace) -> Generate:
    """Return the model as a function, with the settings given and defaults otherwise."""
    settings = {
        key: getattr(options, key) for key in ("steps", "guidance") if getattr(options, key) is not None
    }

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        parts = []
        for start in range(0, len(prompts), options.batch):
            chosen = slice(start, start + options.batch)
            made = pipe.text_to_image(
                list(prompts[chosen]), n=1, seed=list(seeds[chosen]), progress=False, **settings
            )
            parts.append(made.tensor.float().cpu())
        return torch.cat(parts)

    return generate


def measure(
    pipe: Any, data: EmojiData, options: argparse.Namespace
) -> tuple[dict[str, Any], Tensor, list[Verdict], list[str]]:
    """Return all figures, and the judged images with their verdicts and prompts."""
    rng = np.random.default_rng(options.seed)
    generate, judge = generator(pipe, options), EmojiJudge(data)
    sets = {
        "training": draw_training(data, options.n, rng, options.styles),
        "held_out_pairs": draw_held_out_backgrounds(data, options.n, rng, options.styles),
    }
    result: dict[str, Any] = {}
    all_images, all_verdicts, all_prompts = [], [], []
    for name, scenes in sets.items():
        prompts = [caption(scene.facts, data.index) for scene in scenes]
        start = time.perf_counter()
        images = generate(prompts, range(options.seed, options.seed + len(prompts)))
        seconds = (time.perf_counter() - start) / len(prompts)
        verdicts = judge(images, *asked(scenes))
        result[name] = {"n": len(prompts), **score(verdicts), "seconds_an_image": seconds}
        if name == "training":
            result["training_on_background"] = score([verdict for verdict in verdicts if verdict.background])
            result["training_on_white"] = score([verdict for verdict in verdicts if not verdict.background])
        all_images.append(images)
        all_verdicts += verdicts
        all_prompts += prompts
    size = all_images[0].shape[-1]
    held_out = real(draw_held_out_images(data, rng), data, size)
    result["autoencoder"] = {"n": len(held_out), "psnr": mean_psnr(reconstruct(pipe, held_out), held_out)}
    if not options.skip_frechet:
        rows, sharpness = frechet_rows(pipe, generate, data, size, rng, options)
        result["frechet"] = {"n": options.frechet_n, "sharpness": sharpness}
        result["frechet"] |= {name: dataclasses.asdict(row) for name, row in rows.items()}
    return {"size": size, **result}, torch.cat(all_images), all_verdicts, all_prompts


def measure_judge(data: EmojiData, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the figures of images of the data set, judged by their own names and by each other's."""
    rng, judge = np.random.default_rng(options.seed), EmojiJudge(data)
    plain = draw_training(data, options.n, rng, options.styles)
    placed = [draw_layout(scene.facts, data.index, rng) for scene in plain]
    images, (names, backgrounds) = real(placed, data, 128), asked(placed)
    others = [*names[1:], names[0]]
    return {
        "their own names": score(judge(images, names, backgrounds)),
        "each other's names": score(judge(images, others, backgrounds)),
    }


def judge_table(figures: dict[str, dict[str, float]]) -> str:
    """Return the figures of `measure_judge` as a Markdown table."""
    rows = [
        f"| {name} | " + " | ".join(f"{value:.1f} %" for value in found.values()) + " |"
        for name, found in figures.items()
    ]
    return "\n".join(
        ["| images of the data set by | top-1 | top-5 | background |", "|---|---|---|---|", *rows]
    )


def table(result: dict[str, Any]) -> str:
    """Return the figures as a Markdown table with their bars."""
    training, pairs = result["training"], result["held_out_pairs"]
    drop = training["top1"] - pairs["top1"]
    psnr = result["autoencoder"]["psnr"]
    rows = [
        (
            f"nearest image has the requested name, top-1 (n = {training['n']})",
            f"{training['top1']:.1f} %",
            "≥ 92 %",
            training["top1"] >= 92,
        ),
        ("the same, top-5", f"{training['top5']:.1f} %", "≥ 97 %", training["top5"] >= 97),
        ("top-1 on white, not in the prompt", f"{result['training_on_white']['top1']:.1f} %", "", None),
        (
            "top-1 on a background named in the prompt",
            f"{result['training_on_background']['top1']:.1f} %",
            "",
            None,
        ),
        (
            "the background has the requested colour",
            f"{training['background']:.1f} %",
            "≥ 98 %",
            training["background"] >= 98,
        ),
        (
            f"held-out (name, background) pairs, top-1 (n = {pairs['n']})",
            f"{pairs['top1']:.1f} %",
            "≤ 10 points below",
            drop <= 10,
        ),
        ("the same, top-5", f"{pairs['top5']:.1f} %", "", None),
        ("the same, background", f"{pairs['background']:.1f} %", "", None),
        (
            f"autoencoder, held-out images, mean PSNR (n = {result['autoencoder']['n']})",
            f"{psnr:.2f} dB",
            "≥ 30 dB",
            psnr >= 30,
        ),
    ]
    for name, label in {
        "samples": "samples",
        "reconstructions": "reconstructions",
        "data": "other data",
    }.items():
        if frechet := result.get("frechet"):
            what = f"Fréchet distance of CLIP features to the data, {label} (n = {frechet['n']})"
            found = frechet[name]
            interval = f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"
            most = 1.5 * frechet["reconstructions"]["value"]
            bound = ("≤ 1.5 × the reconstructions'", found["value"] <= most)
            rows.append((what, interval, *(bound if name == "samples" else ("", None))))
    if frechet := result.get("frechet"):
        sharpness = frechet["sharpness"]
        what = "sharpness: mean gradient of samples, relative to the data"
        rows.append((what, f"{sharpness:.3f}", "0.9 to 1.1", 0.9 <= sharpness <= 1.1))
    lines = ["| what | figure | bar | |", "|---|---|---|---|"]
    return "\n".join(
        lines
        + [
            f"| {a} | {b} | {c} | {'' if ok is None else 'met' if ok else 'NOT MET'} |"
            for a, b, c, ok in rows
        ]
    )


def save_grid(path: Path, images: Tensor, verdicts: Sequence[Verdict], prompts: Sequence[str]) -> None:
    """Write a PNG of the judged images, each above its prompt; the nearest name of a miss is in red."""
    import textwrap

    from PIL import Image, ImageDraw

    columns, cell, text = 10, max(images.shape[-1], 96) + 8, 50
    sheet = Image.new("RGB", (columns * cell, -(-len(images) // columns) * (cell + text)), "#e8e8e8")
    draw = ImageDraw.Draw(sheet)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, (image, verdict, prompt) in enumerate(zip(pixels, verdicts, prompts, strict=True)):
        x, y = i % columns * cell + 4, i // columns * (cell + text) + 4
        sheet.paste(Image.fromarray(image), (x, y))
        draw.multiline_text(
            (x, y + cell - 6), "\n".join(textwrap.wrap(prompt, cell // 6)[:3]), fill="black", spacing=1
        )
        missed = ([f"#{verdict.rank + 1}, {verdict.nearest}"] if verdict.rank else []) + (
            [] if verdict.background_right else [verdict.background_seen]
        )
        draw.text((x, y + cell + 31), "; ".join(missed)[: cell // 6], fill="red")
    with open_atomically(path) as file:
        sheet.save(file, format="PNG")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; exit with a message for impossible ones."""
    parser = argparse.ArgumentParser(description="Measure how often an emoji model draws what was asked.")
    parser.add_argument("--model", default="emoji-ldm")
    parser.add_argument(
        "--real", action="store_true", help="measure the judge on images of the data set, without a model"
    )
    parser.add_argument("--weights", default=None, help="weights to judge instead of the model's own")
    parser.add_argument("--data", default="data/emoji", help="folder of the data set (default: %(default)s)")
    parser.add_argument(
        "--n", type=int, default=100, help="images in each of the two sets (default: %(default)s)"
    )
    parser.add_argument(
        "--styles", nargs="+", choices=STYLES, default=list(STYLES), help="styles to ask for (default: all)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the random choice and of the first image (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=None, help="sampling steps (default: the model card's)")
    parser.add_argument(
        "--guidance", type=float, default=None, help="guidance scale (default: the model card's)"
    )
    parser.add_argument("--batch", type=int, default=10, help="images per batch (default: %(default)s)")
    parser.add_argument(
        "--frechet-n",
        type=int,
        default=2000,
        help="images in each set of the Fréchet distance (default: %(default)s)",
    )
    parser.add_argument("--skip-frechet", action="store_true")
    parser.add_argument(
        "--clip",
        type=Path,
        default=ASSETS / "emoji-clip",
        help="folder of the image tower whose features are compared",
    )
    parser.add_argument(
        "--json", type=Path, default=None, help="write the figures and every verdict to this file"
    )
    parser.add_argument(
        "--grid", type=Path, default=None, help="write a PNG of the judged images to this file"
    )
    add_quick(parser, n=20, frechet_n=100)
    options = parser.parse_args(arguments)
    if options.n < 2 or options.batch < 1 or options.frechet_n < 2:
        parser.error("--n and --frechet-n must be at least 2, --batch at least 1")
    for path in (options.json, options.grid):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"no such folder: {str(path.parent)!r}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    data = EmojiData.open(options.data)
    if options.real:
        print(judge_table(measure_judge(data, options)))
        return
    pipe = ldm.load(options.model, weights=options.weights) if options.weights else ldm.load(options.model)
    start = time.perf_counter()
    result, images, verdicts, prompts = measure(pipe, data, options)
    print(table(result))
    print(
        f"\n{torch.get_num_threads()} threads, {time.perf_counter() - start:.0f} s;"
        f" {result['training']['seconds_an_image']:.2f} s per image"
    )
    if options.grid is not None:
        save_grid(options.grid, images, verdicts, prompts)
    if options.json is not None:
        report = {
            "settings": {
                key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
            },
            "versions": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
            },
            "data": data.manifest.get("sha256"),
            "figures": result,
            "verdicts": [
                {"prompt": prompt, **dataclasses.asdict(verdict)}
                for prompt, verdict in zip(prompts, verdicts, strict=True)
            ],
        }
        write_atomically(options.json, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
