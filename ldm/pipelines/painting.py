"""Inpainting and outpainting: pictures with a part made anew, and all else as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images.canvas import Canvas, check_border
from ldm.images.pixels import ImageInput
from ldm.images.result import Images
from ldm.pipelines.replayable import replayable
from ldm.samplers.repaint import repaint

if TYPE_CHECKING:
    from ldm.pipelines.latent import LatentDiffusion

REACH = 8  # the correction at a border reaches an eighth of the model's side


class Painting:
    """The tasks of `LatentDiffusion` that fill a hole."""

    @replayable
    def inpaint(
        self: LatentDiffusion,
        prompt: str | Sequence[str],
        image: ImageInput,
        mask: ImageInput,
        *,
        strength: float = 1.0,
        resample: int = 1,
        jump: int = 5,
        seam: float | None = None,
        feather: int = 0,
        window: int | None = None,
        **options: Any,
    ) -> Images:
        """Pictures in which the masked part is made anew and every other pixel equals the given one; options
        as in `text_to_image`.

        ``image``, ``mask``: see `to_pixels`; one, or one for each picture. The mask is white (1) where to
        repaint, of the picture's size, cut at one half, and not black all over; white all over repaints all.
        A size that does not fit is padded by repeating the last column and row, with a `Padded` warning. A
        model with input channels for mask and picture is given both; any other keeps the known part of the
        latent (`keep_known`), a latent position being repainted if any of its pixels is; one that drafts
        begins from the draft of the hole, half of the grid being run, where the draft covers the picture.
        What the mask hides is not looked at, unless ``strength`` (as in `image_to_image`) is below 1.
        ``resample``: how often each stretch of ``jump`` steps is taken (RePaint, Lugmayr et al. 2022), 1 for
        once. ``seam``: over how many pixels the new part is corrected to meet the known one, None for an
        eighth of the model's side, 0 for not at all; where the step made across the border is larger than the
        given picture's own, it is brought down to them. ``feather``: over so many pixels inside the mask, the
        given picture passes over into the new one. ``window``: the side in pixels of what the network sees at
        a time, None for the whole picture.
        """
        canvas = Canvas.masked(image, mask, multiple=self.multiple)
        return self._paint(
            "inpaint", prompt, canvas, options, strength, resample, jump, seam, feather, window
        )

    @replayable
    def outpaint(
        self: LatentDiffusion,
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
        """Pictures with more around them, by so many pixels at each side, the given pixels unchanged; options
        as in `inpaint`.

        ``window``: None for the model's own side. A canvas that outgrows it is made in windows that overlap
        by half, their predictions blended at every step (Bar-Tal et al. 2023).
        """
        canvas = Canvas.extended(
            image, left=left, right=right, top=top, bottom=bottom, multiple=self.multiple
        )
        window = max(self.card.defaults.height, self.card.defaults.width) if window is None else window
        about = {"left": left, "right": right, "top": top, "bottom": bottom}
        return self._paint(
            "outpaint", prompt, canvas, options, 1.0, resample, jump, seam, feather, window, about
        )

    def _paint(
        self: LatentDiffusion,
        task: str,
        prompt: Any,
        canvas: Canvas,
        options: Mapping[str, Any],
        strength: float,
        resample: int,
        jump: int,
        seam: float | None,
        feather: int,
        window: int | None,
        about: Mapping[str, Any] | None = None,
    ) -> Images:
        """The pictures of a canvas: its hole made anew, its known pixels put back."""
        reach = (
            max(self.card.defaults.height, self.card.defaults.width) / REACH if seam is None else float(seam)
        )
        pixels, call = self._of_size(prompt, canvas.pixels, options, canvas.frame)
        if len(canvas.hole) not in (1, len(call.seeds)):
            raise ValueError(
                f"mask: {len(canvas.hole)} masks for {len(call.seeds)} pictures to be made; expected one, or"
                " one for each"
            )
        if resample != 1:
            call = replace(call, solve=repaint(call.solve, times=resample, jump=jump))
        check_border(reach, feather)
        facts = {
            **(about or {}),
            "resample": resample,
            "jump": jump,
            "seam": reach,
            "feather": feather,
            "window": window,
        }
        shared: dict[str, Any] = {"strength": strength, "window": window, "about": facts}
        if strength < 1 or task == "inpaint":
            shared["given"] = pixels

        def finish(made: Tensor) -> Tensor:
            return canvas.finish(made, seam=reach, feather=feather)

        if self.card.concat in ("inpaint", "inpaint-ldm"):
            return self._sample(
                task,
                call,
                extra={"concat": self._masked(canvas.pixels, canvas.hole)},
                finish=finish,
                **shared,
            )
        known = self.encode(canvas.filled() if strength == 1 else canvas.pixels)
        return self._sample(
            task,
            call,
            known=(known, canvas.small(known.shape[-2:]).to(known.device)),
            finish=finish,
            **shared,
        )

    def _masked(self: LatentDiffusion, pixels: Tensor, hole: Tensor) -> Tensor:
        """The channels of an inpainting model: mask and latent of the picture with a hole, grey (0 in [−1,
        1]), or black in LDM's own."""
        ldm_own = self.card.concat == "inpaint-ldm"
        z = self.encode(pixels * (1 - hole) + hole * (0.0 if ldm_own else 0.5))
        small = F.interpolate(hole, z.shape[-2:]).to(z.device).expand(len(z), -1, -1, -1)  # nearest
        return torch.cat([z, 2 * small - 1], dim=1) if ldm_own else torch.cat([small, z], dim=1)
