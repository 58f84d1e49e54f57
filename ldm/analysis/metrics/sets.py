"""Sets of images to evaluate: data sets of files, and what a model draws for prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.dataset import Dataset
from ldm.data.sources.opening import FILE_KINDS, kind_of, open_dataset, open_emoji
from ldm.data.sources.scanning import describe_problems
from ldm.support.files import write_atomically
from ldm.support.progress import progress_bar
from ldm.support.text import read_utf8
from ldm.support.warn import warn_user

STEM = "sample"  # of the files of drawn images
MOST_PROMPTS = 2**26  # bytes of a file of prompts


class DatasetImages:
    """A data set as a set of images to evaluate.

    Args:
        dataset: The data set.
        name: What it is, for the report.
    """

    def __init__(self, dataset: Dataset, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def images(self, indices: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Yield images (3, H, W) float32 in [0, 1]; see `ImageSet`."""
        for i in range(len(self)) if indices is None else indices:
            yield torch.from_numpy(np.array(self.dataset.open(i))).permute(2, 0, 1).float() / 255

    def captions(self) -> list[str] | None:
        """Return the first caption of each image; None if an image has none."""
        found = [self.dataset.record(i).captions for i in range(len(self))]
        return [captions[0] for captions in found] if all(found) else None

    def labels(self) -> list[str]:
        """Return the names of the images."""
        return [self.dataset.record(i).name for i in range(len(self))]


def open_set(path: str | Path) -> DatasetImages:
    """Open a set of images, which may have captions.

    Args:
        path: A folder of images; shards: a .tar file, a pattern with braces such as "a-{000..9}.tar", or a
            folder of .tar files; a data set of Hugging Face's `datasets` on the disk; or the emoji.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it holds no image, or a broken file; the message names it.

    Warns:
        UserWarning: Names files that are no images, and other oddities.
    """
    given = str(path)
    kind = kind_of(given)
    if kind == "emoji":
        dataset = open_emoji(given)
    else:
        options: dict[str, Any] = {"kind": kind, "path": given, "least": 1, "max_broken": 0}
        dataset = open_dataset(FILE_KINDS[kind](**options))
    reported = [problem for problem in dataset.problems if problem.kind not in ("no caption", "duplicate")]
    for line in describe_problems(reported):
        warn_user(f"{given}: {line}")
    return DatasetImages(dataset, given)


def draw_set(
    pipe: Any,
    prompts: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    batch: int = 8,
    progress: bool = True,
    **options: Any,
) -> DatasetImages:
    """Draw an image of each prompt into a folder, with the prompt as its caption, and open the folder.

    Images that the folder has already are kept: an interrupted call goes on.

    Args:
        pipe: A model with `text_to_image`.
        prompts: The prompts.
        folder: The folder; image i has the name sample-SEED.png.
        seed: Seed of the first image; each next one has the next seed. Default: 0.
        batch: Images that are drawn together; they do not depend on it. Default: 8.
        progress: Whether to show a progress bar on a terminal. Default: True.
        **options: Further options of `text_to_image`.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def caption_file(number: int) -> Path:
        return folder / f"{STEM}-{number}.txt"

    missing = [i for i in range(len(prompts)) if not caption_file(seed + i).is_file()]
    bar = progress_bar(len(prompts), progress, initial=len(prompts) - len(missing))
    for start in range(0, len(missing), batch):
        chosen = missing[start : start + batch]
        texts, seeds = [prompts[i] for i in chosen], [seed + i for i in chosen]
        drawn = pipe.text_to_image(texts, seed=seeds, progress=False, **options)
        # several images are written to files that their seeds name
        stem = STEM if len(chosen) > 1 else f"{STEM}-{seeds[0]}"
        drawn.save(folder / f"{stem}.png", separate=True)
        for number, text in zip(seeds, texts, strict=True):  # written last, as it marks a complete image
            write_atomically(caption_file(number), (" ".join(text.split()) + "\n").encode())
        bar.update(len(chosen))
    bar.close()
    return open_set(folder)


def read_prompts(path: str | Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no prompt in it, or it is not UTF-8; the message names it.
    """
    lines = (line.strip() for line in read_utf8(Path(path), MOST_PROMPTS).splitlines())
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"{str(path)!r}: expected a prompt on each line, got an empty file")
    return found
