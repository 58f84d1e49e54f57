"""Look at every image of a data set before it is trained on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ldm.data.dataset import BROKEN, Dataset, Problem
from ldm.data.framing import Frame, crop_to_frame, nearest_bucket
from ldm.data.sources.scanning import describe_problems
from ldm.images.sheets import arrange, with_lines
from ldm.support.progress import progress_bar

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 128  # side in pixels of an image on a contact sheet


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What `check_data` found.

    Args:
        images: Number of images that can be trained on.
        captions: Number of captions of each image.
        sides: (height, width) of each image in pixels, (N, 2) int.
        shapes: Number of images in each bucket (H, W), the largest first.
        problems: All problems.
    """

    images: int
    captions: np.ndarray
    sides: np.ndarray
    shapes: dict[tuple[int, int], int]
    problems: tuple[Problem, ...]

    @property
    def broken(self) -> int:
        """The number of broken files."""
        return len({problem.name for problem in self.problems if problem.kind in BROKEN})

    def lines(self, most: int = 1000) -> list[str]:
        """Return the report in lines.

        Args:
            most: Number of files that are named for each kind of problem. Default: 1000.
        """
        low, middle, high = np.percentile(self.sides.min(1), [0, 50, 100], method="nearest").tolist()
        several = int((self.captions > 1).sum())
        bare = int((self.captions == 0).sum())
        buckets = ", ".join(f"{w}×{h}: {n}" for (h, w), n in self.shapes.items())
        return [
            f"images: {self.images}",
            f"shorter sides: {low} to {high} pixels, median {middle}",
            f"captions: {int(self.captions.sum())}; {several} images have several, {bare} none",
            f"sizes in training: {buckets}",
            *describe_problems(self.problems, most=most),
        ]


def check_data(
    dataset: Dataset, shapes: list[tuple[int, int]], *, decodes: bool = True, progress: bool = True
) -> DataReport:
    """Decode every image of a data set, and count what is there and what is wrong.

    Args:
        dataset: The data set, whose headers have been read.
        shapes: Sizes (H, W) of the buckets.
        decodes: Whether to decode the images; else damage behind their headers is not noticed. Default: True.
        progress: Whether to show a progress bar on a terminal. Default: True.
    """
    records = [dataset.record(i) for i in range(len(dataset))]
    damaged: list[Problem] = []
    if decodes:
        for i in progress_bar(len(dataset), progress, iterable=range(len(dataset)), desc="decode"):
            try:
                dataset.open(i)
            except ValueError as error:
                damaged.append(Problem(records[i].name, "unreadable", str(error)))
    names = {problem.name for problem in damaged}
    intact = [record for record in records if record.name not in names]
    if not intact:
        raise ValueError(f"no image can be decoded: {'; '.join(describe_problems(damaged))}")
    sides = np.array([(record.height, record.width) for record in intact])
    counts = Counter(nearest_bucket(sides[:, 0], sides[:, 1], shapes).tolist())
    return DataReport(
        images=len(intact),
        captions=np.array([len(record.captions) for record in intact]),
        sides=sides,
        shapes={shapes[bucket]: count for bucket, count in counts.most_common()},
        problems=(*dataset.problems, *damaged),
    )


def contact_sheet(dataset: Dataset, n: int = 48, columns: int | None = None) -> Image:
    """Return images of a data set, spread evenly over it, whole, with captions and names.

    Args:
        dataset: The data set.
        n: Most images. Default: 48.
        columns: Images per row; None for a sheet as close to square as possible. Default: None.

    Raises:
        ValueError: If none can be decoded.
    """
    from PIL import Image

    shown = []
    for i in np.unique(np.linspace(0, len(dataset) - 1, n).round().astype(int)).tolist():
        record = dataset.record(i)
        try:
            image = dataset.open(i, least=THUMBNAIL)
        except ValueError:
            continue
        scale = THUMBNAIL / max(image.height, image.width)
        frame = Frame(max(1, round(image.height * scale)), max(1, round(image.width * scale)))
        square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
        corner = ((THUMBNAIL - frame.width) // 2, (THUMBNAIL - frame.height) // 2)
        square.paste(Image.fromarray(crop_to_frame(image, frame)), corner)
        text = next(iter(record.captions), "(no caption)")
        shown.append(with_lines(square, text, record.name))
    if not shown:
        raise ValueError("no image can be decoded")
    return arrange(shown, columns)
