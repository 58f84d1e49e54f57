"""What a configuration states about a data set of image files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from ldm.data.framing import Buckets
from ldm.support.config import MAX_SIZE, check_between


@dataclass(frozen=True, kw_only=True)
class FileData:
    """What all data sets of image files have in common.

    Args:
        path: The folder, the shards, or the name of the data set.
        size: Side of a square image in pixels, at least 8; with buckets, the root of an image's area.
            Default: 256.
        buckets: Aspect-ratio buckets; None for square images. Default: None.
        crop: Where an image that does not fit its frame is cropped. A random crop is drawn for each sample;
            where latents are cached, once for each image. Default: "center".
        mirror: Probability that an image is mirrored, in [0, 1]. Default: 0.
        background: Color (red, green, blue) on which transparent images are composited, each 0 to 255.
            Default: white.
        least: Least side of an image in pixels; smaller images are left out. None for half of `size`.
            Default: None.
        captions: Captions of images that have none, of which one is drawn at random. Default: none.
        uncaptioned: What becomes of images that have no caption then: "keep" them with the empty one, "skip"
            them, or "stop" with an error. Default: "keep".
        depth: Folder with a depth map for each image, larger values being nearer, under the image's path or
            with the ending .png, for models that read one. Default: None.
        held_out: Share of images that are kept for validation, in [0, 1), chosen by a hash of their names; at
            least one if it is not 0. Default: 0.05.
        max_broken: Number of broken files that are passed over; one more stops the run. Default: 10.
        workers: Processes that decode images; 0 for the training process itself. Default: 0.
    """

    path: str
    size: int = 256
    buckets: Buckets | None = None
    crop: Literal["center", "random"] = "center"
    mirror: float = 0.0
    background: tuple[int, int, int] = (255, 255, 255)
    least: int | None = None
    captions: tuple[str, ...] = ()
    uncaptioned: Literal["keep", "skip", "stop"] = "keep"
    depth: str | None = None
    held_out: float = 0.05
    max_broken: int = 10
    workers: int = 0

    def __post_init__(self) -> None:
        check_between(8, 2**14, size=self.size)
        check_between(1, MAX_SIZE, least=self.least)
        check_between(0, 2**31, max_broken=self.max_broken)
        check_between(0, 256, workers=self.workers)
        if not 0 <= self.mirror <= 1:
            raise ValueError(f"mirror: expected a probability, got {self.mirror}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a share in [0, 1), got {self.held_out}")
        if not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background: expected three numbers from 0 to 255, got {self.background}")
        if self.buckets is not None:
            self.buckets.sizes(self.size)

    @property
    def least_side(self) -> int:
        """Least side of an image in pixels."""
        return -(-self.size // 2) if self.least is None else self.least


@dataclass(frozen=True, kw_only=True)
class FolderData(FileData):
    """A folder of images with captions.

    The captions of an image are the lines of the .txt file beside it, or what a `metadata.jsonl` or
    `metadata.csv` states of it, as Hugging Face's imagefolder has them: `file_name`, relative to the file's
    folder, and a caption.

    Args:
        caption_key: The key of a caption in metadata; its value is a text or a list of texts. None for the
            first of "text", "caption" and "prompt". Default: None.
    """

    kind: Literal["folder"]
    caption_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClassData(FileData):
    """A folder with a folder of images for each class, whose name is the caption.

    Args:
        template: The caption, in which {} stands for the class, with spaces for "_" and "-". Default: "{}".
    """

    kind: Literal["classes"]
    template: str = "{}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template.count("{}") != 1:
            raise ValueError(f"template: expected a text with one {{}}, got {self.template!r}")


@dataclass(frozen=True, kw_only=True)
class ShardData(FileData):
    """WebDataset shards: tar files, in which the files of a sample have one name up to the first dot.

    `path` may have braces, as in "photos-{000..127}.tar", or be a folder of .tar files. The captions of a
    sample are the lines of its .txt file, or are in its .json file.

    Args:
        caption_key: See `FolderData`. Default: None.
    """

    kind: Literal["webdataset"]
    caption_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class HubData(FileData):
    """A data set of Hugging Face's `datasets`: a name on the hub, or a folder that `save_to_disk` wrote.

    Args:
        split: The split. Default: "train".
        image_key: The column of images. Default: "image".
        caption_key: See `FolderData`. Default: None.
    """

    kind: Literal["datasets"]
    split: str = "train"
    image_key: str = "image"
    caption_key: str | None = None


FilesSection: TypeAlias = FolderData | ClassData | ShardData | HubData
