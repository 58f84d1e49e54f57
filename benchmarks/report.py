"""Print a table of the speed benchmarks from their JSON files, and plot them.

python benchmarks/report.py results/*.json --plot speed.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ldm.support.files import open_atomically


def rows(result: dict[str, Any]) -> list[str]:
    """Return the table rows of one file, one per peer."""
    what = f"{result['question']}: " + ", ".join(
        f"{key} {value}" for key, value in result["settings"].items() if value not in (False, None)
    )
    ours, unit = result["sides"]["ldm"], result["unit"]
    made = []
    for peer, ratio in result["ratios"].items():
        side, bar = result["sides"][peer], result["bars"].get(peer)
        verdict = "" if bar is None else f"{bar} ({'met' if ratio <= bar else '**not met**'})"
        spread = [f"{s['median']:.3g} {unit} ({s['low']:.3g}–{s['high']:.3g})" for s in (ours, side)]
        made.append(f"| {what} | {spread[0]} | {peer}: {spread[1]} | {ratio:.2f} | {verdict} |")
    return made


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of all results with sides, and the machines they ran on."""
    sided = [result for result in results if "sides" in result]
    lines = [
        "| what | ldm | peer | ratio | bar |",
        "|---|---|---|---|---|",
        *(row for result in sided for row in rows(result)),
    ]
    machines = dict.fromkeys(
        f"{w['threads']} threads, {w['cpu']}, "
        + ", ".join(f"{name} {w[name]}" for name in ("torch", "diffusers", "openvino") if w[name])
        for w in (result["where"] for result in results)
    )
    return "\n".join(
        [*lines, "", *(f"*Median (lowest–highest) of alternating runs; {machine}.*" for machine in machines)]
    )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot the ratios as bars, and the curves of `scaling.py` if present."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"ldm": "C0", "diffusers": "C1", "openvino": "C2"}
    sided = [result for result in results if "sides" in result]
    scaling = next((r for r in results if r["question"] == "scaling"), None)
    series = [key for key, value in (scaling or {}).items() if isinstance(value, dict) and "rows" in value]
    figure, axes = plt.subplots(
        1,
        1 + len(series),
        figsize=(5 + 4 * len(series), 4),
        squeeze=False,
        width_ratios=[1.2, *[1.0] * len(series)],
    )
    ratios = axes[0][0]
    bars = [(result, peer, ratio) for result in reversed(sided) for peer, ratio in result["ratios"].items()]
    for i, (result, peer, ratio) in enumerate(bars):
        ratios.barh(i, ratio, color=colours.get(peer, "C3"))
        if (bar := result["bars"].get(peer)) is not None:
            ratios.plot([bar, bar], [i - 0.4, i + 0.4], color="black", linewidth=1.5)
    named = (
        " ".join(
            filter(None, (r["question"], r["settings"].get("model"), r["settings"].get("dtype"), f"/ {peer}"))
        )
        for r, peer, _ in bars
    )
    ratios.set_yticks(range(len(bars)), list(named), fontsize=8)
    ratios.axvline(1, color="gray", linewidth=0.8)
    ratios.set_xlabel("ldm / peer (lower is better); black: the bar")
    for axis, key in zip(axes[0][1:], series, strict=True):
        for who, side in scaling[key]["rows"].items():
            axis.loglog(
                [row["x"] for row in side],
                [row["seconds"] for row in side],
                "o-",
                color=colours[who],
                label=f"{who}, s",
            )
            axis.loglog(
                [row["x"] for row in side],
                [row["memory"] for row in side],
                "x--",
                color=colours[who],
                label=f"{who}, GB",
            )
        axis.set_title(key)
        axis.set_xlabel("images" if key.endswith("batch") else "pixels per image")
        axis.legend(fontsize=8)
    figure.tight_layout()
    with open_atomically(path) as file:
        figure.savefig(file, format="png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, help="write the plots to this file (needs matplotlib)")
    args = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
    known = [result for result in results if "where" in result and "question" in result]
    print(table(known))
    if args.plot:
        plot(known, args.plot)


if __name__ == "__main__":
    main()
