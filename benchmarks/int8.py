"""Measure single products of Stable Diffusion 1's UNet in 8 bits, rounding included, against packed bf16.

python benchmarks/int8.py --clock cpu --threads 1
"""

from __future__ import annotations

import torch
from common import measure, parser, settle
from torch import nn

from ldm.speed.int8 import Int8, quantise
from ldm.speed.packed import PackedConv2d, PackedLinear
from ldm.speed.substitute import restore

SHAPES = {
    "convolution 320→320, 2×64²": (nn.Conv2d, (320, 320, 3), (2, 320, 64, 64)),
    "convolution 1280→1280, 2×16²": (nn.Conv2d, (1280, 1280, 3), (2, 1280, 16, 16)),
    "linear 320→320, 8192": (nn.Linear, (320, 320), (8192, 320)),
    "linear 2560→640, 2048": (nn.Linear, (2560, 640), (2048, 2560)),
}


def main() -> None:
    args = parser(__doc__.splitlines()[0], repeats=3).parse_args()
    settle(args)
    for name, (kind, sizes, shape) in SHAPES.items():
        layer = (
            kind(*sizes, **({"padding": 1} if kind is nn.Conv2d else {}))
            .to(torch.bfloat16)
            .requires_grad_(False)
        )
        layer.__class__ = PackedConv2d if kind is nn.Conv2d else PackedLinear
        x = torch.randn(shape, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last) if kind is nn.Conv2d else x
        seconds = measure({"bf16": lambda layer=layer, x=x: layer(x)}, args.repeats, args.clock)
        Int8(layer)
        layer(x)
        seconds |= measure(
            {"int8": lambda layer=layer, x=x: layer(x), "rounding": lambda x=x: quantise(x)},
            args.repeats,
            args.clock,
        )
        restore(layer)
        print(
            f"{name}: " + ", ".join(f"{who} {1e3 * min(runs):.2f} ms" for who, runs in seconds.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
