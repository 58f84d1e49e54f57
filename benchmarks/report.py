"""The README's table of speed, and plots, from the JSON files that the other benchmarks wrote.

    python benchmarks/report.py results/*.json --plot speed.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def rows(result: dict[str, Any]) -> list[str]:
    """Table rows of one file: a peer each."""
    what = f"{result['question']}: " + ", ".join(f"{key} {value}" for key, value in result["settings"].items() if value not in (False, None))
    ours, unit = result["sides"]["ldm"], result["unit"]
    made = []
    for peer, ratio in result["ratios"].items():
        side, bar = result["sides"][peer], result["bars"].get(peer)
        verdict = "" if bar is None else f"{bar} ({'met' if ratio <= bar else '**not met**'})"
        spread = [f"{s['median']:.3g} {unit} ({s['low']:.3g}–{s['high']:.3g})" for s in (ours, side)]
        made.append(f"| {what} | {spread[0]} | {peer}: {spread[1]} | {ratio:.2f} | {verdict} |")
    return made


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of all that has sides, and the machines they ran on."""
    sided = [result for result in results if "sides" in result]
    lines = ["| what | ldm | peer | ratio | bar |", "|---|---|---|---|---|", *(row for result in sided for row in rows(result))]
    machines = dict.fromkeys(
        f"{w['threads']} threads, {w['cpu']}, " + ", ".join(f"{name} {w[name]}" for name in ("torch", "diffusers", "openvino") if w[name])
        for w in (result["where"] for result in results)
    )
    return "\n".join([*lines, "", *(f"*Median (lowest–highest) of alternating runs; {machine}.*" for machine in machines)])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratios, and the curves of scaling where there are any."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sided = [(f"{r['question']}\n{r['settings'].get('model', '')} {r['settings'].get('dtype', '')}", r["ratios"]) for r in results if "sides" in r]
    scaling = next((r for r in results if r["question"] == "scaling"), None)
    series = [key for key, value in (scaling or {}).items() if isinstance(value, dict) and "rows" in value]
    figure, axes = plt.subplots(1, 1 + len(series), figsize=(5 * (1 + len(series)), 4), squeeze=False)
    names = [(what, peer, ratio) for what, ratios in sided for peer, ratio in ratios.items()]
    axes[0][0].barh([f"{what} / {peer}" for what, peer, _ in names], [ratio for *_, ratio in names])
    axes[0][0].axvline(1, color="black", linewidth=0.8)
    axes[0][0].set_xlabel("ldm / peer (lower is better)")
    for axis, key in zip(axes[0][1:], series, strict=True):
        for who, side in scaling[key]["rows"].items():
            axis.loglog([row["x"] for row in side], [row["seconds"] for row in side], "o-", label=f"{who}, s")
            axis.loglog([row["x"] for row in side], [row["memory"] for row in side], "x--", label=f"{who}, GB")
        axis.set_title(key)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, help="write the plots here (needs matplotlib)")
    args = parser.parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
    known = [result for result in results if "where" in result and "question" in result]
    print(table(known))
    if args.plot:
        plot(known, args.plot)


if __name__ == "__main__":
    main()
