"""Measure how time and peak memory grow with image size and batch, for ldm and for diffusers.

    python benchmarks/scaling.py --json scaling.json
    python benchmarks/scaling.py --model small --sizes 128 256 --batches 1 2 --repeats 1

A row is one evaluation of the UNet, or one decoding; memory is what the run adds to the resident memory. The
exponent is the slope of a straight line through the logarithms of time or memory over the number of pixels,
or over the batch size; 1 means proportional.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
from typing import Any

import torch
from common import DTYPES, add_quick, measure, parser, settle, where, write
from memory import forget, peak
from pairs import MODELS, unet_inputs, unets, vaes

import ldm


def slope(x: list[float], y: list[float]) -> float:
    """Return the exponent p of y ≈ c·x^p, by least squares of the logarithms."""
    a, b = [math.log(v) for v in x], [math.log(max(v, 1e-9)) for v in y]
    mean = statistics.mean(a)
    return sum((u - mean) * v for u, v in zip(a, b, strict=True)) / sum((u - mean) ** 2 for u in a)


def resident() -> float:
    """Return the current resident memory in GB."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * 4096 / 1e9


def one(run: Any, args: Any) -> dict[str, float]:
    """Return the median seconds and the memory in GB that a run adds at its peak.

    Memory that the allocator kept from earlier runs is returned to the system first.
    """
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    forget()
    run()
    added = peak() - before
    return {
        "seconds": statistics.median(measure({"it": run}, args.repeats, args.clock)["it"]),
        "memory": added,
    }


def main() -> None:
    options = parser(__doc__.splitlines()[0], repeats=2)
    options.add_argument("--model", choices=MODELS, default="sd1")
    options.add_argument("--dtype", choices=DTYPES, default="bf16")
    options.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 768, 1024, 1536, 2048])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    options.add_argument("--batch-size", type=int, default=256, help="size of the images in a batch")
    add_quick(
        options, model="small", dtype="fp32", sizes=[128, 256], batches=[1, 2], batch_size=128, repeats=1
    )
    args = options.parse_args()
    settle(args)
    dtype = DTYPES[args.dtype]
    small = "small" if args.model == "small" else "kl-f8"
    mine, theirs = unets(args.model, dtype)
    vae, peer_vae = vaes(small, dtype)
    ldm.optimize(mine), ldm.optimize(vae, memory=True)

    def unet_runs(size: int, batch: int) -> dict[str, Any]:
        given, named = unet_inputs(mine, batch, size // 8, 77, dtype)
        return {"ldm": lambda: mine(*given), "diffusers": lambda: theirs(**named)}

    def vae_runs(size: int, batch: int) -> dict[str, Any]:
        z = torch.randn(batch, 4, size // 8, size // 8).to(dtype)
        return {"ldm": lambda: vae.decode(z), "diffusers": lambda: peer_vae.decode(z)}

    series = [
        (f"{name}, size", runs, [(size, 1, size * size) for size in args.sizes])
        for name, runs in (("unet", unet_runs), ("decode", vae_runs))
    ]
    series.append(("unet, batch", unet_runs, [(args.batch_size, batch, batch) for batch in args.batches]))
    result: dict[str, Any] = {}
    for name, runs, points in series:
        rows: dict[str, list[dict[str, float]]] = {"ldm": [], "diffusers": []}
        for size, batch, x in points:
            for who, run in runs(size, batch).items():
                rows[who].append({"size": size, "batch": batch, "x": x, **one(run, args)})
                print(
                    f"{name:<14} {who:<10} size {size:>5} batch {batch:>3} {rows[who][-1]['seconds']:9.3f} s"
                    f" {rows[who][-1]['memory']:7.3f} GB"
                )
        xs = [row["x"] for row in rows["ldm"]]
        exponents = {
            who: {key: slope(xs, [row[key] for row in side]) for key in ("seconds", "memory")}
            for who, side in rows.items()
        }
        for who, exponent in exponents.items():
            print(
                f"{name:<14} {who:<10} time ~ x^{exponent['seconds']:.2f}, memory ~"
                f" x^{exponent['memory']:.2f}"
            )
        result[name] = {"rows": rows, "exponents": exponents}
    if args.json:
        write(
            args.json,
            {
                "question": "scaling",
                "settings": {"model": args.model, "dtype": args.dtype},
                **result,
                "where": where(args.threads),
            },
        )


if __name__ == "__main__":
    main()
