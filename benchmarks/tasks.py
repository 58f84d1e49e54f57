"""Measure the tasks on images.

- inpaint: the right half of held-out images is hidden. Is the result nearer to the truth (squared error over
  that half) than the mean image of the training set, than a random sample of the model, and than its sample
  of the same prompt?
- outpaint: the left half of training images, cut through the object, is extended to twice the width. Is the
  step across the border as small as the steps within the image?
- image: image-to-image at strength 0 and 1 against the autoencoder and text-to-image.
- reconstruct: inversion and back, against the autoencoder alone.
- attention: of two objects side by side, does each one's attention map lie on its own half? Over all pairs;
  over those drawn as asked (each half is nearer to its own object than to the other); and over those that the
  model knows (the judge of `emoji_quality.py` has the names of both halves among its first five).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import add_quick
from emoji_judge import EmojiJudge
from torch import Tensor

import ldm
from ldm.data import EmojiData, Scene, caption, plain_scene, render_batch, side_by_side
from ldm.support.files import open_atomically, write_atomically


def parse() -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-ldm")
    parser.add_argument("--weights", help="weights to judge instead of the model's own")
    parser.add_argument("--dtype", help="dtype (default: the fastest that is safe)")
    parser.add_argument("--data", default="data/emoji", help="folder of the data set (default: %(default)s)")
    parser.add_argument(
        "--only",
        choices=("inpaint", "outpaint", "image", "reconstruct", "attention"),
        nargs="+",
        help="tasks to measure (default: all)",
    )
    parser.add_argument(
        "--n",
        type=int,
        default=50,
        help="held-out images to inpaint, and pairs for attention (default: %(default)s)",
    )
    parser.add_argument("--m", type=int, default=20, help="images of each other task (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random choice (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=10, help="images per batch (default: %(default)s)")
    parser.add_argument(
        "--resample",
        type=int,
        nargs="+",
        default=[1],
        help="RePaint: how often each stretch is repeated (default: %(default)s)",
    )
    parser.add_argument("--jump", type=int, default=5, help="steps of a stretch (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--sheet", type=Path, help="write rows of truth, input and results to this PNG")
    add_quick(parser, n=5, m=4)
    return parser.parse_args()


def main() -> None:
    options = parse()
    data = EmojiData.open(options.data)
    pipe = ldm.load(options.model, weights=options.weights, dtype=options.dtype)
    start, figures, rows = time.perf_counter(), {}, []
    measures = {
        "inpaint": inpainting,
        "outpaint": outpainting,
        "image": image_to_image,
        "reconstruct": reconstruction,
        "attention": attention,
    }
    for name in options.only or measures:
        figures[name] = measures[name](pipe, data, options, rows)
        print(f"{name}: {json.dumps(figures[name], indent=1)}", flush=True)
    print(f"{torch.get_num_threads()} threads, {pipe.dtype}, {time.perf_counter() - start:.0f} s")
    if options.json is not None:
        settings = {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
        }
        versions = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }
        report = {
            "settings": settings,
            "versions": versions,
            "data": data.manifest.get("sha256"),
            "figures": figures,
        }
        write_atomically(options.json, (json.dumps(report, indent=1) + "\n").encode())
    if options.sheet is not None and rows:
        save_sheet(options.sheet, rows)


def rendered(data: EmojiData, rows: np.ndarray) -> tuple[Tensor, list[str]]:
    """Return the images (B, 3, 128, 128) in [0, 1] of some rows on white, and their captions."""
    shown = [plain_scene(data.index, int(row)) for row in rows]
    return real(data, shown), [caption(c.facts, data.index) for c in shown]


def real(data: EmojiData, scenes: list[Scene]) -> Tensor:
    """Render scenes from the data set, (B, 3, 128, 128) in [0, 1]."""
    return torch.from_numpy(render_batch(scenes, data.images)).permute(0, 3, 1, 2).float() / 255


def batches(task: Any, n: int, size: int) -> Tensor:
    """Return the images of `task(slice)` for n images, in batches of `size`."""
    return torch.cat([task(slice(i, min(i + size, n))).tensor for i in range(0, n, size)])


def inpainting(pipe: Any, data: EmojiData, options: argparse.Namespace, rows: list[Tensor]) -> dict[str, Any]:
    """Inpaint held-out images with their right half hidden."""
    chosen = np.random.default_rng(options.seed).permutation(data.held_out)[: options.n]
    x, captions = rendered(data, chosen)
    n, half = len(x), x.shape[-1] // 2
    mask = torch.zeros(1, 1, *x.shape[-2:])
    mask[..., half:] = 1
    hidden = x * (1 - mask)  # black under the mask, so that nothing can be seen there
    mean = rendered(data, data.train)[0].mean(0, keepdim=True)
    own = {"progress": False}

    def seeds(first: int) -> list[int]:
        return list(range(first, first + n))

    rivals = {
        "mean image": mean.expand_as(x),
        "random sample": batches(
            lambda s: pipe.text_to_image([""] * len(x[s]), guidance=1.0, seed=seeds(10_000)[s], **own),
            n,
            options.batch,
        ),
        "sample of the prompt": batches(
            lambda s: pipe.text_to_image(captions[s], seed=seeds(20_000)[s], **own), n, options.batch
        ),
    }

    def error(y: Tensor) -> Tensor:
        return (y - x)[..., half:].square().flatten(1).mean(1)  # (n,)

    found: dict[str, Any] = {
        "n": n,
        "rivals' mse": {name: round(float(error(y).mean()), 4) for name, y in rivals.items()},
    }
    found["autoencoder's mse"] = round(float(error(batches_of_ae(pipe, x)).mean()), 4)
    rows += [x, rivals["sample of the prompt"]]
    for times in options.resample:
        made = batches(
            lambda s, times=times: pipe.inpaint(
                captions[s],
                hidden[s],
                mask,
                resample=times,
                jump=options.jump,
                seed=seeds(options.seed)[s],
                **own,
            ),
            n,
            options.batch,
        )
        rows.append(made)
        found[f"resample {times}"] = {
            "known pixels exact": bool(torch.equal(made[..., :half], x[..., :half])),
            "mse": round(float(error(made).mean()), 4),
            **{
                f"nearer than the {name}, %": round(100 * float((error(made) < error(y)).float().mean()), 1)
                for name, y in rivals.items()
            },
        }
    return found


def batches_of_ae(pipe: Any, x: Tensor) -> Tensor:
    """Return the reconstructions of the autoencoder."""
    return torch.cat([pipe.decode(pipe.encode(part)) for part in x.split(16)])


def outpainting(
    pipe: Any, data: EmojiData, options: argparse.Namespace, rows: list[Tensor]
) -> dict[str, Any]:
    """Extend images cut through their object to twice the width."""
    chosen = np.random.default_rng(options.seed).permutation(data.index.train_of["noto"])[: options.m]
    x, captions = rendered(data, chosen)
    half = x.shape[-1] // 2
    given = x[..., :half]
    found: dict[str, Any] = {"n": len(x)}
    # images whose uncut version passes this measure: flat ones have a 95th percentile of 0
    seamless = torch.ones(len(x), dtype=torch.bool)
    for name, own_options in (
        ("uncut image", None),
        ("without seam correction", {"seam": 0.0}),
        ("with seam correction", {}),
    ):
        made = x
        if own_options is not None:
            made = batches(
                lambda s, o=own_options: pipe.outpaint(
                    captions[s], given[s], right=half, progress=False, **o
                ),
                len(x),
                options.batch,
            )
        step = (made[..., half] - made[..., half - 1]).abs().mean(1)  # (n, H)
        # (n,) each
        own, whole = (
            (y[..., 1:] - y[..., :-1]).abs().mean(1).flatten(1).quantile(0.95, dim=1) for y in (given, made)
        )
        within = step.mean(1) <= own
        if own_options is None:
            seamless = within
        found[name] = {
            "known pixels exact": bool(torch.equal(made[..., :half], given)),
            "mean step across the border": round(float(step.mean()), 4),
            "its 95th percentile": round(float(step.quantile(0.95, dim=1).mean()), 4),
            "the image's 95th percentile": round(float(own.mean()), 4),
            "mean step within it, %": round(100 * float(within.float().mean()), 1),
            "the same, of those whose uncut image's is": (
                f"{int((within & seamless).sum())} of {int(seamless.sum())}"
            ),
            "mean step within the whole image's 95th percentile, %": round(
                100 * float((step.mean(1) <= whole).float().mean()), 1
            ),
            "95th percentile within it, %": round(
                100 * float((step.quantile(0.95, dim=1) <= own).float().mean()), 1
            ),
        }
    rows += [x, made]
    return found


def image_to_image(
    pipe: Any, data: EmojiData, options: argparse.Namespace, rows: list[Tensor]
) -> dict[str, Any]:
    """Compare strength 0 with the autoencoder, and strength 1 with text-to-image."""
    x, captions = rendered(data, data.held_out[:4])
    zero, one = (
        pipe.image_to_image(captions, x, strength=strength, progress=False).tensor for strength in (0, 1)
    )
    text = pipe.text_to_image(captions, progress=False).tensor
    return {
        "strength 0 against the autoencoder, largest difference": float(
            (zero - pipe.decode(pipe.encode(x))).abs().max()
        ),
        "strength 1 against text-to-image, largest difference": float((one - text).abs().max()),
    }


def reconstruction(
    pipe: Any, data: EmojiData, options: argparse.Namespace, rows: list[Tensor]
) -> dict[str, Any]:
    """Invert and reconstruct over 50 steps; compare with the autoencoder alone."""
    chosen = np.random.default_rng(options.seed).permutation(data.held_out)[: options.m]
    x, _ = rendered(data, chosen)

    def psnr(y: Tensor) -> Tensor:
        return -10 * (y - x).square().flatten(1).mean(1).log10()

    alone = psnr(batches_of_ae(pipe, x))
    found: dict[str, Any] = {"n": len(x), "autoencoder, dB": round(float(alone.mean()), 2)}
    for name, own in (
        ("exact", {}),
        ("ddim, 4 iterations", {"exact": False}),
        ("ddim, 1 iteration", {"exact": False, "iterations": 1}),
    ):
        made = batches(
            lambda s, own=own: pipe.reconstruct(x[s], progress=False, **own), len(x), options.batch
        )
        rows.append(made)
        lost = alone - psnr(made)
        found[name] = {
            "dB": round(float(psnr(made).mean()), 2),
            "lost by inversion, largest, dB": round(float(lost.max()), 3),
        }
    return found


def attention(pipe: Any, data: EmojiData, options: argparse.Namespace, rows: list[Tensor]) -> dict[str, Any]:
    """Draw pairs of names side by side; measure how much of each one's map is on the left half."""
    chosen = np.random.default_rng(options.seed).permutation(data.index.train_of["noto"])[: 2 * options.n]
    judge, shares, drawn, known, heat = EmojiJudge(data), [], [], [], []
    for i, (first, second) in enumerate(chosen.reshape(-1, 2)):
        pair = side_by_side(data.index, int(first), int(second))
        with ldm.trace(pipe) as trace:
            made = pipe.text_to_image(
                caption(pair.facts, data.index), seed=options.seed + i, progress=False
            ).tensor
        about = [data.index[int(row)] for row in (first, second)]
        names = [one.phrase for one in about]
        maps = torch.cat([trace.attention(name) for name in names])  # (2, h, w)
        shares.append(maps[..., : maps.shape[-1] // 2].sum((1, 2)) / maps.sum((1, 2)))
        halves, true = made[0].chunk(2, dim=-1), real(data, [pair])[0].chunk(2, dim=-1)
        drawn.append(
            all(
                (halves[i] - true[i]).square().mean() < (halves[i] - true[1 - i]).square().mean()
                for i in (0, 1)
            )
        )
        side = made.shape[-1] // 2  # each object is in a square of half the side
        squares = torch.cat(made[..., side // 2 : side // 2 + side, :].float().cpu().split(side, dim=-1))
        known.append(
            all(verdict.rank < 5 for verdict in judge(squares, [one.name for one in about], [None, None]))
        )
        heat.append(torch.cat([made, *(trace.heatmap(name).tensor for name in names)]))
    left = torch.stack(shares)  # (n, 2)
    own = torch.stack([left[:, 0] > 0.5, left[:, 1] < 0.5], dim=1).float()
    rows += torch.stack(heat, dim=1)

    def of(chosen: list[bool]) -> str:
        maps = own[torch.tensor(chosen)]
        return f"{int(maps.sum())} of {maps.numel()}"

    return {
        "n": len(left),
        "left share of the first and of the second": [round(float(share), 3) for share in left.mean(0)],
        "maps on their own half, %": round(100 * float(own.mean()), 1),
        "the first left of the second, %": round(100 * float((left[:, 0] > left[:, 1]).float().mean()), 1),
        "pairs drawn as asked": sum(drawn),
        "their maps on their own half": of(drawn),
        "pairs the model knows": sum(known),
        "their maps on their own half, of those": of(known),
    }


def save_sheet(path: Path, rows: list[Tensor]) -> None:
    """Write the images, one row per tensor, the first 20 of each."""
    from PIL import Image

    width = max(min(len(row), 20) for row in rows)
    blank = [
        torch.nn.functional.pad(
            torch.cat(list(row[:20]), dim=-1), (0, 128 * (width - min(len(row), 20))), value=1.0
        )
        for row in rows
    ]
    sheet = (torch.cat(blank, dim=-2).permute(1, 2, 0) * 255).round().byte().numpy()
    with open_atomically(path) as file:
        Image.fromarray(sheet).save(file, format="PNG")


if __name__ == "__main__":
    main()
