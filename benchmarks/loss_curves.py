"""Plot the training curves of the embedded models: `python benchmarks/loss_curves.py -o curves.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ldm.catalog.lookup import ASSETS
from ldm.support.files import open_atomically


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Plot loss and validation against samples seen, one panel per run (needs matplotlib)."
    )
    parser.add_argument(
        "metrics",
        nargs="*",
        type=Path,
        help="metrics as JSON lines (default: those of the embedded models)",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"))
    options = parser.parse_args(arguments)
    paths = options.metrics or sorted(ASSETS.glob("*/*.jsonl"))
    if not paths:
        parser.error("no metrics to plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(paths), figsize=(5 * len(paths), 3.6), squeeze=False)
    for axis, path in zip(axes[0], paths, strict=True):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        losses = [row for row in rows if "loss" in row]
        axis.plot([row["samples"] for row in losses], [row["loss"] for row in losses], label="loss")
        axis.set(title=path.stem, xlabel="samples seen", yscale="log")
        names = sorted({key for row in rows for key in row if key.startswith("validation/")})[-1:]
        other = axis.twinx()
        for name in names:
            shown = [row for row in rows if name in row]
            other.plot(
                [row["samples"] for row in shown],
                [row[name] for row in shown],
                "C1.-",
                label=name.removeprefix("validation/"),
            )
        axis.legend(loc="upper left")
        other.legend(loc="upper right")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with open_atomically(options.output) as file:
        figure.savefig(file, format="png", dpi=100)


if __name__ == "__main__":
    main()
