"""Measure the parts of an emoji unCLIP.

    python benchmarks/unclip_quality.py --model emoji-unclip

- prior: cosine between its embeddings and the true images' on captions held out of training, against that of
  the text's embedding.
- variations: four of each held-out image; how often at least one has the same name, by the judge of
  `emoji_quality.py`; from embedding and inverted noise (the paper's bipartite latent, varied by DDIM's
  `--eta`), and from the embedding alone.
- reconstruction: PSNR of an image from its embedding and its inverted noise, against the autoencoder alone.
- upsampler: PSNR of held-out images from half their size, against bicubic enlargement, with a side-by-side
  image.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import add_quick
from emoji_judge import EmojiJudge
from emoji_quality import mean_psnr
from emoji_scenes import asked, draw_held_out_backgrounds, draw_held_out_images, real
from torch import Tensor

import ldm
from ldm.catalog.unclip_cards import AutoregressiveCard
from ldm.data import EmojiData, Scene, caption
from ldm.pipelines.stages.upsampler import enlarge
from ldm.registry.unclip.assembly import prior_stage
from ldm.support.files import open_atomically, write_atomically
from ldm.weights.formats.ldm_folder import about_part, read_network

BATCH = 10
Figures = dict[str, float]


def in_parts(make: Callable[[slice], Tensor], n: int, batch: int = BATCH) -> Tensor:
    """Return the concatenated results of `make` for the slices of n items."""
    return torch.cat([make(slice(i, min(i + batch, n))) for i in range(0, n, batch)])


def held_out(data: EmojiData, n: int, rng: np.random.Generator) -> list[Scene]:
    """Return up to n images held out of training, every other one on a background."""
    drawn = draw_held_out_images(data, rng)
    return [drawn[i] for i in rng.permutation(len(drawn))[:n]]


def prior_cosines(
    pipe: Any, data: EmojiData, options: argparse.Namespace, rng: np.random.Generator
) -> dict[str, Figures]:
    """Return mean cosines of the prior's and of the text's embedding to the image's, on held-out data.

    The sets are held-out (name, background) pairs and held-out images.
    """
    rows = {}
    for name, chosen in (
        ("held-out pairs", draw_held_out_backgrounds(data, options.n, rng)),
        ("held-out images", held_out(data, options.n, rng)),
    ):
        prompts = [caption(c.facts, data.index) for c in chosen]
        true = pipe.clip.image_embedding(real(chosen, data, pipe.card.decoder.defaults.height)).vector.cpu()
        seeds = list(range(options.seed, options.seed + len(chosen)))
        made = pipe.imagine(prompts, seed=seeds, candidates=options.candidates, progress=False).vector.cpu()
        text = pipe.clip.text_embedding(prompts).vector.cpu()
        cosine = {
            key: float(F.cosine_similarity(value, true).mean())
            for key, value in (("prior", made), ("text", text))
        }
        rows[name] = {"n": len(chosen), **cosine, "gain": cosine["prior"] - cosine["text"]}
    return rows


def variations(
    pipe: Any, data: EmojiData, options: argparse.Namespace, rng: np.random.Generator
) -> dict[str, Figures]:
    """Return how often variations of held-out images keep the name, and how much they vary.

    There are four variations per image, from the bipartite latent and from the embedding alone. The figures
    are the shares, in per cent, of images and of variations whose name is the judge's first, and the mean
    PSNR in dB between two variations of one image.
    """
    chosen, judge = held_out(data, options.pictures, rng), EmojiJudge(data)
    truth = real(chosen, data, pipe.card.decoder.defaults.height)
    rows = {}
    inverted = {
        "invert": True,
        "eta": options.eta,
        "steps": options.invert_steps,
        "iterations": options.iterations,
    }
    for name, settings in (
        (f"embedding and inverted noise, eta {options.eta:g}", inverted),
        ("embedding alone", {"upsample": False}),
    ):
        hits, between = [], []
        for k, (image, scene) in enumerate(zip(truth, chosen, strict=True)):
            made = pipe.variations(image, n=4, seed=options.seed + 4 * k, progress=False, **settings).tensor
            verdicts = judge(made, *asked([scene] * 4))
            hits.append([verdict.rank == 0 for verdict in verdicts])
            between.append(mean_psnr(made[:1], made[1:2]))
        found = np.array(hits)
        shares = {"one of four": 100 * float(found.any(1).mean()), "each": 100 * float(found.mean())}
        rows[name] = {"n": len(found), **shares, "between": float(np.mean(between))}
    return rows


def reconstruction(
    pipe: Any, data: EmojiData, options: argparse.Namespace, rng: np.random.Generator
) -> Figures:
    """Return the PSNR in dB of held-out images from embedding and inverted noise, and of the autoencoder."""
    truth = real(held_out(data, options.pictures, rng), data, pipe.card.decoder.defaults.height)
    space = pipe.decoder.space
    alone = in_parts(lambda at: space.decode(space.encode(truth[at], pipe.device)), len(truth))
    settings = {"steps": options.invert_steps, "iterations": options.iterations, "progress": False}
    again = torch.cat([pipe.reconstruct(image, **settings).tensor for image in truth])
    figures = {"reconstruction": mean_psnr(again, truth), "autoencoder": mean_psnr(alone, truth)}
    return {"n": len(truth), **figures, "lost": figures["autoencoder"] - figures["reconstruction"]}


def upsampler(
    pipe: Any, data: EmojiData, options: argparse.Namespace, rng: np.random.Generator
) -> tuple[Figures, Tensor]:
    """Return the mean PSNR in dB of held-out images from half their size, and of bicubic enlargement.

    The second value holds rows of half, bicubic, upsampled and true image.
    """
    stage, side = pipe.upsamplers[0], options.side
    truth = real(held_out(data, options.pictures, rng), data, side)
    factor = pipe.card.upsamplers[0].defaults.height // pipe.card.decoder.defaults.height
    small = F.avg_pool2d(truth, factor)

    def enlarged(at: slice) -> Tensor:
        part = small[at]
        call = stage.settle(
            [""] * len(part), seed=list(range(at.start, at.stop)), height=side, width=side, progress=False
        )
        return stage(part, call)

    made, bicubic = in_parts(enlarged, len(truth)), enlarge(small, (side, side)).clamp(0, 1)
    figures = {"upsampler": mean_psnr(made, truth), "bicubic": mean_psnr(bicubic, truth)}
    shown = torch.stack([F.interpolate(small, (side, side)), bicubic, made, truth], dim=1)[:8].flatten(0, 1)
    return {"n": len(truth), **figures, "gain": figures["upsampler"] - figures["bicubic"]}, shown


def other_prior(pipe: Any, folder: Path) -> None:
    """Replace the model's prior by the one in a folder of an export; it must be of the same CLIP."""
    network, about = read_network(folder, "prior")
    clip = about_part(folder, "prior").get("clip", pipe.card.clip)
    if clip != pipe.card.clip:
        raise ValueError(
            f"the prior in {str(folder)!r} was trained on {clip!r}, the model runs on {pipe.card.clip!r}"
        )
    card = AutoregressiveCard() if about["network"] == "AutoregressivePrior" else pipe.card.prior
    pipe.prior = prior_stage(network, card, clip=clip).eval()


def measure(pipe: Any, data: EmojiData, options: argparse.Namespace) -> tuple[dict[str, Any], Tensor | None]:
    """Return the requested figures, each over images chosen by the same seed, and the upsampler's rows."""
    result: dict[str, Any] = {}
    shown = None
    for name in options.only:
        rng, start = np.random.default_rng(options.seed), time.perf_counter()
        if name == "prior":
            result[name] = prior_cosines(pipe, data, options, rng)
        elif name == "variations":
            result[name] = variations(pipe, data, options, rng)
        elif name == "reconstruction":
            result[name] = reconstruction(pipe, data, options, rng)
        else:
            result[name], shown = upsampler(pipe, data, options, rng)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return result, shown


def table(result: dict[str, Any]) -> str:
    """Return the figures as a Markdown table with their bars."""
    lines = ["| what | figure | against | difference | bar |", "|---|---|---|---|---|"]
    for name, row in result.get("prior", {}).items():
        lines.append(
            f"| prior, {name}: cosine | {row['prior']:.4f} | text embedding {row['text']:.4f} |"
            f" {row['gain']:+.4f} | higher |"
        )
    for name, row in result.get("variations", {}).items():
        against = f"each {row['each']:.0f} %; {row['between']:.1f} dB between two"
        bar = "" if name == "embedding alone" else "at least 70 %"
        lines.append(
            f"| variations from {name}: one of four has the name | {row['one of four']:.0f} % | {against} | |"
            f" {bar} |"
        )
    for name, better, against, sign in (
        ("reconstruction", "reconstruction", "autoencoder", "lost"),
        ("upsampler", "upsampler", "bicubic", "gain"),
    ):
        if row := result.get(name):
            bar = "at most 3 dB lost" if sign == "lost" else "at least +1 dB"
            lines.append(
                f"| {name}: PSNR | {row[better]:.2f} dB | {against} {row[against]:.2f} dB | {sign}"
                f" {row[sign]:+.2f} dB | {bar} |"
            )
    return "\n".join(lines)


def save_rows(path: Path, shown: Tensor) -> None:
    """Write the rows of half, bicubic, upsampled and true image in four columns."""
    grid = ldm.Images(tensor=shown, seeds=(0,) * len(shown), prompts=("",) * len(shown)).grid(columns=4)
    with open_atomically(path) as file:
        grid.save(file, format="PNG")


NAMES = ("prior", "variations", "reconstruction", "upsampler")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options; exit with a message for impossible ones."""
    parser = argparse.ArgumentParser(description="Measure the parts of an emoji unCLIP.")
    parser.add_argument(
        "--model", default=None, help="model (default: the one in the folder of weights, else emoji-unclip)"
    )
    parser.add_argument("--weights", default=None, help="weights to judge instead of the model's own")
    parser.add_argument("--data", default="data/emoji", help="folder of the data set (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, help="figures to measure (default: all)"
    )
    parser.add_argument(
        "--prior",
        type=Path,
        default=None,
        help="folder of another prior's export, such as the autoregressive one",
    )
    parser.add_argument("--n", type=int, default=200, help="captions per set (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=50, help="held-out images (default: %(default)s)")
    parser.add_argument(
        "--candidates",
        type=int,
        default=1,
        help="embeddings that the prior chooses from (default: %(default)s)",
    )
    parser.add_argument(
        "--eta", type=float, default=0.25, help="eta of variations from inverted noise (default: %(default)s)"
    )
    parser.add_argument(
        "--invert-steps", type=int, default=50, help="steps of DDIM and its inversion (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=4,
        help="fixed-point iterations of the inversion (default: %(default)s)",
    )
    parser.add_argument(
        "--side",
        type=int,
        default=128,
        help="side of the upsampler's images in pixels (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument(
        "--picture", type=Path, default=None, help="write the upsampler's side-by-side image to this file"
    )
    add_quick(parser, n=10, pictures=5)
    options = parser.parse_args(arguments)
    for name in ("n", "pictures", "candidates", "invert_steps", "iterations", "side"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    name = options.model or (None if options.weights else "emoji-unclip")
    pipe = ldm.load(name, weights=options.weights)
    if options.prior is not None:
        other_prior(pipe, options.prior)
    result, shown = measure(pipe, EmojiData.open(options.data), options)
    print(table(result))
    if shown is not None and options.picture is not None:
        save_rows(options.picture, shown)
    if options.json is not None:
        write_atomically(options.json, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
