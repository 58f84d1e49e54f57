"""Measure decoding a latent against diffusers (default memory format) and OpenVINO with the same weights.

python benchmarks/vae.py --size 512 --dtype bf16 --json vae.json
"""

from __future__ import annotations

import torch
from common import DTYPES, bar_here, difference, measure, parser, report, settle
from pairs import openvino_module, vaes

import ldm


class _Decode(torch.nn.Module):
    """The decoder of a peer alone, for OpenVINO."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(z).sample


def main() -> None:
    options = parser(__doc__.splitlines()[0], repeats=5)
    options.add_argument("--size", type=int, default=512, help="side of the image")
    options.add_argument("--dtype", choices=DTYPES, default="bf16")
    options.add_argument("--small", action="store_true", help="a quarter of the channels, for a quick look")
    options.add_argument("--no-openvino", action="store_true")
    args = options.parse_args()
    settle(args)
    dtype = DTYPES[args.dtype]
    ours, theirs = vaes("small" if args.small else "kl-f8", dtype)
    z = torch.randn(1, 4, args.size // 8, args.size // 8, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )
    sides = {"ldm": lambda: ours.decode(z), "diffusers": lambda: theirs.decode(z).sample}
    compiled = None if args.no_openvino else openvino_module(_Decode(theirs), {"z": z}, dtype, args.threads)
    if compiled is not None:
        sides["openvino"] = compiled
    ldm.optimize(ours)
    wrong = difference(sides["ldm"](), sides["diffusers"]())
    seconds = measure(sides, args.repeats, args.clock)
    settings = {"size": args.size, "dtype": args.dtype, "small": args.small}
    extra = {"difference from diffusers (RMS / standard deviation)": wrong}
    bars = {"diffusers": bar_here(avx512=0.60, avx2=0.65)}
    report("VAE decode", settings, seconds, args, bars=bars, extra=extra)


if __name__ == "__main__":
    main()
