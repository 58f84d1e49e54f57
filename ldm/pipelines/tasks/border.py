"""A canvas with a hole, filled: what inpainting and outpainting share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images.canvas import Canvas, check_border
from ldm.images.result import Images
from ldm.pipelines.protocol import Known, Pipeline, Request
from ldm.pipelines.stages.stage import Stage
from ldm.pipelines.tasks.sized import settle_size
from ldm.samplers.repaint import repaint

REACH = 8  # by default, the correction at a border reaches an eighth of the model's side


@dataclass(frozen=True, kw_only=True)
class Border:
    """How a new part is made to fit the given image.

    Attributes:
        seam: Distance in pixels over which the new part is corrected to meet the known one; 0: no correction.
            Where the step across the border is larger than the given image's own, it is reduced to that.
            None: an eighth of the model's side.
        feather: Width in pixels, inside the hole, of the transition from the given image to the new one.
        resample: Number of times that each stretch of `jump` steps is taken (RePaint, Lugmayr et al. 2022).
        jump: Steps in such a stretch.
        window: Side in pixels of what the network sees at a time. None: the whole image.
    """

    seam: float | None = None
    feather: int = 0
    resample: int = 1
    jump: int = 5
    window: int | None = None

    def on(self, stage: Stage) -> Border:
        """Return the border with its seam settled for a stage; ValueError for a wrong seam or feather."""
        seam = stage.side / REACH if self.seam is None else float(self.seam)
        check_border(seam, self.feather)
        return replace(self, seam=seam)

    @property
    def facts(self) -> dict[str, Any]:
        """The border as a recipe states it."""
        return {
            "resample": self.resample,
            "jump": self.jump,
            "seam": self.seam,
            "feather": self.feather,
            "window": self.window,
        }


def fill_canvas(
    pipe: Pipeline,
    task: str,
    prompt: Any,
    canvas: Canvas,
    border: Border,
    options: Mapping[str, Any],
    *,
    strength: float = 1.0,
    facts: Mapping[str, Any] | None = None,
) -> Images:
    """Draw the hole of a canvas and put the known pixels back.

    Args:
        pipe: The pipeline.
        task: Name of the task, for the recipe.
        prompt: What to draw.
        canvas: Images with a hole.
        border: How the new part is made to fit.
        options: Options of the call.
        strength: Part of the grid that is run from the canvas's images; 1: pure noise.
        facts: What the recipe states besides.
    """
    stage = pipe.stage
    border = border.on(stage)
    stage.tile(canvas.size, border.window)
    call = settle_size(pipe, prompt, canvas.pixels, options, canvas.frame)
    if len(canvas.hole) not in (1, len(call.seeds)):
        raise ValueError(
            f"mask: {len(canvas.hole)} masks for {len(call.seeds)} images to be made; expected one, or one"
            " for each"
        )
    if border.resample != 1:
        call = replace(call, solve=repaint(call.solve, times=border.resample, jump=border.jump))
    concat, known = HOLES.get(stage.concat, keep_hole)(stage, canvas, strength)
    request = Request(
        task=task,
        given=canvas.pixels if strength < 1 or task == "inpaint" else None,
        strength=strength,
        known=known,
        extra={} if concat is None else {"concat": concat},
        window=border.window,
        finish=lambda made: canvas.finish(made, seam=border.seam or 0.0, feather=border.feather),
        enlarge=False,
        facts={**(facts or {}), **border.facts},
    )
    return pipe.draw(call, request)


# The channels joined to x_t, and the part of the state that is kept during sampling; None where there is
# none.
Hole = tuple[Tensor | None, Known | None]


def keep_hole(stage: Stage, canvas: Canvas, strength: float) -> Hole:
    """An ordinary model: what is known of the state is kept. A position is new if any of its pixels is."""
    latent = stage.encode(canvas.filled() if strength == 1 else canvas.pixels)
    return None, Known(latent, canvas.small(latent.shape[-2:]).to(latent.device))


def mask_then_latent(stage: Stage, canvas: Canvas, strength: float) -> Hole:
    """Stable Diffusion's inpainting models: the mask, then the latent of the image with a grey hole."""
    latent, small = _masked_latent(stage, canvas, 0.5)
    return torch.cat([small, latent], dim=1), None


def latent_then_mask(stage: Stage, canvas: Canvas, strength: float) -> Hole:
    """LDM's inpainting model: the latent of the image with a black hole, then the mask in [−1, 1]."""
    latent, small = _masked_latent(stage, canvas, 0.0)
    return torch.cat([latent, 2 * small - 1], dim=1), None


def known_then_mask(stage: Stage, canvas: Canvas, strength: float) -> Hole:
    """Kandinsky's inpainting models: the known latent and the mask of what is known; it is also kept."""
    latent = stage.encode(canvas.pixels)
    hole = widen_hole(canvas.small(latent.shape[-2:]).to(latent.device))
    concat = torch.cat([latent * (1 - hole), (1 - hole).expand(len(latent), -1, -1, -1)], dim=1)
    return concat, Known(latent, hole)


def _masked_latent(stage: Stage, canvas: Canvas, fill: float) -> tuple[Tensor, Tensor]:
    latent = stage.encode(canvas.pixels * (1 - canvas.hole) + canvas.hole * fill)
    small = F.interpolate(canvas.hole, latent.shape[-2:])  # nearest
    return latent, small.to(latent.device).expand(len(latent), -1, -1, -1)


def widen_hole(hole: Tensor) -> Tensor:
    """Return a hole (B, 1, h, w) with its neighbours, except the upper right and the lower left ones.

    This is where Kandinsky's inpainting models know nothing.
    """
    padded = F.pad(hole, (1, 1, 1, 1))
    h, w = hole.shape[-2:]
    shifts = ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2))
    return torch.stack([padded[..., i : i + h, j : j + w] for i, j in shifts]).amax(0)


# How models with input channels for a hole are given it, by `Stage.concat`.
HOLES: dict[str | None, Callable[[Stage, Canvas, float], Hole]] = {
    "inpaint": mask_then_latent,
    "inpaint-ldm": latent_then_mask,
    "known": known_then_mask,
}
