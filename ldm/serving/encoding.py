"""Images as the files that responses hold, and events."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.images.files import encode_image
from ldm.images.result import Images, with_pixels
from ldm.serving.errors import ApiError
from ldm.serving.orders import Drawn, finished

if TYPE_CHECKING:
    from PIL.Image import Image

EVENT_STREAM = "text/event-stream"
FILE_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


def encoded_images(drawn: Drawn, kind: str = "png", quality: int | None = None) -> list[tuple[int, bytes]]:
    """Return the seed and the file of each image, without those that the safety checker has flagged.

    In the model's own size the files are those that `Images.save(..., separate=True)` writes. The recipe of
    another size is that of the image before it was resized.

    Args:
        drawn: The images.
        kind: "png", "jpeg" or "webp". Default: "png".
        quality: Quality of jpeg and webp, 0 to 100. Default: None, 95.

    Raises:
        ApiError: If the safety checker has flagged all of them.
    """
    images = drawn.images
    flagged = images.flagged or (False,) * len(images)
    if all(flagged):
        raise ApiError(
            400, "the safety checker has flagged the images", param="prompt", code="content_policy_violation"
        )
    files = []
    for i, (image, flag) in enumerate(zip(drawn.pil(), flagged, strict=True)):
        if flag:
            continue
        recipe = images.recipe if len(images) == 1 else {**images.recipe, "index": i}
        recipe = recipe if drawn.resized else with_pixels(recipe, image)
        path = Path(f"image{FILE_SUFFIXES[kind]}")
        level = None if kind == "png" or quality is None else max(quality, 1)
        files.append((images.seeds[i], encode_image(path, image, recipe, quality=level)))
    return files


def flagged_warnings(images: Images) -> list[str]:
    """Return a warning that names the seeds of images that are withheld; nothing if there are none."""
    flags = images.flagged or ()
    seeds = [str(seed) for seed, flag in zip(images.seeds, flags, strict=False) if flag]
    return [f"the safety checker has flagged the images with seeds {', '.join(seeds)}"] if seeds else []


def preview_files(images: Images, size: Sequence[int] | None, kind: str = "png") -> list[bytes]:
    """Return estimates of images as files, in a (width, height) if one is given."""
    return [plain_file(finished(each, (size[0], size[1])) if size else each, kind) for each in images.pil()]


def preview_grid(estimate: Callable[[], Images]) -> bytes:
    """Return an estimate of images as one PNG, side by side."""
    return plain_file(estimate().grid())


def plain_file(image: Image, kind: str = "png") -> bytes:
    """Return an image as a file without a recipe."""
    import io

    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), **({"compress_level": 1} if kind == "png" else {"quality": 85}))
    return buffer.getvalue()


def as_base64(content: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(content).decode("ascii")


def event_lines(content: Mapping[str, Any]) -> bytes:
    """Return a server-sent event, named by its "type", whose data are JSON."""
    return f"event: {content['type']}\ndata: {json.dumps(content)}\n\n".encode()
