"""Measure the error and the time of the approximations against the exact run.

    # the embedded model: whole images
    python benchmarks/approximate.py --clock cpu --threads 1 --json approximate.json
    # random weights: time, and the error of the final latent
    python benchmarks/approximate.py --model sd1 --latent 32 --steps 6

The error is the RMS difference from the exact run with the same seeds: for images in levels of 255, for
latents relative to their standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from common import DTYPES, difference, measure, parser, settle, where, write
from pairs import MODELS
from showcase import NAMES
from torch import Tensor

import ldm
from ldm.catalog.shapes import UNETS
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import cfg
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.unet import UNetConfig
from ldm.samplers import SAMPLERS
from ldm.weights.parts import build_network, randomise

INTERVAL = (0.28, 5.42)  # of sigma/alpha, Kynkäänniemi et al. 2024's for SDXL
GAINS: dict[str, dict[str, Any]] = {
    "exact": {},
    "reuse=2": {"reuse": 2},
    "reuse=3": {"reuse": 3},
    "reuse=5": {"reuse": 5},
    "reuse=3, branch=2": {"reuse": 3, "branch": 2},
    "preset=fast": {"preset": "fast"},
    "preset=fastest": {"preset": "fastest"},
    "merge=0.25": {"merge": 0.25},
    "merge=0.5": {"merge": 0.5},
    "merge=0.75": {"merge": 0.75},
    "int8": {"int8": True},
    "reuse=3, merge=0.5, int8": {"reuse": 3, "merge": 0.5, "int8": True},
    "interval=(0.28, 5.42)": {"interval": INTERVAL},
}
OF_TRANSFORMERS = [
    name for name, options in GAINS.items() if options.keys() <= {"reuse", "branch"} or name == "preset=fast"
]
Run = Callable[[], Tensor]


def emoji(args: Any) -> Callable[[Mapping[str, Any]], Run]:
    """Return the runs of emoji-ldm, a diffusion transformer: the first prompts of the showcase."""
    pipe = ldm.load("emoji-ldm", device="cpu", dtype=args.dtype)

    def side(options: Mapping[str, Any]) -> Run:
        ldm.optimize(pipe, **options)
        return lambda: pipe.text_to_image(NAMES[: args.batch], steps=args.steps, progress=False).tensor

    return side


def random_weights(args: Any) -> Callable[[Mapping[str, Any]], Run]:
    """Return the runs of a UNet with random weights: the final latent of DDIM with guidance."""
    config = (
        UNetConfig(channels=(320, 640), depth=(1, 1), blocks=1)
        if args.model == "small"
        else UNETS[args.model]
    )
    net, g = randomise(build_network(config), dtype=DTYPES[args.dtype]), torch.Generator().manual_seed(0)
    denoiser = Denoiser(net, NoiseSchedule.scaled_linear(1000, 0.00085, 0.012), "eps")
    x = torch.randn(args.batch, config.in_channels, args.latent, args.latent, generator=g)
    pair = [Cond(context=torch.randn(args.batch, 77, config.context_dim, generator=g)) for _ in range(2)]
    grid = TimeGrid.make(denoiser.schedule, args.steps or 6)

    def side(options: Mapping[str, Any]) -> Run:
        options = dict(options)
        fn = cfg(denoiser, *pair, 2.0, interval=options.pop("interval", None))
        ldm.optimize(net, **options)
        return lambda: SAMPLERS["ddim"](fn, x, grid)

    return side


def main() -> None:
    options = parser(__doc__.splitlines()[0], repeats=3)
    options.add_argument(
        "--model", choices=("emoji", *(name for name in MODELS if name != "sdxl")), default="emoji"
    )
    options.add_argument("--dtype", choices=DTYPES, default="bf16")
    options.add_argument(
        "--batch",
        type=int,
        default=1,
        help="images per call; the embedded model uses the first prompts of showcase.py",
    )
    options.add_argument("--latent", type=int, default=32, help="side of the latent with random weights")
    options.add_argument(
        "--steps", type=int, help="sampling steps (default: the card's; 6 with random weights)"
    )
    options.add_argument(
        "--only", nargs="+", choices=GAINS, help="only these approximations (default: all that apply)"
    )
    args = options.parse_args()
    args.only = args.only or (OF_TRANSFORMERS if args.model == "emoji" else list(GAINS))
    settle(args)
    side = (emoji if args.model == "emoji" else random_weights)(args)
    exact = side({})
    expected, rows = exact(), []
    print(
        f"{args.model}, {args.dtype}, batch {args.batch}, {args.threads} threads, {args.clock} clock, torch"
        f" {torch.__version__}"
    )
    for name in args.only:
        if name == "exact":
            continue
        rows.append({"gain": name, **against(side, GAINS[name], expected, args)})
        print("| `{gain}` | {error:.3g} | {seconds:.3f} s | {ratio:.2f} |".format(**rows[-1]), flush=True)
    if args.json:
        about = {key: str(value) if key == "json" else value for key, value in vars(args).items()}
        write(
            args.json,
            {"question": "approximate", "settings": about, "rows": rows, "where": where(args.threads)},
        )


def against(
    side: Callable[[Mapping[str, Any]], Run], options: Mapping[str, Any], expected: Tensor, args: Any
) -> dict[str, float]:
    """Return the error of an approximation, its seconds and the exact run's, and their ratio.

    Seconds are the best of several runs, measured next to each other.
    """
    exact = min(measure({"exact": side({})}, args.repeats, args.clock)["exact"])
    run = side(options)
    got = run()
    error = (
        float((got - expected).square().mean().sqrt() * 255)
        if args.model == "emoji"
        else difference(got, expected)
    )
    seconds = min(measure({"gain": run}, args.repeats, args.clock)["gain"])
    return {"error": error, "seconds": seconds, "exact": exact, "ratio": seconds / exact}


if __name__ == "__main__":
    main()
