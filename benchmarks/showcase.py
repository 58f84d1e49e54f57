"""The pictures of the README: ``python benchmarks/showcase.py -o samples.png`` asks the embedded model for 32 prompts, seeds 0 to 31."""

from __future__ import annotations

import argparse
from pathlib import Path

import ldm

PROMPTS = (
    "red apple", "cat face", "snowman", "rocket", "grinning face", "guitar", "sunflower", "fire engine",
    "cat face on a blue background", "snowman on a purple background", "rocket on a black background", "a pizza on a green background",
    "unicorn on a pink background", "octopus on a yellow background", "bicycle on an orange background", "ghost on a gray background",
    "fluent red apple", "fluent cat face", "fluent rocket", "fluent guitar",
    "twemoji red apple", "twemoji cat face", "twemoji rocket", "twemoji guitar",
    "a kitty", "a small red apple on the left", "a small ghost in the top right corner on a blue background", "a snowman and a rocket side by side",
    "a dragon", "castle", "avocado", "a whale on a blue background",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A sheet of prompts, eight a row.")
    parser.add_argument("-o", "--output", type=Path, default=Path("samples.png"))
    parser.add_argument("--model", default="emoji-ldm")
    parser.add_argument("--weights", default=None, help="weights in place of the model's own")
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--steps", type=int, default=None)
    options = parser.parse_args(arguments)
    pipe = ldm.load(options.model, weights=options.weights)
    images = pipe.text_to_image(PROMPTS, seed=0, guidance=options.guidance, steps=options.steps)
    images.grid(columns=8).save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
