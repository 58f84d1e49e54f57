"""Where does unCLIP's error come from: the prior or the decoder? (Ramesh et al. 2022, figure 8: image
embedding, prior, text embedding)

    python benchmarks/unclip_error.py --model emoji-unclip

The same decoder makes pictures of the same prompts with the same seeds from three embeddings: that of the
true picture, the prior's, and the text's own used in its place. What the first row misses is the decoder's
error; what the others miss beyond it is that of the embedding.
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
from emoji_quality import draw_training, real, score
from torch import Tensor

import ldm
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.data import EmojiData, caption
from ldm.support.files import write_atomically

ROWS = ("image", "prior", "text")  # whose embedding the decoder is given
Make = Callable[[ImageEmbedding, Sequence[str], Sequence[int]], Tensor]


def embeddings(
    pipe: Any, truth: Tensor, prompts: Sequence[str], seeds: Sequence[int], *, candidates: int = 1
) -> dict[str, ImageEmbedding]:
    """The three embeddings of each prompt; ``truth``: the true pictures (B, 3, H, W) in [0, 1].

    The text's is brought to the length of the true ones, which the decoder knows.
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
    """For each row: its pictures, their mean squared error to the truth, and the mean cosine of the embedding
    and the true picture's."""
    rows: dict[str, Any] = {}
    for name, embedding in given.items():
        pictures = make(embedding, prompts, seeds)
        size = truth.shape[-2:]
        seen = pictures if pictures.shape[-2:] == size else F.interpolate(pictures, size, mode="area")
        cosine = F.cosine_similarity(
            embedding.vector, given["image"].vector.to(embedding.vector.device), dim=-1
        )
        rows[name] = {
            "pictures": pictures,
            "mse": float((seen - truth).square().mean()),
            "cosine": float(cosine.mean()),
        }
    return rows


def attribute(errors: Mapping[str, float]) -> dict[str, float]:
    """Errors of the rows (smaller is better) → the decoder's, made even from true embeddings, and what each
    other embedding adds to it."""
    return {"decoder": errors["image"], **{name: errors[name] - errors["image"] for name in ROWS[1:]}}


def maker(pipe: Any, options: argparse.Namespace) -> Make:
    """The decoder as a function, at its default settings but for those given, without upsamplers."""
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
    """The figures of all rows, as emoji_quality.py defines them, and whose error it is."""
    rng = np.random.default_rng(options.seed)
    compositions = draw_training(data, options.n, rng)
    prompts, seeds = (
        [caption(c, data.index) for c in compositions],
        list(range(options.seed, options.seed + options.n)),
    )
    size = pipe.card.decoder.defaults.height
    truth = real(compositions, data, size)
    rows = compare(
        maker(pipe, options),
        embeddings(pipe, truth, prompts, seeds, candidates=options.candidates),
        truth,
        prompts,
        seeds,
    )
    judge = EmojiJudge(data)
    for row in rows.values():
        verdicts = judge(
            row.pop("pictures"),
            [data.index[c.image].name for c in compositions],
            [c.background for c in compositions],
        )
        row.update(score(verdicts))
    whose = {"mse": attribute({name: row["mse"] for name, row in rows.items()})}
    whose["top1 missed"] = attribute({name: 100 - row["top1"] for name, row in rows.items()})
    return {"n": options.n, "rows": rows, "error of": whose}


def table(result: Mapping[str, Any]) -> str:
    """The rows as a Markdown table, and below it whose error it is."""
    label = {"image": "true image embedding", "prior": "the prior's", "text": "text embedding in its place"}
    lines = [
        "| embedding | cosine to the true one | mse | top-1 | top-5 | ground |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        shares = " | ".join(f"{row[what]:.1f} %" for what in ("top1", "top5", "ground"))
        lines.append(f"| {label[name]} | {row['cosine']:.3f} | {row['mse']:.4f} | {shares} |")
    for what, parts in result["error of"].items():
        lines.append(f"\n{what}: " + ", ".join(f"{name} {value:+.4g}" for name, value in parts.items()))
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; impossible ones are refused."""
    parser = argparse.ArgumentParser(description="Attribute unCLIP's error to prior and decoder.")
    parser.add_argument(
        "--model", default=None, help="default: the one in the folder of weights, else emoji-unclip"
    )
    parser.add_argument("--weights", default=None, help="weights to judge in place of the model's own")
    parser.add_argument("--data", default="data/emoji", help="folder of the data set (default: %(default)s)")
    parser.add_argument(
        "--n", type=int, default=100, help="prompts, half with a ground (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="of the decoder (default: the card's)")
    parser.add_argument("--guidance", type=float, default=None, help="of the decoder (default: the card's)")
    parser.add_argument(
        "--candidates", type=int, default=1, help="embeddings the prior chooses from (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
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
