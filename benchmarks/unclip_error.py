"""Attribute unCLIP's error to the prior and to the decoder (Ramesh et al. 2022, figure 8).

    python benchmarks/unclip_error.py --model emoji-unclip

The same decoder generates images of the same prompts with the same seeds from three embeddings: the true
image's, the prior's, and the text's used in its place. The error of the first row is the decoder's; what the
other rows add is the embedding's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from emoji_judge import EmojiJudge
from emoji_quality import score
from emoji_scenes import asked, draw_training, real
from torch import Tensor

import ldm
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.data import EmojiData, caption
from ldm.support.files import write_atomically

ROWS = ("image", "prior", "text")  # source of the decoder's embedding
Make = Callable[[ImageEmbedding, Sequence[str], Sequence[int]], Tensor]


def embeddings(
    pipe: Any, truth: Tensor, prompts: Sequence[str], seeds: Sequence[int], *, candidates: int = 1
) -> dict[str, ImageEmbedding]:
    """Return the three embeddings of each prompt.

    Args:
        pipe: The unCLIP model.
        truth: The true images, (B, 3, H, W) in [0, 1].
        prompts: One prompt per image.
        seeds: One seed per image, for the prior.
        candidates: Embeddings that the prior chooses from. Default: 1.

    Returns:
        "image", "prior" and "text"; the text's embedding is scaled to the mean length of the true ones.
    """
    image, text = pipe.clip.image_embedding(truth), pipe.clip.text_embedding(list(prompts))
    length = image.vector.norm(dim=1).mean()
    prior = pipe.imagine(list(prompts), seed=list(seeds), candidates=candidates, progress=False)
    return {"image": image, "prior": prior, "text": replace(text, vector=length * text.unit().vector)}


def compare(
    make: Make,
    given: Mapping[str, ImageEmbedding],
    truth: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Return for each embedding: images, their mean squared error, and the mean cosine to the true embedding.

    Args:
        make: The decoder, `(embedding, prompts, seeds) -> images`.
        given: The embeddings by row; "image" is the true one.
        truth: The true images, (B, 3, H, W) in [0, 1].
        prompts: One prompt per image.
        seeds: One seed per image.
    """
    rows: dict[str, Any] = {}
    for name, embedding in given.items():
        images = make(embedding, prompts, seeds)
        size = truth.shape[-2:]
        seen = images if images.shape[-2:] == size else F.interpolate(images, size, mode="area")
        cosine = F.cosine_similarity(
            embedding.vector, given["image"].vector.to(embedding.vector.device), dim=-1
        )
        rows[name] = {
            "images": images,
            "mse": float((seen - truth).square().mean()),
            "cosine": float(cosine.mean()),
        }
    return rows


def attribute(errors: Mapping[str, float]) -> dict[str, float]:
    """Return the decoder's error (that of the true embeddings), and what each other embedding adds to it."""
    return {"decoder": errors["image"], **{name: errors[name] - errors["image"] for name in ROWS[1:]}}


def maker(pipe: Any, options: argparse.Namespace) -> Make:
    """Return the decoder without upsamplers as a function, with the settings given and defaults otherwise."""
    settings = {
        key: getattr(options, key) for key in ("steps", "guidance") if getattr(options, key) is not None
    }

    def make(embedding: ImageEmbedding, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        parts = []
        for start in range(0, len(prompts), options.batch):
            at = slice(start, start + options.batch)
            images = pipe.text_to_image(
                list(prompts[at]),
                n=1,
                seed=list(seeds[at]),
                embedding=embedding[at],
                upsample=False,
                progress=False,
                **settings,
            )
            parts.append(images.tensor)
        return torch.cat(parts)

    return make


def measure(pipe: Any, data: EmojiData, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all rows, as in emoji_quality.py, and the attribution of the error."""
    rng = np.random.default_rng(options.seed)
    scenes = draw_training(data, options.n, rng)
    prompts, seeds = (
        [caption(c.facts, data.index) for c in scenes],
        list(range(options.seed, options.seed + options.n)),
    )
    size = pipe.card.decoder.defaults.height
    truth = real(scenes, data, size)
    rows = compare(
        maker(pipe, options),
        embeddings(pipe, truth, prompts, seeds, candidates=options.candidates),
        truth,
        prompts,
        seeds,
    )
    judge = EmojiJudge(data)
    for row in rows.values():
        verdicts = judge(row.pop("images"), *asked(scenes))
        row.update(score(verdicts))
    whose = {"mse": attribute({name: row["mse"] for name, row in rows.items()})}
    whose["top1 missed"] = attribute({name: 100 - row["top1"] for name, row in rows.items()})
    return {"n": options.n, "rows": rows, "error of": whose}


def table(result: Mapping[str, Any]) -> str:
    """Return the rows as a Markdown table, followed by the attribution of the error."""
    label = {"image": "true image embedding", "prior": "prior's embedding", "text": "text embedding instead"}
    lines = [
        "| embedding | cosine to the true one | MSE | top-1 | top-5 | background |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        shares = " | ".join(f"{row[what]:.1f} %" for what in ("top1", "top5", "background"))
        lines.append(f"| {label[name]} | {row['cosine']:.3f} | {row['mse']:.4f} | {shares} |")
    for what, parts in result["error of"].items():
        lines.append(f"\n{what}: " + ", ".join(f"{name} {value:+.4g}" for name, value in parts.items()))
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; exit with a message for impossible ones."""
    parser = argparse.ArgumentParser(description="Attribute unCLIP's error to prior and decoder.")
    parser.add_argument(
        "--model", default=None, help="model (default: the one in the folder of weights, else emoji-unclip)"
    )
    parser.add_argument("--weights", default=None, help="weights to judge instead of the model's own")
    parser.add_argument("--data", default="data/emoji", help="folder of the data set (default: %(default)s)")
    parser.add_argument(
        "--n", type=int, default=100, help="prompts, half of them with a background (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="of the decoder (default: the card's)")
    parser.add_argument("--guidance", type=float, default=None, help="of the decoder (default: the card's)")
    parser.add_argument(
        "--candidates",
        type=int,
        default=1,
        help="embeddings that the prior chooses from (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.n < 2 or options.batch < 1 or options.candidates < 1:
        parser.error("--n must be at least 2, --batch and --candidates at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    pipe = ldm.load(options.model or (None if options.weights else "emoji-unclip"), weights=options.weights)
    start = time.perf_counter()
    result = measure(pipe, EmojiData.open(options.data), options)
    print(table(result))
    print(f"\n{torch.get_num_threads()} threads, {time.perf_counter() - start:.0f} s")
    if options.json is not None:
        write_atomically(options.json, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
