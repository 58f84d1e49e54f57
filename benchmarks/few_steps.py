"""Measure what one image takes at few steps, and which part of it is not the denoiser's.

    python benchmarks/few_steps.py --threads 1 --clock cpu

Each figure is the least of several calls of a loaded model. What is left without the denoiser and the decoder
is the text, the layout and the call.
"""

from __future__ import annotations

from functools import partial

import torch
from common import add_quick, measure, parser, settle

import ldm

PROMPT = "a blue cat face to the left of a rocket"
BAR = 0.25  # of the time of ten steps of the first model, at two of the last


def split(milliseconds: dict[int, float], decoder: float) -> list[tuple[float, ...]]:
    """Return for each number of steps the time, and what of it are denoiser, decoder and all else.

    An evaluation of the denoiser takes the slope between the most and the fewest steps.

    Args:
        milliseconds: Time of a call for each number of steps, two or more.
        decoder: Time of decoding.
    """
    most, fewest = max(milliseconds), min(milliseconds)
    evaluation = (milliseconds[most] - milliseconds[fewest]) / (most - fewest)
    return [
        (spent, steps * evaluation, decoder, spent - steps * evaluation - decoder)
        for steps, spent in milliseconds.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print a row for each model and number of steps."""
    made = parser("Measure what one image takes at few steps.", repeats=30)
    made.add_argument("--model", nargs="+", default=["emoji-ldm", "emoji-ldm-turbo"], help="names or folders")
    made.add_argument("--prompt", default=PROMPT, help="prompt")
    made.add_argument("--steps", type=int, nargs="+", default=[10, 4, 2, 1], help="numbers of steps")
    add_quick(made, repeats=2)
    args = made.parse_args(arguments)
    if args.repeats < 1 or len(set(args.steps)) < 2 or min(args.steps) < 1:
        made.error("--repeats must be at least 1, and --steps two numbers or more of at least 1")
    settle(args)
    pipes = {name: ldm.load(name, device="cpu") for name in args.model}
    sides = {}
    for name, pipe in pipes.items():
        for steps in args.steps:
            sides[f"{name} {steps}"] = partial(pipe.text_to_image, args.prompt, steps=steps, progress=False)
        latent = torch.randn(pipe.stage.shape(pipe.settle(args.prompt)), generator=torch.Generator())[None]
        sides[f"{name} decoder"] = partial(pipe.decode, latent)
    least = {who: 1000 * min(runs) for who, runs in measure(sides, args.repeats, args.clock).items()}
    whole = least[f"{args.model[0]} {max(args.steps)}"]
    print(
        "| model | steps | ms | denoiser | decoder | text, layout, call | of the first model's most steps |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in args.model:
        times = {steps: least[f"{name} {steps}"] for steps in args.steps}
        for steps, row in zip(times, split(times, least[f"{name} decoder"]), strict=True):
            cells = " | ".join(f"{value:.1f}" for value in row)
            print(f"| {name} | {steps} | {cells} | {row[0] / whole:.3f} |")
    where = f"{pipes[args.model[0]].dtype}, {args.threads} threads, {args.clock} time"
    print(f"\nbar: {BAR} of ten steps of the first model at two of the last; {where}")


if __name__ == "__main__":
    main()
