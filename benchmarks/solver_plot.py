"""Plot distance against evaluations: one line per sampler, labelled at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.support.files import open_atomically

TITLES = {
    "flow": "deterministic samplers",
    "path": "stochastic samplers, one Brownian path",
    "spacing": "the default sampler by spacing",
}
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#8c6d00",
    "#444444",
    "#56b4e9",
    "#b2182b",
    "#6a3d9a",
    "#1b9e77",
)
Row = dict[str, Any]


def merged(rows: Sequence[Row], by: str) -> dict[str, list[Row]]:
    """Return curves by name; identical ones (Euler and DDIM) share one entry."""
    curves: dict[tuple[Any, ...], tuple[list[str], list[Row]]] = {}
    for name in dict.fromkeys(str(row[by]) for row in rows):
        mine = sorted((row for row in rows if str(row[by]) == name), key=lambda row: row["evaluations"])
        key = tuple((row["evaluations"], float(f"{row['distance']:.3g}")) for row in mine)
        curves.setdefault(key, ([], mine))[0].append(name)
    return {" = ".join(names): mine for names, mine in curves.values()}


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return heights moved apart to at least `gap`, in their order, near their places."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for _ in range(200):
        for low, high in zip(order[:-1], order[1:], strict=True):
            lack = gap - (placed[high] - placed[low])
            if lack > 1e-9:
                placed[low] -= lack / 2
                placed[high] += lack / 2
    return placed


def draw(axis: Any, rows: Sequence[Row], by: str, title: str, tolerance: float) -> None:
    """Draw one panel with logarithmic axes; labels are right of the lines' ends, moved apart."""
    curves = merged(rows, by)
    ends = {name: math.log10(max(mine[-1]["distance"], 1e-3)) for name, mine in curves.items()}
    least, greatest = (f(max(row["distance"], 1e-3) for row in rows) for f in (min, max))
    gap = max(math.log10(greatest / least), 0.3) / 22
    for i, ((name, mine), height) in enumerate(
        zip(curves.items(), spread(list(ends.values()), gap), strict=True)
    ):
        colour, dash = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        x, y = [row["evaluations"] for row in mine], [max(row["distance"], 1e-3) for row in mine]
        axis.plot(x, y, dash, color=colour, marker="o", markersize=3, linewidth=1.4)
        axis.annotate(
            name,
            (x[-1], y[-1]),
            xytext=(1.04, 10**height),
            textcoords=("axes fraction", "data"),
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )
    axis.axhline(tolerance, color="#999999", linewidth=0.8, linestyle=":")
    axis.annotate(
        f"{tolerance:g} levels",
        (1, tolerance),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color="#777777",
    )
    axis.set(
        title=title,
        xscale="log",
        yscale="log",
        xlabel="evaluations of the network",
        ylabel="distance to the reference, levels of 255",
    )
    ticks = sorted({round(row["evaluations"]) for row in rows})
    axis.set_xticks(thinned(ticks), labels=[str(tick) for tick in thinned(ticks)])
    axis.minorticks_off()
    axis.grid(alpha=0.25)


def thinned(ticks: Sequence[int]) -> list[int]:
    """Return ticks at least a quarter apart, so that their labels do not overlap."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick >= 1.25 * kept[-1]:
            kept.append(tick)
    return kept


def plot(path: Path, models: dict[str, dict[str, list[Row]]], tolerance: float) -> None:
    """Write a PNG with one row of panels per model, atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [[kind for kind in TITLES if rows[kind]] for rows in models.values()]
    columns = max(len(kinds) for kinds in panels)
    figure, axes = plt.subplots(len(models), columns, figsize=(6.4 * columns, 5 * len(models)), squeeze=False)
    for line, (name, rows), kinds in zip(axes, models.items(), panels, strict=True):
        for axis in line[len(kinds) :]:
            axis.set_axis_off()
        for axis, kind in zip(line, kinds, strict=False):
            draw(
                axis,
                rows[kind],
                "spacing" if kind == "spacing" else "sampler",
                f"{name}: {TITLES[kind]}",
                tolerance,
            )
    figure.tight_layout(w_pad=9)
    with open_atomically(path) as file:
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
