"""Measure one UNet evaluation against diffusers and OpenVINO with the same weights and inputs.

python benchmarks/unet.py --dtype bf16 --json unet-bf16.json
python benchmarks/unet.py --model sdxl --batch 1 --latent 128 --repeats 3
"""

from __future__ import annotations

import copy

from common import DTYPES, bar_here, difference, measure, parser, report, settle
from pairs import MODELS, openvino_module, unet_inputs, unets

import ldm
from ldm.speed.backends import BACKENDS

BARS = {
    "bf16": {"diffusers": 0.62, "openvino": 0.85},
    "fp32": {"diffusers": bar_here(avx512=0.65, avx2=0.70), "openvino": bar_here(avx512=0.82, avx2=0.88)},
    "sdxl": {"diffusers": 0.80},
}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", choices=MODELS, default="sd1", help="the UNet's shape")
    options.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of weights and inputs on every side"
    )
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--latent", type=int, default=64, help="side of the latent")
    options.add_argument("--tokens", type=int, default=77)
    options.add_argument(
        "--also",
        nargs="*",
        choices=("plain", *BACKENDS),
        default=[],
        help="also measure ldm's UNet without ldm.optimize, or by a backend",
    )
    options.add_argument("--no-kernels", action="store_true", help="ldm.optimize without compiled kernels")
    options.add_argument("--no-openvino", action="store_true")
    args = options.parse_args()
    settle(args)
    dtype = DTYPES[args.dtype]
    ours, theirs = unets(args.model, dtype)
    given, named = unet_inputs(ours, args.batch, args.latent, args.tokens, dtype)
    sides = {"ldm": lambda: ours(*given), "diffusers": lambda: theirs(**named).sample}
    for how in args.also:
        other = copy.deepcopy(ours) if how == "plain" else ldm.optimize(copy.deepcopy(ours), backend=how)
        sides[f"ldm, {how}"] = lambda other=other: other(*given)
    ldm.optimize(ours, kernels=not args.no_kernels)
    compiled = (
        None
        if args.no_openvino or args.model == "sdxl"
        else openvino_module(theirs, named, dtype, args.threads)
    )
    if compiled is not None:
        sides["openvino"] = compiled
    wrong = difference(sides["ldm"](), sides["diffusers"]())
    seconds = measure(sides, args.repeats, args.clock)
    settings = {
        "model": args.model,
        "dtype": args.dtype,
        "batch": args.batch,
        "latent": args.latent,
        "tokens": args.tokens,
    }
    extra = {
        "difference from diffusers (RMS / standard deviation)": wrong,
        "optimizations": "; ".join(ours.optimizations),
    }
    report(
        "UNet",
        settings,
        seconds,
        args,
        bars=BARS["sdxl" if args.model == "sdxl" else args.dtype],
        extra=extra,
    )


if __name__ == "__main__":
    main()
