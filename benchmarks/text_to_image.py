"""Measure a whole call, from prompt to image, against diffusers with the same random weights.

python benchmarks/text_to_image.py --json text-to-image.json
python benchmarks/text_to_image.py --size 128 --steps 2 --repeats 1
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, add_quick, bar_here, measure, parser, report, settle
from load import name_of

import ldm

PROMPT, NEGATIVE = "a photograph of an astronaut riding a horse", "blurry"


def prepare(folder: Path, card: str, dtype: str) -> Path:
    """Return a diffusers folder with random weights; create it if it is missing."""
    card = name_of(card)
    path = folder / f"{card}-{dtype}"
    if not (path / "model_index.json").is_file():
        ldm.save(ldm.load(card, weights="random", device="cpu", dtype=dtype), path, layout="diffusers")
    return path


def ours(path: Path, card: str, dtype: str, *, memory: bool = False) -> Any:
    """Return ldm's pipeline, optimised."""
    return ldm.optimize(ldm.load(name_of(card), weights=path, device="cpu", dtype=dtype), memory=memory)


def theirs(path: Path, dtype: str) -> Any:
    """Return diffusers' pipeline with DPM++ 2M."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        path, torch_dtype=DTYPES[dtype], safety_checker=None, local_files_only=True
    )
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, who: str, size: int, steps: int, guidance: float) -> Any:
    """Call one side's pipeline."""
    options = {"height": size, "width": size}
    if who == "ldm":
        return pipe.text_to_image(
            PROMPT,
            negative=NEGATIVE,
            steps=steps,
            guidance=guidance,
            sampler="dpmpp_2m",
            progress=False,
            **options,
        )
    generator = torch.Generator().manual_seed(0)
    return pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator,
        **options,
    )


def options(description: str, repeats: int) -> Any:
    """Return the parser with the options shared by the benchmarks of a whole call."""
    made = parser(description, repeats=repeats)
    made.add_argument(
        "--card", default="sd-v1-5", help="a card of Stable Diffusion 1's family, or its YAML file"
    )
    made.add_argument("--dtype", choices=DTYPES, default="bf16")
    made.add_argument("--size", type=int, default=512)
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--guidance", type=float, default=7.5)
    made.add_argument(
        "--folder", type=Path, help="folder to keep the weights in, 2 GB (default: a temporary folder)"
    )
    add_quick(made, size=128, steps=2, repeats=1)
    return made


def main() -> None:
    args = options(__doc__.splitlines()[0], 3).parse_args()
    settle(args)
    with tempfile.TemporaryDirectory() as temporary:
        path = prepare(args.folder or Path(temporary), args.card, args.dtype)
        pipes = {"ldm": ours(path, args.card, args.dtype), "diffusers": theirs(path, args.dtype)}
        sides = {
            who: lambda who=who, pipe=pipe: call(pipe, who, args.size, args.steps, args.guidance)
            for who, pipe in pipes.items()
        }
        seconds = measure(sides, args.repeats, args.clock)
    settings = {
        "card": args.card,
        "dtype": args.dtype,
        "size": args.size,
        "steps": args.steps,
        "guidance": args.guidance,
    }
    report("text to image", settings, seconds, args, bars={"diffusers": bar_here(avx512=0.64, avx2=0.72)})


if __name__ == "__main__":
    main()
