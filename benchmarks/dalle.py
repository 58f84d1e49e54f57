"""Measure one image of DALL·E Mini with random weights, against min-dalle: seconds, tokens and peak memory.

    python benchmarks/dalle.py --json dalle.json
    python benchmarks/dalle.py --quick           # 12 tokens instead of 256, and no images of them

Each side runs in a process of its own, with the same files: min-dalle's encoder.pt, decoder.pt and detoker.pt
in float32. Tokens are greedy, so that both sides must draw the same ones. min-dalle has to be installed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, add_quick, parser, report, settle
from memory import forget, in_child, peak
from torch import Tensor

import ldm
from ldm.catalog.lookup import find_card
from ldm.models.dalle.detokenizer import DetokenizerConfig
from ldm.models.text.bpe import byte_symbols
from ldm.models.text.byte_bpe import SPECIAL_TOKENS, ByteTokenizer
from ldm.weights.parts import build_network, randomise, to_layout

PROMPT = "a red apple"
FILES = {"encoder": "encoder.pt", "decoder": "decoder.pt", "vae": "detoker.pt"}
# of ldm: options of `ldm.optimize` (None: it is not called), and the dtype that the weights are loaded in
SIDES: dict[str, tuple[dict[str, bool] | None, str]] = {
    "ldm, as loaded": (None, "fp32"),
    "ldm": ({"memory": True}, "fp32"),
    "ldm, resident": ({}, "fp32"),
    "ldm, bf16": ({"memory": True}, "bf16"),
    "ldm, int8": ({"int8": True}, "fp32"),
}


def write_files(folder: Path, name: str) -> None:
    """Write min-dalle's files of a card with random weights, one part after the other."""
    symbols = [*SPECIAL_TOKENS, *byte_symbols()]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    for seed, (part, config) in enumerate(find_card(name)[0].shapes().items()):
        config = DetokenizerConfig(**vars(config)) if part == "vae" else config
        state = to_layout(randomise(build_network(config), seed), "original")
        torch.save(
            {key.removeprefix("quantize."): value for key, value in state.items()}, folder / FILES[part]
        )


def run_ldm(who: str, folder: Path, args: argparse.Namespace) -> tuple[Callable[[], Any], float]:
    """Return the call of one image, and the bytes of the weights."""
    options, dtype = SIDES[who]
    pipe = ldm.load(args.card, weights=folder, device="cpu", dtype=DTYPES[dtype])
    if options is not None:
        ldm.optimize(pipe, **options)
    call = pipe.settle(PROMPT, n=1, temperature=0.0, progress=False)

    def run() -> list[int]:
        if args.tokens == pipe.decoder.config.length:
            last: list[Tensor] = []
            hook = lambda count, tokens, images: last.append(tokens)  # noqa: E731
            pipe.text_to_image(PROMPT, n=1, temperature=0.0, progress=False, on_step=hook)
            return last[-1][0].tolist()
        drawn = pipe.drawn(call)
        return [next(drawn) for _ in range(args.tokens)][-1][1][0, : args.tokens].tolist()

    return run, float(sum(p.numel() * p.element_size() for p in pipe.parameters()))


def run_min_dalle(folder: Path, args: argparse.Namespace) -> tuple[Callable[[], Any], float]:
    """Return min-dalle's loop of one image with its own networks, from the token that ldm starts with."""
    from min_dalle.models import DalleBartDecoder, DalleBartEncoder, VQGanDetokenizer

    settle(args)  # its import sets the number of threads
    card: Any = find_card(args.card)[0]
    text, image = card.shapes()["encoder"], card.shapes()["decoder"]
    sizes = {"embed_count": text.width, "attention_head_count": text.heads, "glu_embed_count": text.inner}
    sizes |= {"layer_count": text.layers, "device": "cpu"}
    encoder = DalleBartEncoder(text_vocab_count=text.vocabulary, text_token_count=text.length, **sizes)
    decoder = DalleBartDecoder(image_vocab_count=image.vocabulary, **sizes)
    detokenizer = VQGanDetokenizer()
    networks = {"encoder.pt": encoder, "decoder.pt": decoder, "detoker.pt": detokenizer}
    for name, network in networks.items():
        network.load_state_dict(torch.load(folder / name, mmap=True))
        network.eval()
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    ids, _ = ByteTokenizer(vocabulary, ())(["", PROMPT], text.length)
    size = float(sum(p.numel() * p.element_size() for each in networks.values() for p in each.parameters()))

    def run() -> list[int]:
        state, mask = encoder(ids), ids.not_equal(1)[:, None, None, :]
        kept = torch.zeros(image.layers, 4, 256, image.width)
        tokens = torch.full((1, args.tokens + 1), card.start)
        settings = torch.tensor([1.0, 1.0, 16.0])
        for i in range(args.tokens):
            tokens[:, i + 1], kept = decoder.sample_tokens(
                settings=settings,
                attention_mask=mask,
                encoder_state=state,
                attention_state=kept,
                prev_tokens=tokens[:, [i]],
                token_index=torch.tensor([i]),
            )
        if args.tokens == 256:
            detokenizer(False, tokens[:, 1:])
        return tokens[0, 1:].tolist()

    return run, size


def child(who: str, args: argparse.Namespace) -> None:
    """Run in a process of its own: prepare, run, and print the figures of the run."""
    settle(args)
    make = run_min_dalle if who == "min-dalle" else lambda folder, args: run_ldm(who, folder, args)
    run, size = make(args.folder, args)
    forget()
    read = time.process_time if args.clock == "cpu" else time.perf_counter
    begin = read()
    tokens = run()
    print(json.dumps({"seconds": read() - begin, "peak": peak(), "size": size / 1e9, "tokens": tokens}))


def main() -> None:
    made = parser(__doc__.splitlines()[0], repeats=1)
    made.add_argument("--card", default="dalle-mini", help="dalle-mini or dalle-mega")
    made.add_argument("--tokens", type=int, default=256, help="tokens of the image; fewer are not decoded")
    made.add_argument("--sides", nargs="+", default=[*SIDES, "min-dalle"], help="which sides run")
    made.add_argument("--folder", type=Path, help="where the files are written (default: a temporary folder)")
    made.add_argument("--child", help=argparse.SUPPRESS)
    add_quick(made, tokens=12, repeats=1)
    args = made.parse_args()
    if args.child:
        child(args.child, args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not all((folder / name).is_file() for name in (*FILES.values(), "vocab.json", "merges.txt")):
            write_files(folder, args.card)
        found: dict[str, list[dict[str, Any]]] = {who: [] for who in args.sides}
        for _ in range(args.repeats):
            for who in args.sides:
                found[who].append(in_child(__file__, who, folder))
    seconds = {who: [run["seconds"] for run in runs] for who, runs in found.items()}
    first = next(iter(found.values()))[0]["tokens"]
    extra: dict[str, Any] = {
        f"{who}: peak memory / size of its weights": runs[0]["peak"] / runs[0]["size"]
        for who, runs in found.items()
    }
    extra |= {f"{who}: peak in GB": runs[0]["peak"] for who, runs in found.items()}
    extra |= {
        f"{who}: same tokens": sum(map(int.__eq__, runs[0]["tokens"], first)) for who, runs in found.items()
    }
    settings = {"card": args.card, "tokens": args.tokens}
    report("one image of DALL·E Mini", settings, seconds, args, bars={"min-dalle": 0.5}, extra=extra)


if __name__ == "__main__":
    main()
