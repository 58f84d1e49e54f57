"""Data sets of Hugging Face's `datasets`."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ldm.data.dataset import Problem, Record
from ldm.data.sources.config import HubData
from ldm.data.sources.decoding import decode
from ldm.data.sources.scanning import ScannedFile, check_problems, look_at, scan
from ldm.data.sources.table import Records
from ldm.data.sources.texts import captions_of
from ldm.support.config import nearest
from ldm.support.text import escaped, shown

if TYPE_CHECKING:
    from PIL.Image import Image

SAVED = ("dataset_info.json", "dataset_dict.json")  # in a folder that `save_to_disk` wrote


class HubImages:
    """The images of a data set of Hugging Face's `datasets`; no code of the data set is executed.

    Args:
        config: The data set, and what is expected of it.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If it has no such split or column, no image to train on, or too many broken ones.
        ImportError: If `datasets` is not installed.
    """

    def __init__(self, config: HubData) -> None:
        self.config, self.rows, self.places = config, read_rows(config), files_of(config)
        problems: list[Problem] = []
        others = self.rows.remove_columns(config.image_key)
        candidates = []
        for i, entry in enumerate(others):
            name = f"{config.split}[{i}]"
            try:
                captions = captions_of(entry, config.caption_key) if entry else ()
            except ValueError as error:
                problems.append(Problem(name, "bad metadata", str(error)))
                captions = ()
            size = self._size(i)
            fingerprint = f"{config.path}/{name}/{size}/{self.rows._fingerprint}"
            candidates.append(
                ScannedFile(
                    name=name,
                    size=size,
                    fingerprint=fingerprint,
                    captions=captions,
                    header=look_at(partial(self._opened, i)),
                )
            )
        kept, records, found = scan(candidates, self._opened, config)
        self.records, self.problems = Records(records), (*problems, *found)
        self.kept: np.ndarray = np.array(kept, dtype=np.int64)
        check_problems(self.problems, config, len(kept))

    def _read(self, row: int) -> bytes:
        image = self.rows[row][self.config.image_key]
        if image is None or image["bytes"] is image["path"] is None:
            raise ValueError("the row has no image")
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        path = os.path.realpath(image["path"])
        if not any(Path(path).is_relative_to(place) for place in self.places):
            raise ValueError(f"it names {shown(path)}, a file outside the data set")
        return Path(path).read_bytes()

    def _size(self, row: int) -> int:
        try:
            return len(self._read(row))
        except (ValueError, OSError):  # looking at it will say why
            return 0

    def _opened(self, row: int) -> BinaryIO:
        return io.BytesIO(self._read(row))

    def __len__(self) -> int:
        return len(self.records)

    def record(self, i: int) -> Record:
        """Return what is known of image i."""
        return self.records[i]

    def open(self, i: int, least: int | None = None) -> Image:
        """Decode image i; see `Dataset.open`."""
        try:
            data = self._read(int(self.kept[i]))
        except OSError as error:
            raise ValueError(escaped(error, 300)) from None
        return decode(data, self.config.background, least)


def is_saved(config: HubData) -> bool:
    """Return whether a data set is a folder that `save_to_disk` wrote."""
    return any((Path(config.path) / name).is_file() for name in SAVED)


def files_of(config: HubData) -> tuple[str, ...]:
    """Return where the files that rows name may be: the data set's folder, and the caches of downloads."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    own = (config.path,) if Path(config.path).is_dir() else ()
    return tuple(os.path.realpath(place) for place in (own if is_saved(config) else (*own, *caches)))


def read_rows(config: HubData) -> Any:  # a `datasets.Dataset`, which may not be installed
    """Return the rows of a data set, with undecoded images; see `HubImages`."""
    try:
        import datasets
    except ImportError:
        raise ImportError("data.kind datasets needs datasets: pip install 'ldm[datasets]'") from None
    path = Path(config.path)
    if is_saved(config):
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            if config.split not in found:
                raise ValueError(f"data.split {shown(config.split)}; {nearest(config.split, found)}")
            found = found[config.split]
    else:
        found = datasets.load_dataset(config.path, split=config.split)
    if config.image_key not in found.column_names:
        raise ValueError(
            f"data.image_key {shown(config.image_key)}; {nearest(config.image_key, found.column_names)}"
        )
    return found.cast_column(config.image_key, datasets.Image(decode=False))
