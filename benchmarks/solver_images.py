"""Solvers on a model: the distance of an image from the 1,000-step image, against evaluations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.analysis.plan import evaluations
from ldm.samplers.conventions import Convention

# Two families with one limit each: the probability flow, and the SDE along one Brownian path.
FLOW = ("ddim", "euler", "heun", "dpm2", "plms", "lms", "dpmpp_2m", "unipc", "deis", "dpm_adaptive")
PATH = ("ddpm", "euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
# restart, lcm and tcd have no common limit: the first adds noise again, the others are for distilled models.
REFERENCE = {"flow": "dpmpp_2m", "path": "dpmpp_2m_sde"}
TOLERANCES = ((0.5, 0.08), (0.2, 0.03), (0.05, 0.0078), (0.01, 0.0016))  # rtol, atol of dpm_adaptive
Row = dict[str, Any]


class Bench:
    """A model with its prompts and seeds; `calls` counts evaluations of the network."""

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seeds: int,
        *,
        batch: int,
        guidance: float | None,
        reference_steps: int,
    ) -> None:
        self.pipe, self.batch, self.guidance = pipe, batch, guidance
        self.prompts = [prompt for prompt in prompts for _ in range(seeds)]
        self.seeds = [seed for _ in prompts for seed in range(seeds)]
        self.rules: Convention = dataclasses.replace(pipe.card.grids(), brownian=PATH)
        self.reference_steps = min(reference_steps, len(pipe.denoiser.schedule))
        self.calls = 0
        pipe.denoiser.net.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def make(
        self, sampler: str, steps: int, spacing: str | None = None, **options: Any
    ) -> tuple[Tensor, float]:
        """Return the images (B, 3, H, W) in [0, 1] and the mean number of evaluations per batch."""
        self.calls, parts = 0, []
        for i in range(0, len(self.prompts), self.batch):
            chosen = slice(i, i + self.batch)
            images = self.pipe.text_to_image(
                self.prompts[chosen],
                seed=self.seeds[chosen],
                sampler=sampler,
                steps=steps,
                spacing=spacing,
                convention=self.rules,
                guidance=self.guidance,
                progress=False,
                **options,
            )
            parts.append(images.tensor)
        return torch.cat(parts), self.calls / len(parts)

    def reference(self, kind: str) -> Tensor:
        """Return the limit of a family: a second-order method at every timestep of the reference."""
        return self.make(REFERENCE[kind], self.reference_steps, "trailing")[0]

    def steps_within(self, budget: int, sampler: str, spacing: str | None) -> tuple[int, int] | None:
        """Return the most steps that fit into a budget, and their evaluations; None if none fit."""
        changes = {} if spacing is None else {"spacing": spacing}
        for steps in range(budget, 0, -1):
            try:
                count = evaluations(
                    self.rules.grid(self.pipe.denoiser.schedule, steps, sampler, **changes), sampler
                )
            except ValueError:  # the spacing refuses this number of steps
                continue
            if count is not None and count <= budget:
                return steps, count
        return None


def distance(images: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the mean over images of each one's RMS difference, in levels of 255, and its standard error."""
    each = 255 * (images - reference).square().flatten(1).mean(1).sqrt()
    return float(each.mean()), float(each.std() / math.sqrt(len(each))) if len(each) > 1 else math.nan


def curve(
    bench: Bench,
    sampler: str,
    budgets: Sequence[int],
    reference: Tensor,
    *,
    kind: str,
    spacing: str | None = None,
) -> list[Row]:
    """Return distance against evaluations for one sampler on one spacing, a row per number of steps.

    Args:
        bench: The model with its prompts and seeds.
        sampler: The sampler's name.
        budgets: Numbers of evaluations to fill.
        reference: The family's limit, (B, 3, H, W).
        kind: The family, "flow", "path" or "spacing".
        spacing: The spacing; None for the model's.
    """
    if sampler == "dpm_adaptive":  # only the ends of its grid count
        spacing = "trailing"
        runs: list[tuple[int, dict[str, Any]]] = [
            (bench.reference_steps, {"rtol": rtol, "atol": atol}) for rtol, atol in TOLERANCES
        ]
    else:
        found = [bench.steps_within(budget, sampler, spacing) for budget in budgets]
        runs = [(steps, {}) for steps in dict.fromkeys(item[0] for item in found if item is not None)]
    rows = []
    for steps, options in runs:
        images, count = bench.make(sampler, steps, spacing, **options)
        mean, error = distance(images, reference)
        asked = {"kind": kind, "sampler": sampler, "spacing": spacing, "options": options, "steps": steps}
        rows.append({**asked, "evaluations": count, "distance": mean, "error": error})
    return rows


def measure(
    bench: Bench, samplers: Sequence[str], budgets: Sequence[int], spacings: Sequence[str]
) -> dict[str, list[Row]]:
    """Return the curves of every sampler, and of the default sampler on every spacing."""
    result: dict[str, list[Row]] = {"flow": [], "path": [], "spacing": []}
    default = bench.pipe.card.defaults.sampler
    for kind, members in (("flow", FLOW), ("path", PATH)):
        chosen = [name for name in samplers if name in members]
        if chosen:
            reference = bench.reference(kind)
            for name in chosen:
                result[kind] += curve(bench, name, budgets, reference, kind=kind)
            if kind == "flow" and default in FLOW:
                for spacing in spacings:
                    result["spacing"] += curve(bench, default, budgets, reference, kind=kind, spacing=spacing)
    return result


def recommend(rows: dict[str, list[Row]], tolerance: float) -> Row | None:
    """Return the row with the fewest evaluations within `tolerance` levels; of several, the nearest.

    Only samplers of the probability flow are considered. Adaptive samplers are excluded, since their
    evaluations are not known in advance. None if no row is near enough.
    """
    near = [
        row
        for row in [*rows["flow"], *rows["spacing"]]
        if row["distance"] <= tolerance and row["sampler"] != "dpm_adaptive"
    ]
    return min(near, key=lambda row: (row["evaluations"], row["distance"]), default=None)


def table(rows: Sequence[Row], budgets: Sequence[int], by: str) -> str:
    """Return a Markdown table: per curve, the distance at the most evaluations within each budget.

    The number of evaluations is in brackets if it is smaller than the budget.
    """
    lines = [
        f"| {by} | " + " | ".join(f"{budget} evaluations" for budget in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for name in dict.fromkeys(row[by] for row in rows):
        cells, mine = [], [row for row in rows if row[by] == name]
        for budget in budgets:
            last = max(
                (row for row in mine if row["evaluations"] <= budget),
                key=lambda row: row["evaluations"],
                default=None,
            )
            fewer = "" if last is None or last["evaluations"] == budget else f" ({last['evaluations']:.0f})"
            cells.append("–" if last is None else f"{last['distance']:.2f}{fewer}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
