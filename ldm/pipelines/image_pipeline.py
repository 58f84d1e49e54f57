"""What all pipelines share: images with their recipe, adapters, the safety checker, and watchers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.images.result import Images
from ldm.models.safety import SafetyChecker
from ldm.pipelines.adapters import Adapters
from ldm.pipelines.exemplars import Exemplars
from ldm.pipelines.protocol import Watcher
from ldm.pipelines.recipe import stamp
from ldm.pipelines.stages.stage import StepHook
from ldm.support.config import to_dict

# Observers by the identity of the pipeline, for each thread (or task).
_WATCHERS: ContextVar[Mapping[int, tuple[Watcher, ...]]] = ContextVar("watchers", default={})  # noqa: B039


class ImagePipeline(nn.Module):
    """A model that makes images, however it draws them.

    Attributes:
        origin: SHA-256 of the files and settings that images depend on, for recipes.
        loaded: Options of `ldm.load` that images depend on, for recipes.
        safety: Safety checker, applied to all images; None: no check.
    """

    def __init__(
        self, *, origin: Mapping[str, Any] | None, safety: SafetyChecker | None, text: Any = None
    ) -> None:
        super().__init__()
        self.origin: Mapping[str, Any] = {} if origin is None else origin
        self.loaded: Mapping[str, Any] = {}
        self.safety = safety
        self._adapters: Adapters | None = None
        self._exemplars: Exemplars | None = None
        if isinstance(text, ExemplarConditioner):
            self.origin = own = dict(self.origin)
            self._exemplars = Exemplars(text, own)

    @property
    def name(self) -> str:
        """Name of the model, from its card."""
        raise NotImplementedError

    @property
    def drawing(self) -> nn.Module:
        """The network that draws, whose dtype recipes state."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device that the network which draws computes on."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that it computes in."""
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
    def exemplars(self) -> Exemplars:
        """The images of things that the model is shown, to which images can be added.

        Raises:
            ValueError: If the model is not conditioned on exemplars.
        """
        if self._exemplars is None:
            raise ValueError(f"{self.name!r} has no exemplars: it is conditioned on the prompt's text alone")
        return self._exemplars

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

    def _recorded(
        self,
        pixels: Tensor,
        options: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        seeds: Sequence[int],
        prompts: Sequence[str],
        replayable: bool,
        steps: Tensor | None = None,
    ) -> Images:
        """Return images with their recipe, seen by the safety checker where there is one.

        Args:
            pixels: Images (B, 3, H, W) in [0, 1]. Those that the safety checker flags are made black if it
                says so.
            options: The task and the options of the call.
            facts: What the recipe states besides; with "because", the images are not replayable.
            seeds: The seed of each image.
            prompts: The prompt of each image.
            replayable: Whether the recipe holds all that the images depend on.
            steps: Images of every step (N, B, 3, H, W), where they were kept.
        """
        flagged, origin, facts = None, self.origin, dict(facts)
        if entries := self.adapters.entries():
            facts["adapters"] = to_dict(entries)
        if self.safety is not None:
            flagged = self.safety(pixels)
            pixels = self.safety.hide(pixels, flagged)
            if self.safety.black:
                origin = {**origin, **{f"safety/{name}": each for name, each in self.safety.origin.items()}}
                if not self.safety.origin:
                    facts.setdefault("because", "its safety checker was not loaded from a file")
        recipe = stamp(
            self.name,
            {**options, **facts},
            device=self.device,
            dtype=next(self.drawing.parameters()).dtype,
            computed_in=self.dtype,
            origin=origin,
            loaded=self.loaded,
            replayable=replayable and "because" not in facts,
        )
        return Images(
            tensor=pixels,
            seeds=tuple(seeds),
            prompts=tuple(prompts),
            recipe=recipe,
            flagged=flagged,
            steps=steps,
        )
