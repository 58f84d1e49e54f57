"""Measure the accuracy of the samplers against their cost, on an oracle and on models.

    python benchmarks/solvers.py --part oracle
    python benchmarks/solvers.py --part images

On an oracle: errors against the exact flow of a Gaussian mixture by grid and number of steps, asymptotic
slopes, and the biases of the stochastic samplers. On models: the distance to the 1,000-step image against
evaluations, for each sampler, and for the default sampler on each spacing; and the default that follows.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import solver_images
import solver_oracle
import torch
from common import add_quick

import ldm
from ldm.diffusion.schedule import SCHEDULE_NAMES
from ldm.diffusion.spacings import SPACINGS
from ldm.samplers import SAMPLERS
from ldm.support.config import nearest
from ldm.support.files import write_atomically

PROMPTS = (
    "red apple",
    "cat face",
    "rocket on a blue background",
    "fluent fire engine",
    "pizza on a yellow background",
    "twemoji rose",
    "snowman on a black background",
    "fluent octopus on a green background",
)


def oracle(options: argparse.Namespace) -> dict[str, Any]:
    """Print the tables of the first part and return their rows."""
    result: dict[str, Any] = {"deterministic": [], "stochastic": []}
    for schedule in options.schedules:
        rows = solver_oracle.deterministic_rows(schedule, options.oracle_steps, options.samplers)
        if rows:
            print(f"\nRoot mean square error against the exact flow, schedule {schedule}:\n")
            print(solver_oracle.deterministic_table(rows, options.oracle_steps))
        result["deterministic"] += rows
    if options.samples:
        result["stochastic"] = solver_oracle.stochastic_rows(options.samples, options.samplers)
        print(f"\nStochastic samplers, in standard errors of {options.samples:,} samples:\n")
        print(solver_oracle.stochastic_table(result["stochastic"]))
    return result


def images(options: argparse.Namespace) -> dict[str, Any]:
    """Print the tables of the second part; return rows and recommendation of each model."""
    result = {}
    for model in options.models:
        pipe = ldm.load(model, dtype=options.dtype)
        bench = solver_images.Bench(
            pipe,
            options.prompts,
            options.seeds,
            batch=options.batch,
            guidance=options.guidance,
            reference_steps=options.reference_steps,
        )
        rows = solver_images.measure(
            bench,
            options.samplers or [*solver_images.FLOW, *solver_images.PATH],
            options.budgets,
            options.spacings,
        )
        chosen = solver_images.recommend(rows, options.tolerance)
        print(
            f"\n{model}: distance to the {bench.reference_steps}-step image, levels of 255, mean of"
            f" {len(bench.prompts)} images"
        )
        for kind, by in (("flow", "sampler"), ("path", "sampler"), ("spacing", "spacing")):
            if rows[kind]:
                print(f"\n{solver_images.table(rows[kind], options.budgets, by)}")
        print(f"\n{advice(pipe.card.defaults, rows, chosen, options.tolerance)}")
        result[model] = {
            "rows": rows,
            "recommended": chosen,
            "images": len(bench.prompts),
            "reference_steps": bench.reference_steps,
        }
    return result


def advice(
    defaults: Any, rows: dict[str, list[dict[str, Any]]], chosen: dict[str, Any] | None, tolerance: float
) -> str:
    """Return a sentence with the rule and its result."""
    rule = (
        f"Fewest evaluations at a mean distance of at most {tolerance:g} levels of 255 among the"
        " deterministic samplers"
    )
    if chosen is None:
        best = min([*rows["flow"], *rows["spacing"]], key=lambda row: row["distance"], default=None)
        nearest = (
            ""
            if best is None
            else f"; the nearest is {best['sampler']} with {best['steps']} steps, {best['distance']:.2f}"
        )
        return f"{rule}: none{nearest}."
    spacing = "" if chosen["spacing"] is None else f" on {chosen['spacing']}"
    return (
        f"{rule}: {chosen['sampler']}{spacing}, {chosen['steps']} steps, {chosen['evaluations']:.0f}"
        f" evaluations, {chosen['distance']:.2f} ± {chosen['error']:.2f}. The card's default is"
        f" {defaults.sampler}, {defaults.steps} steps."
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options; exit with a message for impossible ones."""
    parser = argparse.ArgumentParser(
        description="Measure the samplers' errors on an oracle, and their distance to the limit on a model."
    )
    add_oracle_options(parser)
    add_image_options(parser)
    add_quick(
        parser,
        oracle_steps=[20, 40, 80],
        samples=2000,
        budgets=[5, 10, 20],
        spacings=["trailing", "karras"],
        prompts=list(PROMPTS[:2]),
        seeds=1,
        reference_steps=200,
    )
    options = parser.parse_args(arguments)
    refuse(parser, options)
    return options


def add_oracle_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both parts and of the first."""
    parser.add_argument("--part", choices=("oracle", "images", "both"), default="both")
    parser.add_argument("--samplers", nargs="+", help="samplers to measure (default: all that have a limit)")
    parser.add_argument(
        "--schedules",
        nargs="+",
        choices=SCHEDULE_NAMES,
        default=["scaled_linear"],
        help="schedules of the oracle",
    )
    parser.add_argument(
        "--oracle-steps",
        nargs="+",
        type=int,
        default=list(solver_oracle.STEPS),
        help="numbers of steps, ascending (default: 20 … 640)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=20_000,
        help="samples of the stochastic table, 0 to skip it (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write every figure to this file")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the second part."""
    parser.add_argument("--models", nargs="+", default=["emoji-ldm"], help="models (default: emoji-ldm)")
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=int,
        default=[5, 8, 10, 15, 20, 30, 50],
        help="numbers of evaluations (default: 5 … 50)",
    )
    parser.add_argument(
        "--spacings",
        nargs="*",
        default=[s for s in SPACINGS if s != "exponential"],
        help="spacings for the default sampler (default: all)",
    )
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--seeds", type=int, default=2, help="images per prompt (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the card's)")
    parser.add_argument(
        "--reference-steps", type=int, default=1000, help="steps of the reference (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=4.0,
        help="largest distance of the recommendation, in levels of 255 (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=16, help="images per batch (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="dtype of the model (default: %(default)s, to exclude rounding)",
    )
    parser.add_argument(
        "--plot", type=Path, help="write a plot of the second part to this PNG (needs matplotlib)"
    )


def refuse(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with a message if the options cannot work."""
    for what, names, choices in (
        ("sampler", options.samplers or (), SAMPLERS),
        ("spacing", options.spacings, SPACINGS),
    ):
        for name in names:
            if name not in choices:
                parser.error(f"unknown {what} {name!r}; {nearest(name, choices)}")
    if (
        min(*options.budgets, *options.oracle_steps, options.seeds, options.batch, options.reference_steps)
        < 1
        or options.tolerance <= 0
    ):
        parser.error("budgets, steps, seeds, batch and tolerance must be positive")
    if sorted(set(options.oracle_steps)) != options.oracle_steps:
        parser.error("--oracle-steps must be ascending")
    options.budgets = sorted(set(options.budgets))
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"no such folder: {str(path.parent)!r}")
    if options.plot is not None and options.part == "oracle":
        parser.error("--plot shows the second part: --part images or both")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    start, report = time.perf_counter(), {}
    if options.part != "images":
        report["oracle"] = oracle(options)
    if options.part != "oracle":
        report["images"] = images(options)
    print(f"\n{torch.get_num_threads()} threads, {time.perf_counter() - start:.0f} s")
    if options.plot is not None:
        from solver_plot import plot

        plot(
            options.plot, {model: part["rows"] for model, part in report["images"].items()}, options.tolerance
        )
    if options.json is not None:
        report["settings"] = {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
        }
        versions = {"ldm": ldm.__version__, "torch": torch.__version__, "python": platform.python_version()}
        report["versions"] = {**versions, "threads": torch.get_num_threads()}
        write_atomically(options.json, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
