"""The report of an evaluation: one HTML file without links, or one PNG.

It states every number with its interval and shows two curves for each of the features: the Fréchet distance
against the number of images, and the distances to the nearest reference image. Below, the samples of highest
and lowest realism stand beside the nearest reference image, which shows copies at a glance.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ldm.analysis.metrics.bootstrap import Estimate
from ldm.analysis.metrics.evaluation import Comparison, Evaluation, ImageSet, Match
from ldm.images.files import check_writable
from ldm.images.sheets import to_bytes
from ldm.support.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

SUFFIXES = (".html", ".png")
THUMBNAIL = 128  # pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
.pairs { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; max-width: 17rem; font-size: .8rem }
figure img { width: 8rem; height: 8rem; object-fit: contain; background: #eee }
.note { color: #a40 }
"""


def check_report(path: str | Path) -> Path:
    """Return the path if a report can be written there; see `check_writable` for the errors."""
    return check_writable(path, SUFFIXES)


def write_report(
    path: str | Path, evaluation: Evaluation, generated: ImageSet, reference: ImageSet | None
) -> Path:
    """Write the report of an evaluation, as its suffix says.

    Args:
        path: A file that ends in .html or .png. It is written whole or not at all.
        evaluation: The metrics.
        generated: The generated images.
        reference: The reference images; None if there are none.

    Returns:
        The path.
    """
    path = check_report(path)
    shown = [thumbnails(generated, matches_of(evaluation, "generated"))]
    shown.append({} if reference is None else thumbnails(reference, matches_of(evaluation, "reference")))
    if path.suffix.lower() == ".png":
        write_atomically(path, png(draw_all(evaluation, shown[0], shown[1])))
    else:
        labels = generated.labels(), [] if reference is None else reference.labels()
        write_atomically(path, page(evaluation, shown[0], shown[1], labels).encode("utf-8"))
    return path


def matches_of(evaluation: Evaluation, side: str) -> list[int]:
    """Return the numbers of the images that a report shows, rising; `side`: "generated" or "reference"."""
    matches = (match for each in evaluation.comparisons for match in (*each.best, *each.worst))
    return sorted({int(getattr(match, side)) for match in matches})


def thumbnails(images: ImageSet, indices: Sequence[int]) -> dict[int, Image]:
    """Return some images of a set, at most `THUMBNAIL` pixels wide and high, by number."""
    return dict(zip(indices, map(thumbnail, images.images(indices)), strict=True)) if indices else {}


def thumbnail(image: Tensor) -> Image:
    """Return an image (3, H, W) in [0, 1] as a small PIL image."""
    from PIL import Image

    small = Image.fromarray(to_bytes(image[None])[0])
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


def page(
    evaluation: Evaluation,
    made: dict[int, Image],
    real: dict[int, Image],
    labels: tuple[Sequence[str], Sequence[str]],
) -> str:
    """Return the HTML of a report.

    Args:
        evaluation: The metrics.
        made: Generated images by number.
        real: Reference images by number.
        labels: Names of all generated images, and of all reference images.
    """
    escape = html.escape
    against = "" if evaluation.reference is None else f" against {escape(evaluation.reference)}"
    body = [f"<h1>{escape(evaluation.generated)}{against}</h1>", metric_table(evaluation.estimates)]
    body += [f'<p class="note">{escape(text)}</p>' for text in evaluation.warnings()]
    body.append(
        "<p>Intervals are bootstrap intervals around the value. The bias is the bootstrap's estimate of how"
        " much larger the value is than that of infinitely many images.</p>"
    )
    for each in evaluation.comparisons:
        body.append(f"<h2>{escape(each.features)}</h2><p>Images: {escape(each.preprocessing)}.</p>")
        body.append(
            f"<p>{100 * each.closer:.1f} % of the generated images are nearer to a reference image than"
            " that one is to any other: about a half would be if they were new images of the same kind, all"
            " if they were copies.</p>"
        )
        body.append(f'<img alt="curves" src="{data_url(png(draw_curves(each)))}">')
        for title, matches in (("Highest realism", each.best), ("Lowest realism", each.worst)):
            pairs = "".join(pair(match, made, real, labels) for match in matches)
            body.append(f'<h3>{title}, with the nearest reference image</h3><div class="pairs">{pairs}</div>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(evaluation.generated)}</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def metric_table(estimates: Sequence[Estimate]) -> str:
    """Return the table of metrics as HTML."""
    names = ("metric", "features", "value", "interval", "bias", "generated", "reference", "better")
    rows = [
        (
            each.metric,
            each.features,
            f"{each.value:.5g}",
            f"{each.low:.5g} … {each.high:.5g} ({100 * each.level:g} %)",
            f"{each.bias:+.3g}" if each.bias else "",
            str(each.generated),
            "" if each.reference is None else str(each.reference),
            each.better,
        )
        for each in estimates
    ]
    head = "".join(f"<th>{name}</th>" for name in names)
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def pair(
    match: Match,
    made: dict[int, Image],
    real: dict[int, Image],
    labels: tuple[Sequence[str], Sequence[str]],
) -> str:
    """Return a generated image beside its nearest reference image, as HTML; see `page`."""
    images = "".join(
        f'<img alt="{kind}" src="{data_url(encoded(image))}">'
        for kind, image in (("generated", made[match.generated]), ("reference", real[match.reference]))
    )
    names = f"{labels[0][match.generated]} | {labels[1][match.reference]}"
    figures = f"distance {match.distance:.3g}, realism {match.realism:.2f}"
    return f"<figure>{images}<figcaption>{html.escape(names)}<br>{figures}</figcaption></figure>"


def encoded(image: Image) -> bytes:
    """Return an image as the bytes of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    """Return a PNG as a URL that holds it."""
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def draw_curves(comparison: Comparison) -> Figure:
    """Return the two curves of some features as a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_frechet(left, comparison)
    plot_distances(right, comparison)
    return figure


def plot_frechet(axes: Axes, comparison: Comparison) -> None:
    """Plot the Fréchet distance against 1/n, with the line to infinitely many images."""
    inverse = np.array([1 / n for n, _ in comparison.curve])
    values = np.array([value for _, value in comparison.curve])
    axes.plot(inverse, values, "o-")
    if len(values) > 1:
        slope, end = np.polyfit(inverse, values, 1)
        axes.plot([0, inverse.max()], [end, end + slope * inverse.max()], ":", label=f"{end:.4g} at n = ∞")
        axes.legend()
    axes.set_xlim(left=0)
    axes.set_xlabel("1 / number of generated images")
    axes.set_ylabel(f"Fréchet distance, {comparison.features}")


def plot_distances(axes: Axes, comparison: Comparison) -> None:
    """Plot how many images have another one within a distance."""
    for values, label in (
        (comparison.to_reference, "generated to reference"),
        (comparison.within_reference, "reference to reference"),
    ):
        axes.plot(values, np.arange(1, len(values) + 1) / len(values), label=label)
    axes.set_xlabel(f"distance to the nearest image, {comparison.features}")
    axes.set_ylabel("share of images")
    axes.set_ylim(0, 1)
    axes.legend()


def draw_all(evaluation: Evaluation, made: dict[int, Image], real: dict[int, Image]) -> Figure:
    """Return the whole report as a figure: the table, and a row of curves and pairs for each features."""
    from matplotlib.figure import Figure

    rows = len(evaluation.comparisons)
    figure = Figure(figsize=(14, 2 + 0.25 * len(evaluation.estimates) + 6 * rows), layout="constrained")
    top, *below = figure.subfigures(1 + rows, 1, height_ratios=[1, *[3.0] * rows], squeeze=False)[:, 0]
    against = "" if evaluation.reference is None else f" against {evaluation.reference}"
    text = "\n".join([f"{evaluation.generated}{against}", "", evaluation.table(), *evaluation.warnings()])
    top.text(0.01, 0.98, text, va="top", family="monospace", fontsize=8, parse_math=False)
    for part, each in zip(below, evaluation.comparisons, strict=True):
        part.suptitle(f"{each.features}: {each.preprocessing}; closer {100 * each.closer:.1f} %", fontsize=9)
        curves, pairs = part.subfigures(2, 1, height_ratios=[1, 1])
        left, right = curves.subplots(1, 2)
        plot_frechet(left, each)
        plot_distances(right, each)
        draw_pairs(pairs.subplots(2, max(1, len(each.best)), squeeze=False), each, made, real)
    return figure


def draw_pairs(
    grid: np.ndarray, comparison: Comparison, made: dict[int, Image], real: dict[int, Image]
) -> None:
    """Draw the best pairs in the first row of axes and the worst in the second; generated images left."""
    for row, name, matches in ((grid[0], "best", comparison.best), (grid[1], "worst", comparison.worst)):
        for axes, match in zip(row, matches, strict=True):
            images = [made[match.generated], real[match.reference]]
            tiles = [image.convert("RGB").resize((THUMBNAIL, THUMBNAIL)) for image in images]
            axes.imshow(np.concatenate([np.asarray(tile) for tile in tiles], 1))
            axes.set_title(f"{name} {match.realism:.2f}", fontsize=7)
            axes.set_axis_off()
