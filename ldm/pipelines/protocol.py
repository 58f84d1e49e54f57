"""What a task needs of a pipeline, and what a pipeline is asked to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ldm.conditioning.clip import ClipPair
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.diffusion.interfaces import Denoised
from ldm.images.result import Images
from ldm.pipelines.call import Call
from ldm.pipelines.conditions import Pair
from ldm.pipelines.stages.stage import Stage


class Known(NamedTuple):
    """A state of which a part is known.

    Attributes:
        latent: Clean state (B or 1, C, h, w).
        hole: Mask (B or 1, 1, h, w): 1 where the state is not known, 0 where it is.
    """

    latent: Tensor
    hole: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What a task asks a pipeline to draw, besides the call.

    Attributes:
        task: Name of the task, for the recipe.
        given: Images (B or 1, 3, H, W) in [0, 1] that sampling starts from. None: pure noise.
        strength: Part of the grid that is run from `given`, in [0, 1]; 1 is pure noise.
        known: A state whose known part is kept during sampling.
        draft: A state whose known part replaces the text's draft, in models that draft, or that layouts are
            fitted to, in models with exemplars. Default: `known`.
        pair: Makes the conditions of a state's size (h, w), in place of the pipeline's own.
        extra: Fields of `Cond` that are set in both conditions, such as "concat".
        image_guidance: Weight of the image condition, for models that have one.
        window: Side in pixels of what the network sees at a time. None: the whole image.
        finish: Applied to the decoded images (B, 3, H, W).
        enlarge: Whether upsamplers, where there are any, enlarge the images.
        facts: What the recipe states besides the call's options.
    """

    task: str
    given: Tensor | None = None
    strength: float = 1.0
    known: Known | None = None
    draft: Known | None = None
    pair: Callable[[tuple[int, int]], Pair] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    image_guidance: float | None = None
    window: int | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    enlarge: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Begun:
    """A drawing that is ready to be sampled.

    Attributes:
        call: The call that the images are finished by.
        over: The call over the part of its grid that is run.
        pair: The conditions of its B images.
        x: The first state (B, C, h, w).
    """

    call: Call
    over: Call
    pair: Pair
    x: Tensor


class Watcher(Protocol):
    """An observer of a pipeline's runs."""

    def begin(self, call: Call) -> None:
        """A run begins."""

    def conditioned(self, pair: Pair) -> None:
        """The conditions of the run are known."""

    def step(self, i: int, x: Tensor, d: Denoised) -> None:
        """Step i has ended, with the state behind it and the prediction that it took."""

    def end(self, images: Images) -> None:
        """The run has ended, with these images."""


class Pipeline(Protocol):
    """A model that draws images of prompts."""

    @property
    def stage(self) -> Stage:
        """The stage that makes the image."""

    def settle(self, prompt: Any, **options: Any) -> Call:
        """Settle the options of a call and check them."""

    def draw(self, call: Call, request: Request) -> Images:
        """Draw the images of a call: `begin`, sample, `complete`."""

    def begin(self, call: Call, request: Request) -> Begun:
        """Return a drawing with its conditions and its first state."""

    def complete(self, call: Call, x: Tensor, request: Request) -> Images:
        """Return the images of the last state (B, C, h, w)."""

    def finish_images(self, call: Call, pixels: Tensor, request: Request) -> Images:
        """Return images with their recipe, seen by the safety checker where there is one."""


class LatentPipeline(Pipeline, Protocol):
    """A pipeline whose conditions are made of texts or classes alone."""

    text: Any  # the conditioner; None in an unconditional model

    def conditions(self, call: Call, size: tuple[int, int]) -> Pair:
        """Return the conditions of a call's prompts for a state of size (h, w)."""

    def paired(self, call: Call, request: Request) -> Pair:
        """Return the conditions of a request, for each image of the call."""

    def image_draft(self, pixels: Tensor, *, prompted: bool = False) -> Known | None:
        """Return images in place of what the model draws of the text; None for a model that does not."""


class EmbeddingPipeline(Pipeline, Protocol):
    """A pipeline that draws images of CLIP's image embeddings."""

    clip: ClipPair

    def embed(self, what: Any, *, seed: int = 0, **options: Any) -> ImageEmbedding:
        """Return the embedding (1, E) of a text, by the prior, or of an image, by CLIP."""

    def conditions_of(
        self,
        call: Call,
        embedding: ImageEmbedding,
        *,
        image: Tensor | None = None,
        named: Sequence[str] = (),
    ) -> Pair:
        """Return the conditions of embeddings, with the texts of the call."""
