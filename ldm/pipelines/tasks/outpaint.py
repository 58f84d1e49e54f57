"""Outpainting: an image is continued beyond its sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm.images.canvas import Canvas
from ldm.images.pixels import ImageInput
from ldm.images.result import Images
from ldm.pipelines.control.control_use import as_controls
from ldm.pipelines.control.hints import of_canvas
from ldm.pipelines.protocol import Pipeline
from ldm.pipelines.tasks.border import Border, fill_canvas


def outpaint(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    image: ImageInput,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    resample: int = 1,
    jump: int = 5,
    seam: float | None = None,
    feather: int = 0,
    window: int | None = None,
    **options: Any,
) -> Images:
    """Continue an image beyond its sides; the given pixels are kept.

    Args:
        prompt: What the whole image shows.
        image: One image, or one for each image to be made; see `ldm.images.pixels.to_pixels`.
        left, right, top, bottom: Pixels to add at each side.
        resample, jump, seam, feather: As in `inpaint`.
        window: Side in pixels of what the network sees at a time. A larger canvas is covered by windows that
            overlap by half, blended at every step (Bar-Tal et al. 2023). Default: the model's own side.
        options: Options of `text_to_image`. The hint of a control (`controls`) that has the image's size is
            extended with it; see `ldm.pipelines.control.hints.extended`. Any other one is of the canvas.

    Raises:
        ValueError: If no side grows, or an option is wrong.
    """
    stage = pipe.stage
    canvas = Canvas.extended(image, left=left, right=right, top=top, bottom=bottom, multiple=stage.multiple)
    if options.get("controls") is not None:
        size = (canvas.frame[0] - top - bottom, canvas.frame[1] - left - right)
        controls = of_canvas(as_controls(options["controls"]), size, (left, right, top, bottom))
        options = {**options, "controls": controls}
    window = stage.side if window is None else window
    border = Border(seam=seam, feather=feather, resample=resample, jump=jump, window=window)
    facts = {"left": left, "right": right, "top": top, "bottom": bottom}
    return fill_canvas(pipe, "outpaint", prompt, canvas, border, options, facts=facts)
