"""Inpainting and outpainting by unCLIP: pictures with a part made anew, and all else as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.constraints import keep_known
from ldm.diffusion.interfaces import DenoiseFn
from ldm.images.canvas import Canvas, check_border
from ldm.images.pixels import ImageInput
from ldm.images.result import Images
from ldm.pipelines.painting import REACH
from ldm.pipelines.replayable import replayable
from ldm.pipelines.unclip_options import decoders, priors, told
from ldm.samplers.repaint import repaint

if TYPE_CHECKING:
    from ldm.pipelines.unclip import UnCLIP


class UnCLIPPainting:
    """The tasks of `UnCLIP` that fill a hole; the upsamplers rest."""

    @replayable
    def inpaint(
        self: UnCLIP,
        prompt: str | Sequence[str],
        image: ImageInput,
        mask: ImageInput,
        *,
        candidates: int = 1,
        resample: int = 1,
        jump: int = 5,
        seam: float | None = None,
        feather: int = 0,
        window: int | None = None,
        **options: Any,
    ) -> Images:
        """Pictures of a prompt in which the masked part (white) is made anew and every other pixel equals the
        given one.

        The decoder keeps what is known of the latent as it is; a model with input channels for it is also
        given it, and where it is. ``candidates`` and ``options``: as in `text_to_image`; the others: as in
        `LatentDiffusion.inpaint`.
        """
        canvas = Canvas.masked(image, mask, multiple=self.decoder.multiple)
        return self._paint(
            "inpaint", prompt, canvas, options, candidates, resample, jump, seam, feather, window
        )

    @replayable
    def outpaint(
        self: UnCLIP,
        prompt: str | Sequence[str],
        image: ImageInput,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        candidates: int = 1,
        resample: int = 1,
        jump: int = 5,
        seam: float | None = None,
        feather: int = 0,
        window: int | None = None,
        **options: Any,
    ) -> Images:
        """Pictures of a prompt with more around a given one, by so many pixels at each side, its pixels
        unchanged; options as in `inpaint`.

        ``window``: None for the decoder's own side; what outgrows it is made in windows that overlap by half.
        """
        canvas = Canvas.extended(
            image, left=left, right=right, top=top, bottom=bottom, multiple=self.decoder.multiple
        )
        about = {"left": left, "right": right, "top": top, "bottom": bottom}
        window = self._side() if window is None else window
        return self._paint(
            "outpaint", prompt, canvas, options, candidates, resample, jump, seam, feather, window, about
        )

    def _side(self: UnCLIP) -> int:
        return max(self.card.decoder.defaults.height, self.card.decoder.defaults.width)

    def _paint(
        self: UnCLIP,
        task: str,
        prompt: Any,
        canvas: Canvas,
        options: Mapping[str, Any],
        candidates: int,
        resample: int,
        jump: int,
        seam: float | None,
        feather: int,
        window: int | None,
        about: Mapping[str, Any] | None = None,
    ) -> Images:
        """The pictures of a canvas: its hole made anew, its known pixels put back."""
        reach = self._side() / REACH if seam is None else float(seam)
        check_border(reach, feather)
        for name, side in zip(("height", "width"), canvas.frame, strict=True):
            if options.get(name) not in (None, side):
                raise ValueError(f"{name} {options[name]}: the picture has {side}; resize it first")
        call = self._settle(
            prompt, **{**decoders(options), "height": canvas.size[0], "width": canvas.size[1]}
        )
        for what, count in (("pictures", len(canvas.pixels)), ("masks", len(canvas.hole))):
            if count not in (1, len(call.seeds)):
                raise ValueError(
                    f"{count} {what} for {len(call.seeds)} to be made: expected one, or one for each"
                )
        if resample != 1:
            call = replace(call, solve=repaint(call.solve, times=resample, jump=jump))
        embedding = self.imagine(
            call.prompts, negative=call.negative, seed=call.seeds, candidates=candidates, **priors(options)
        )
        given = self.card.concat == "known"
        known = self.decoder.space.encode(canvas.pixels if given else canvas.filled(), self.device)
        hole = canvas.small(known.shape[-2:]).to(known.device)
        hole = widened(hole) if given else hole
        concat = (
            torch.cat([known * (1 - hole), (1 - hole).expand(len(known), -1, -1, -1)], dim=1)
            if given
            else None
        )

        def wrap(fn: DenoiseFn) -> DenoiseFn:
            return keep_known(fn, self.decoder.denoiser.schedule, known, hole)

        def finish(made: Tensor) -> Tensor:
            return canvas.finish(made, seam=reach, feather=feather)

        facts = {
            **(about or {}),
            "candidates": candidates,
            "resample": resample,
            "jump": jump,
            "seam": reach,
            "feather": feather,
            "window": window,
        }
        rest, facts = {**options, "upsample": False}, {**facts, **told(options)}
        return self._decode(
            task, call, embedding, rest, facts, concat=concat, wrap=wrap, finish=finish, window=window
        )


def widened(hole: Tensor) -> Tensor:
    """A hole (B, 1, h, w) and its neighbours, but those to the upper right and the lower left: where
    Kandinsky's models know nothing."""
    seen = F.pad(hole, (1, 1, 1, 1))
    h, w = hole.shape[-2:]
    shifts = ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2))
    return torch.stack([seen[..., i : i + h, j : j + w] for i, j in shifts]).amax(0)
