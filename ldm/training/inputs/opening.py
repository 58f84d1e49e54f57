"""Open the training images that a configuration names."""

from __future__ import annotations

from typing import TypeAlias

from ldm.data.sources.config import ClassData, FolderData, HubData, ShardData
from ldm.training.config import DataConfig, RunConfig
from ldm.training.inputs.emoji import EmojiImages
from ldm.training.inputs.files import FileImages
from ldm.training.inputs.protocol import TrainingImages

DataSection: TypeAlias = DataConfig | FolderData | ClassData | ShardData | HubData


def open_images(config: DataSection, run: RunConfig, *, validates_held_out: bool = False) -> TrainingImages:
    """Open the training images of a run.

    Args:
        config: The data section of the run's configuration.
        run: The run, whose seed and batches decide the order of the images.
        validates_held_out: Whether the run validates on held-out images. Default: False.

    Raises:
        FileNotFoundError: If the data set is absent.
        ValueError: If it is damaged, or has no image that the run needs.
    """
    if isinstance(config, DataConfig):
        return EmojiImages(config, validates_held_out=validates_held_out)
    return FileImages(config, run, validates_held_out=validates_held_out)
