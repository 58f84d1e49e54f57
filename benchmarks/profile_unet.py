"""Profile one evaluation of a UNet, and compare each operator with the machine's ceiling.

    python benchmarks/profile_unet.py                      # with ldm.optimize
    python benchmarks/profile_unet.py --plain              # without
    python benchmarks/profile_unet.py --model small --latent 16 --repeats 2 --ceiling 1024

The ceilings are measured in the same run: a product of two square matrices, and a 3×3 convolution 320→320 on
2×64×64. "Ideal" is the time of the products at the ceilings' rates, with everything else free; a folded
upsampling counts 4/9 of the 3×3 convolution's products.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from common import DTYPES, measure, parser, settle, where, write
from pairs import MODELS, unet_inputs, unets
from torch import nn

import ldm
from ldm.models.layers.attention import Attention
from ldm.models.layers.resblock import ResBlock, Upsample
from ldm.models.layers.transformer import GEGLU

CONVOLUTIONS = ("convolution 3×3", "convolution 1×1", "upsampling")


class Clock:
    """Seconds and operations by kind of operator; operators inside a timed operator are not counted again."""

    def __init__(self, read: Any) -> None:
        self.read, self.depth = read, 0
        self.rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])

    def wrap(self, fn: Any, kind: str, describe: Any) -> Any:
        """Return the function with timing; `describe` maps (arguments, result) to (shape, operations)."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            begin = self.read()
            result = fn(*args, **kwargs)
            seconds = self.read() - begin
            self.depth -= 1
            if not self.depth:
                shape, operations = describe(args, result)
                row = self.rows[kind, shape]
                row[0], row[1], row[2] = row[0] + 1, row[1] + seconds, row[2] + operations
            return result

        return timed

    def watch(self, net: nn.Module) -> None:
        """Time every operator of a network."""
        for part in net.modules():
            if isinstance(part, Attention):
                part.product = self.wrap(
                    part.product, "cross-attention" if part.cross else "self-attention", _attention
                )
            elif isinstance(part, GEGLU | Upsample):
                kind = "linear" if isinstance(part, GEGLU) else "upsampling"
                part.forward = self.wrap(
                    part.forward, kind, _of(part.proj if isinstance(part, GEGLU) else part.conv, part)
                )
            elif isinstance(part, nn.Conv2d):
                part.forward = self.wrap(
                    part.forward, f"convolution {part.kernel_size[0]}×{part.kernel_size[1]}", _of(part, part)
                )
            elif isinstance(part, nn.Linear):
                part.forward = self.wrap(part.forward, "linear", _of(part, part))
            elif isinstance(part, nn.GroupNorm | nn.LayerNorm):
                part.forward = self.wrap(
                    part.forward,
                    type(part).__name__.removeprefix("Fast"),
                    lambda args, y: (str(tuple(y.shape)), 0.0),
                )
            elif isinstance(part, ResBlock) and hasattr(part, "ops") and not isinstance(part.ops, _Timed):
                part.ops = _Timed(part.ops, self)


class _Timed:
    """The operators of a residual block with timing."""

    def __init__(self, ops: Any, clock: Clock) -> None:
        self.group_norm = clock.wrap(
            ops.group_norm, "GroupNorm with SiLU", lambda args, y: (str(tuple(y.shape)), 0.0)
        )


def _attention(args: Any, result: Any) -> tuple[str, float]:
    q, k = args[0], args[1]
    return f"{tuple(q.shape)} × {k.shape[2]}", 4.0 * q.numel() * k.shape[2]


def _of(layer: nn.Linear | nn.Conv2d, part: nn.Module) -> Any:
    def describe(args: Any, y: Any) -> tuple[str, float]:
        if isinstance(layer, nn.Linear):
            return (
                f"{args[0].numel() // layer.in_features} × {layer.in_features} → {layer.out_features}",
                2.0 * args[0].numel() * layer.out_features,
            )
        area = (
            layer.kernel_size[0]
            * layer.kernel_size[1]
            * (4 / 9 if hasattr(part, "folded") and part.folded else 1)
        )
        size = "×".join(map(str, y.shape[2:]))
        return (
            f"{layer.in_channels} → {layer.out_channels}, {len(y)}×{size}",
            2.0 * y.numel() * layer.in_channels * area,
        )

    return describe


def ceilings(dtype: torch.dtype, side: int, args: Any) -> dict[str, float]:
    """Return the GFLOP/s of a matrix product and of a convolution, channels last."""
    a, b = torch.randn(2, side, side).to(dtype)
    x = torch.randn(2, 320, 64, 64).to(dtype).to(memory_format=torch.channels_last)
    w = torch.randn(320, 320, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    seconds = measure(
        {"product": lambda: a @ b, "convolution": lambda: F.conv2d(x, w, padding=1)}, args.repeats, args.clock
    )
    work = {"product": 2.0 * side**3, "convolution": 2.0 * 9 * 320 * x.numel()}
    return {name: work[name] / min(runs) / 1e9 for name, runs in seconds.items()}


def main() -> None:
    options = parser(__doc__.splitlines()[0], repeats=3)
    options.add_argument("--model", choices=MODELS, default="sd1")
    options.add_argument("--dtype", choices=DTYPES, default="bf16")
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--latent", type=int, default=64)
    options.add_argument("--plain", action="store_true", help="without ldm.optimize")
    options.add_argument("--no-kernels", action="store_true")
    options.add_argument(
        "--ceiling", type=int, default=4096, help="side of the matrices that measure the ceiling"
    )
    options.add_argument("--rows", type=int, default=25, help="number of shapes to list, slowest first")
    args = options.parse_args()
    settle(args)
    dtype = DTYPES[args.dtype]
    net, _ = unets(args.model, dtype)
    if not args.plain:
        ldm.optimize(net, kernels=not args.no_kernels)
    given, _ = unet_inputs(net, args.batch, args.latent, 77, dtype)
    top = ceilings(dtype, args.ceiling, args)
    net(*given)
    read = time.process_time if args.clock == "cpu" else time.perf_counter
    clock, totals = Clock(read), []
    clock.watch(net)
    for _ in range(args.repeats):
        begin = read()
        net(*given)
        totals.append(read() - begin)
    result = summary(clock, statistics.mean(totals), args.repeats, top)
    show(result, args.rows)
    if args.json:
        write(
            args.json,
            {
                "question": "profile",
                "settings": vars(args) | {"json": None},
                **result,
                "where": where(args.threads),
            },
        )


def summary(clock: Clock, total: float, repeats: int, top: dict[str, float]) -> dict[str, Any]:
    """Return rows by shape and by kind, per run, and the share of the ceiling over all."""
    rows = []
    for (kind, shape), (calls, seconds, work) in clock.rows.items():
        ceiling = top["convolution" if kind in CONVOLUTIONS else "product"]
        rate = work / seconds / 1e9
        rows.append(
            {
                "kind": kind,
                "shape": shape,
                "calls": calls / repeats,
                "seconds": seconds / repeats,
                "gflops": rate,
                "share": rate / ceiling,
                "ideal": work / repeats / ceiling / 1e9,
            }
        )
    rows.sort(key=lambda row: -row["seconds"])
    kinds = {
        kind: {
            key: sum(row[key] for row in rows if row["kind"] == kind) for key in ("calls", "seconds", "ideal")
        }
        for kind in dict.fromkeys(row["kind"] for row in rows)
    }
    kinds["everything else"] = {
        "calls": 0,
        "seconds": total - sum(row["seconds"] for row in rows),
        "ideal": 0.0,
    }
    return {
        "ceilings": top,
        "total": total,
        "ideal": sum(row["ideal"] for row in rows),
        "kinds": kinds,
        "rows": rows,
    }


def show(result: dict[str, Any], rows: int) -> None:
    """Print the tables."""
    print("ceilings: " + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in result["ceilings"].items()))
    print(f"{'operator':<22} {'calls':>6} {'ms':>9} {'of all':>7} {'of its ceiling':>15}")
    for kind, row in sorted(result["kinds"].items(), key=lambda item: -item[1]["seconds"]):
        share = f"{row['ideal'] / row['seconds']:.0%}" if row["ideal"] else ""
        print(
            f"{kind:<22} {row['calls']:>6.0f} {1e3 * row['seconds']:>9.1f}"
            f" {row['seconds'] / result['total']:>7.1%} {share:>15}"
        )
    print(
        f"{'all':<22} {'':>6} {1e3 * result['total']:>9.1f} {'':>7}"
        f" {result['ideal'] / result['total']:>15.0%}   (bar: at least 80 %)"
    )
    for row in result["rows"][:rows]:
        rate = f"{row['gflops']:7.0f} GFLOP/s {row['share']:5.0%}" if row["gflops"] else ""
        print(
            f"  {row['kind']:<22} {row['shape']:<34} {row['calls']:4.0f} ×"
            f" {1e3 * row['seconds'] / row['calls']:8.2f} ms {rate}"
        )


if __name__ == "__main__":
    main()
