"""Open the data set that a configuration or a path names."""

from __future__ import annotations

from pathlib import Path

from ldm.data.dataset import Dataset
from ldm.data.index import INDEX_FILE, EmojiData
from ldm.data.sources.config import ClassData, FilesSection, FolderData, HubData, ShardData
from ldm.data.sources.emoji import WholeEmoji
from ldm.data.sources.folder import FolderImages
from ldm.data.sources.hub import SAVED, HubImages
from ldm.data.sources.shards import ShardImages

FILE_KINDS: dict[str, type[FilesSection]] = {
    "folder": FolderData,
    "classes": ClassData,
    "webdataset": ShardData,
    "datasets": HubData,
}


def open_dataset(config: FilesSection) -> Dataset:
    """Open a data set of image files.

    Raises:
        FileNotFoundError: If it is absent.
        ValueError: If it has no image to train on, or too many are broken; the message names them.
        ImportError: If the package that reads it is not installed.
    """
    if isinstance(config, ShardData):
        return ShardImages(config)
    return HubImages(config) if isinstance(config, HubData) else FolderImages(config)


def open_emoji(path: str) -> Dataset:
    """Open the images of the emoji data set in a folder."""
    return WholeEmoji(EmojiData.open(path))


def kind_of(path: str) -> str:
    """Return the kind of the data set at a path: a key of `FILE_KINDS`, or "emoji"."""
    place = Path(path)
    if (place / INDEX_FILE).is_file():
        return "emoji"
    if path.endswith(".tar") or (place.is_dir() and any(place.glob("*.tar"))):
        return "webdataset"
    if any((place / name).is_file() for name in SAVED):
        return "datasets"
    return "folder"
