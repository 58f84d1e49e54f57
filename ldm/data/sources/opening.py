"""Open the data set that a configuration names."""

from __future__ import annotations

from ldm.data.dataset import Dataset
from ldm.data.sources.config import FilesSection
from ldm.data.sources.folder import FolderImages


def open_dataset(config: FilesSection) -> Dataset:
    """Open a data set of image files.

    Raises:
        FileNotFoundError: If it is absent.
        ValueError: If it has no image to train on, or too many are broken; the message names them.
        ImportError: If the package that reads it is not installed.
    """
    return FolderImages(config)
