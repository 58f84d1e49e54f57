"""What a request asks a model for, and how the model is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ldm.images.result import Images
from ldm.pipelines.dalle.pipeline import DalleMini
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.unclip import UnCLIP
from ldm.serving.errors import ApiError, bad_field
from ldm.serving.sizes import ON_CANVAS, final_size, fits, nearest_size, usual_sizes
from ldm.serving.uploads import SourceImage

if TYPE_CHECKING:
    from PIL.Image import Image

# Names of the library's options → names of the fields that they come from.
FIELD_NAMES = {
    "prompt": "prompt",
    "negative": "negative_prompt",
    "image": "image",
    "mask": "mask",
    "n": "n",
    "seed": "seed",
    "steps": "steps",
    "guidance": "guidance",
    "sampler": "sampler",
    "strength": "strength",
    "height": "size",
    "width": "size",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageOrder:
    """What a request asks for.

    Args:
        endpoint: "generations", "edits" or "variations".
        model: Id of the model.
        seed: Seed of the first image.
        n: Number of images. Default: 1.
        prompt: The prompt. Default: "".
        negative: What the images do not show. Default: "".
        options: Options of the call: steps, guidance, sampler, strength, those that are given. Default: none.
        source: The image to start from. Default: None.
        size: (width, height) of the images. Default: None, the model's or the source's.
        strict: Whether a size that the model does not make is refused. Default: False.
    """

    endpoint: str
    model: str
    seed: int
    n: int = 1
    prompt: str = ""
    negative: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    source: SourceImage | None = None
    size: tuple[int, int] | None = None
    strict: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What orders have in common that may be drawn in one batch."""
        source = None if self.source is None else (self.source.image.size, self.source.hole is None)
        return self.endpoint, self.model, self.size, source, tuple(sorted(self.options.items()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """The images of an order.

    Attributes:
        images: The images, as the model made them.
        size: (width, height) that they are given in.
        source: The source whose known part is put back, where it is not the model's own size. None: nothing.
        warnings: What the library warned of.
        files: The seed and the file of each image; see `ldm.serving.encoding.encoded_images`.
    """

    images: Images
    size: tuple[int, int]
    source: SourceImage | None = None
    warnings: tuple[str, ...] = ()
    files: Sequence[tuple[int, bytes]] = ()

    @property
    def resized(self) -> bool:
        """Whether the images are not given in the size that the model made."""
        height, width = self.images.tensor.shape[-2:]
        return (width, height) != self.size

    def pil(self) -> list[Image]:
        """Return the images in their final size."""
        return [finished(image, self.size, self.source) for image in self.images.pil()]


def finished(image: Image, size: tuple[int, int], source: SourceImage | None = None) -> Image:
    """Return an image that a model made in another size, with the known part of its source.

    Args:
        image: The image, 8-bit RGB.
        size: The (width, height).
        source: The source, of that size, outside of whose hole nothing has changed. Default: None.
    """
    from PIL import Image as pil

    made = image if image.size == size else image.resize(size, pil.Resampling.LANCZOS)
    if source is None or source.hole is None or source.image.size != size:
        return made
    return pil.composite(made, source.image, source.hole)


def drawn_size(pipe: Any, order: ImageOrder) -> tuple[int, int]:
    """Return the (width, height) that a model draws for an order.

    Raises:
        ApiError: If the order is strict and the model does not make its size.
    """
    own, usual = final_size(pipe.card), pipe.card.usual()
    one = makes_one_size(pipe)
    if order.source is not None and not (one and order.endpoint == "variations"):
        size = order.source.image.size
        if one:  # edits are made by an unCLIP model's decoder
            own = usual.width, usual.height
        if isinstance(pipe, DalleMini):
            return own
        return size if fits(size, own, 1, ON_CANVAS) else nearest_size(size, own, pipe.multiple)
    size = order.size or own
    nearest = own if one else nearest_size(size, own, pipe.multiple)
    if order.strict and nearest != size:
        choices = [own] if one else usual_sizes(own, pipe.multiple)
        names = ", ".join(f"{width}x{height}" for width, height in choices)
        rule = (
            "" if one else f", and others near {own[0]}x{own[1]} with sides in multiples of {pipe.multiple}"
        )
        raise bad_field("size", f"{size[0]}x{size[1]}: expected {names}{rule}", "invalid_size")
    return nearest


def makes_one_size(pipe: Any) -> bool:
    """Return whether a model draws a prompt in one size only: unCLIP models, and those that draw tokens."""
    return not isinstance(pipe, LatentDiffusion)


def text_options(pipe: Any, order: ImageOrder) -> dict[str, Any]:
    """Return the options of `text_to_image` for an order without an image."""
    width, height = drawn_size(pipe, order)
    size = {} if makes_one_size(pipe) else {"width": width, "height": height}
    negative = {"negative": order.negative} if order.negative else {}
    return {"n": order.n, "seed": order.seed, "progress": False, **size, **negative, **order.options}


def draw_order(pipe: Any, order: ImageOrder) -> Images:
    """Return the images of an order.

    Raises:
        ApiError: If the model has no such task, or an option is refused before it is asked.
        ValueError: If the library refuses an option.
    """
    if order.source is not None:
        return draw_from_image(pipe, order, order.source)
    made: Images = pipe.text_to_image(order.prompt, **text_options(pipe, order))
    return made


def draw_from_image(pipe: Any, order: ImageOrder, source: SourceImage) -> Images:
    """Return the images of an order that starts from an image; see `draw_order`."""
    size = drawn_size(pipe, order)
    image = finished(source.image, size)
    options = {"n": order.n, "seed": order.seed, "progress": False, **order.options}
    if order.negative:
        options["negative"] = order.negative
    if order.endpoint == "variations":
        task(pipe, "variations", "image")
        if isinstance(pipe, UnCLIP):
            options.pop("strength", None)
        made: Images = pipe.variations(image, prompt=order.prompt, **options)
    elif source.hole is not None:
        task(pipe, "inpaint", "mask")
        usual = pipe.card.usual()
        side = max(usual.width, usual.height)
        window = {"window": side} if max(size) > side else {}
        made = pipe.inpaint(order.prompt, image, hole_of(source.hole, size), **window, **options)
    elif getattr(pipe.card, "concat", None) == "image":
        options.pop("strength", None)
        made = task(pipe, "instruct", "image")(order.prompt, image, **options)
    else:
        made = task(pipe, "image_to_image", "mask")(order.prompt, image, **options)
    return made


def hole_of(hole: Image, size: tuple[int, int]) -> torch.Tensor:
    """Return a hole (mode "L") in a (width, height) as a mask (1, 1, H, W), 1 where a pixel is repainted."""
    import numpy as np

    if hole.size != size:
        from PIL import Image as pil

        hole = hole.resize(size, pil.Resampling.BOX).point([255 if value else 0 for value in range(256)])
    return torch.from_numpy(np.array(hole))[None, None].float() / 255


def task(pipe: Any, name: str, param: str) -> Callable[..., Images]:
    """Return the method of a task; ApiError, which names a field, if the model has none."""
    method: Callable[..., Images] | None = getattr(pipe, name, None)
    if method is None:
        reason = f"{pipe.card.name!r} has no {name.replace('_', '-')}"
        hint = ": give a mask, or an image with transparent pixels" if param == "mask" else ""
        raise ApiError(400, reason + hint, param=param, code="unsupported_task")
    return method


def final_size_of(pipe: Any, order: ImageOrder, images: Images) -> tuple[int, int]:
    """Return the (width, height) in which an order's images are given."""
    if order.size is not None:
        return order.size
    if order.source is not None and not (makes_one_size(pipe) and order.endpoint == "variations"):
        return order.source.image.size
    height, width = images.tensor.shape[-2:]
    return width, height
