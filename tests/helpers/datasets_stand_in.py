"""The part of Hugging Face's `datasets` that ldm reads through, for tests without the package.

`test_hub_images.py` runs the same tests with the package itself where it is installed.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

config = SimpleNamespace(HF_DATASETS_CACHE="/absent/datasets", DOWNLOADED_DATASETS_PATH="/absent/downloads")


@dataclass(frozen=True)
class Image:
    """The feature of a column of images; `decode` is whether rows hold images or their bytes."""

    decode: bool = True


@dataclass(frozen=True)
class Dataset:
    """Columns of equally many values."""

    columns: dict[str, list[Any]]
    images: dict[str, Image] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, columns: dict[str, list[Any]]) -> Dataset:
        return cls(columns)

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    @property
    def _fingerprint(self) -> str:
        return hashlib.sha256(pickle.dumps((self.columns, self.images))).hexdigest()[:16]

    def remove_columns(self, name: str) -> Dataset:
        return Dataset({key: value for key, value in self.columns.items() if key != name})

    def cast_column(self, name: str, feature: Image) -> Dataset:
        return Dataset(self.columns, {**self.images, name: feature})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, row: int) -> dict[str, Any]:
        assert not any(feature.decode for feature in self.images.values())
        return {name: values[row] for name, values in self.columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def save_to_disk(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "rows").write_bytes(pickle.dumps(self))
        (Path(folder) / "dataset_info.json").write_text("{}", encoding="utf-8")


class DatasetDict(dict[str, Dataset]):
    """Data sets by split."""

    def save_to_disk(self, folder: str) -> None:
        for split, rows in self.items():
            rows.save_to_disk(f"{folder}/{split}")
        (Path(folder) / "dataset_dict.json").write_text("{}", encoding="utf-8")


def load_from_disk(folder: str) -> Dataset | DatasetDict:
    """Return what `save_to_disk` wrote."""
    path = Path(folder)
    if (path / "dataset_dict.json").is_file():
        return DatasetDict({each.parent.name: _read(each) for each in sorted(path.glob("*/rows"))})
    return _read(path / "rows")


def load_dataset(path: str, *, split: str) -> Dataset:
    """Return a split of a data set by its name: here, a folder that `save_to_disk` wrote into."""
    raise FileNotFoundError(f"Couldn't find any data file at {path}.")


def _read(path: Path) -> Dataset:
    found = pickle.loads(path.read_bytes())
    assert isinstance(found, Dataset)
    return found
