"""What the pipelines of diffusion models share: their stage, their guidance, and inpainting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.guidance import cfg
from ldm.images.result import Images
from ldm.models.safety import SafetyChecker
from ldm.pipelines.call import Call
from ldm.pipelines.control.control_use import entries_of, hint_digests
from ldm.pipelines.image_pipeline import ImagePipeline
from ldm.pipelines.protocol import Request
from ldm.pipelines.recipe import content_sha256
from ldm.pipelines.replayable import BY_OPTIONS, replayable
from ldm.pipelines.stages.stage import Guide, Stage
from ldm.pipelines.tasks.inpaint import inpaint
from ldm.pipelines.tasks.outpaint import outpaint
from ldm.support.config import to_dict


class BasePipeline(ImagePipeline):
    """A diffusion model that draws images, whatever its conditions are made of.

    Attributes:
        guide: Guidance method, (denoiser, cond, uncond, scale) -> DenoiseFn. Default: `ldm.cfg`. Another one,
            such as `functools.partial(ldm.cfg, interval=(0.28, 5.42))`, makes images that are not replayable.
    """

    def __init__(
        self, *, origin: Mapping[str, Any] | None, safety: SafetyChecker | None, text: Any = None
    ) -> None:
        super().__init__(origin=origin, safety=safety, text=text)
        self.guide: Guide = cfg

    @property
    def stage(self) -> Stage:
        """The stage that makes the image."""
        raise NotImplementedError

    @property
    def drawing(self) -> nn.Module:
        """The denoiser."""
        return self.stage.denoiser

    @property
    def device(self) -> torch.device:
        """Device that the denoiser computes on."""
        return self.stage.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the denoiser computes in; the state of a sampler is float32."""
        return self.stage.dtype

    @property
    def multiple(self) -> int:
        """Number of which the sides of an image must be multiples; see `Stage.multiple`."""
        return self.stage.multiple

    def finish_images(
        self, call: Call, pixels: Tensor, request: Request, *, steps: Tensor | None = None
    ) -> Images:
        """Return images with their recipe.

        Args:
            call: The call that they were drawn by.
            pixels: Images (B, 3, H, W) in [0, 1]; see `ImagePipeline._recorded`.
            request: The request, with the task's name and the facts for the recipe.
            steps: The prediction of every step (N, B, 3, H, W), where it was kept.
        """
        facts: dict[str, Any] = {} if request.given is None else {"strength": request.strength}
        facts |= request.facts
        if call.controls:
            facts["control_networks"] = to_dict(entries_of(call.controls))
        if inputs := hint_digests(call.controls):
            facts["because"] = "its hints were given in memory, which a recipe does not hold: give files"
        if call.latents is not None:
            inputs["latents"] = content_sha256(call.latents)
        if inputs:
            facts["inputs"] = inputs
        if self.guide is not cfg:
            facts["because"] = "it was made with a guidance method that a recipe does not hold"
        return self._recorded(
            pixels,
            call.recipe(request.task),
            facts,
            seeds=call.seeds,
            prompts=call.texts,
            replayable=call.replayable and request.task in BY_OPTIONS,
            steps=steps,
        )

    inpaint = replayable(inpaint)
    outpaint = replayable(outpaint)
