"""What all pipelines share: images with their recipe, the safety checker, watchers, and inpainting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.diffusion.guidance import cfg
from ldm.images.result import Images
from ldm.models.safety import SafetyChecker
from ldm.pipelines.adapters import Adapters
from ldm.pipelines.call import Call
from ldm.pipelines.control.control_use import entries_of, hint_digests
from ldm.pipelines.protocol import Request, Watcher
from ldm.pipelines.recipe import content_sha256, stamp
from ldm.pipelines.replayable import BY_OPTIONS, replayable
from ldm.pipelines.stages.stage import Guide, Stage, StepHook
from ldm.pipelines.tasks.inpaint import inpaint
from ldm.pipelines.tasks.outpaint import outpaint
from ldm.support.config import to_dict

# Observers by the identity of the pipeline, for each thread (or task).
_WATCHERS: ContextVar[Mapping[int, tuple[Watcher, ...]]] = ContextVar("watchers", default={})  # noqa: B039


class BasePipeline(nn.Module):
    """A model that draws images, whatever its conditions are made of.

    Attributes:
        origin: SHA-256 of the files and settings that images depend on, for recipes.
        loaded: Options of `ldm.load` that images depend on, for recipes.
        safety: Safety checker, applied to all images; None: no check.
        guide: Guidance method, (denoiser, cond, uncond, scale) -> DenoiseFn. Default: `ldm.cfg`. Another one,
            such as `functools.partial(ldm.cfg, interval=(0.28, 5.42))`, makes images that are not replayable.
    """

    def __init__(self, *, origin: Mapping[str, Any] | None, safety: SafetyChecker | None) -> None:
        super().__init__()
        self.origin: Mapping[str, Any] = {} if origin is None else origin
        self.loaded: Mapping[str, Any] = {}
        self.safety = safety
        self.guide: Guide = cfg
        self._adapters: Adapters | None = None

    @property
    def name(self) -> str:
        """Name of the model, from its card."""
        raise NotImplementedError

    @property
    def stage(self) -> Stage:
        """The stage that makes the image."""
        raise NotImplementedError

    def networks(self) -> Mapping[str, nn.Module]:
        """Return the networks by part."""
        raise NotImplementedError

    def readers(self) -> Mapping[str, TextConditioner]:
        """Return what reads prompts with learned words, by the part of its text tower; none by default."""
        return {}

    @property
    def adapters(self) -> Adapters:
        """The adapters of the model, such as LoRAs: load, set, remove, fuse, list (docs/adapters.md)."""
        if self._adapters is None:
            self._adapters = Adapters(self.networks, self.readers, self.name)
        return self._adapters

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

    @property
    def watchers(self) -> tuple[Watcher, ...]:
        """The observers of this thread's runs; see `watched_by`."""
        return _WATCHERS.get().get(id(self), ())

    @contextmanager
    def watched_by(self, watcher: Watcher) -> Iterator[None]:
        """Show an observer, inside a `with` block, the runs of this thread (see `ldm.trace`)."""
        outer = _WATCHERS.get()
        token = _WATCHERS.set({**outer, id(self): (*self.watchers, watcher)})
        try:
            yield
        finally:
            _WATCHERS.reset(token)

    @property
    def hooks(self) -> tuple[StepHook, ...]:
        """The step hooks of the watchers."""
        return tuple(watcher.step for watcher in self.watchers)

    def finish_images(
        self, call: Call, pixels: Tensor, request: Request, *, steps: Tensor | None = None
    ) -> Images:
        """Return images with their recipe.

        Args:
            call: The call that they were drawn by.
            pixels: Images (B, 3, H, W) in [0, 1]. Those that the safety checker flags are made black if it
                says so.
            request: The request, with the task's name and the facts for the recipe.
            steps: The prediction of every step (N, B, 3, H, W), where it was kept.
        """
        flagged, origin = None, self.origin
        facts: dict[str, Any] = {} if request.given is None else {"strength": request.strength}
        facts |= request.facts
        if entries := self.adapters.entries():
            facts["adapters"] = to_dict(entries)
        if call.controls:
            facts["control_networks"] = to_dict(entries_of(call.controls))
        if self.safety is not None:
            flagged = self.safety(pixels)
            pixels = self.safety.hide(pixels, flagged)
            if self.safety.black:
                origin = {**origin, **{f"safety/{name}": each for name, each in self.safety.origin.items()}}
                if not self.safety.origin:
                    facts["because"] = "its safety checker was not loaded from a file"
        if inputs := hint_digests(call.controls):
            facts["because"] = "its hints were given in memory, which a recipe does not hold: give files"
        if call.latents is not None:
            inputs["latents"] = content_sha256(call.latents)
        if inputs:
            facts["inputs"] = inputs
        if self.guide is not cfg:
            facts["because"] = "it was made with a guidance method that a recipe does not hold"
        recipe = stamp(
            self.name,
            {**call.recipe(request.task), **facts},
            device=self.device,
            dtype=next(self.stage.denoiser.parameters()).dtype,
            computed_in=self.dtype,
            origin=origin,
            loaded=self.loaded,
            replayable=call.replayable and request.task in BY_OPTIONS and "because" not in facts,
        )
        return Images(
            tensor=pixels, seeds=call.seeds, prompts=call.texts, recipe=recipe, flagged=flagged, steps=steps
        )

    inpaint = replayable(inpaint)
    outpaint = replayable(outpaint)
