"""The exemplars of captioned images, each where the image shows it, fitted once and kept on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.prompt import escape_prompt
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.pipelines.control.hinted_layouts import hinted_condition
from ldm.pipelines.layouts import LayoutFit, fitted_condition
from ldm.support.progress import progress_bar
from ldm.support.warn import warn_user
from ldm.training.caches.latents import LatentSpace
from ldm.training.caches.rows import CACHES
from ldm.training.caches.shares import own_share, wait_for_others
from ldm.training.caches.store import TensorStore, fill
from ldm.training.inputs.cached_files import CachedFiles
from ldm.training.inputs.hints import Hints
from ldm.training.inputs.reading import ImageSample

MOST_UNKNOWN = 10  # unknown words that a warning lists


class CanvasFit(Protocol):
    """What the layout of a captioned image is fitted to."""

    @property
    def key(self) -> str:
        """A text that differs where any result differs."""

    def key_of(self, sample: ImageSample) -> str:
        """Return a text that differs where the result for an image differs, beside its own file."""

    def __call__(self, prompt: str, sample: ImageSample) -> Cond:
        """Return the condition of a prompt, of batch size 1, in the layout that fits a sample."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFit:
    """Fits layouts to images, by the model as it is before its training (`ldm.pipelines.layouts`).

    Args:
        text: The conditioner.
        denoiser: The denoiser.
        weights: Hashes of the model's weights, by part.
        latents: The latents of the images.
    """

    text: ExemplarConditioner
    denoiser: Denoiser
    weights: Mapping[str, str]
    latents: LatentSpace

    @property
    def key(self) -> str:
        """The hashes of the weights."""
        return str(sorted(self.weights.items()))

    def key_of(self, sample: ImageSample) -> str:
        """Return nothing: the image's file is all."""
        return ""

    def __call__(self, prompt: str, sample: ImageSample) -> Cond:
        """Return the condition of a prompt in the layout that fits an image; see `CanvasFit`."""
        known = self.latents.encode([sample])  # (1, C, h, w)
        fit = LayoutFit(text=self.text, denoiser=self.denoiser)
        return fitted_condition(fit, prompt, 0, known, torch.zeros_like(known[:, :1]))


@dataclass(frozen=True, kw_only=True, eq=False)
class HintFit:
    """Fits layouts to hints of edges, as calls with a control do (`ldm.pipelines.control.hinted_layouts`).

    Args:
        text: The conditioner.
        weights: Hashes of the model's weights, by part.
        hints: The hints of the images.
    """

    text: ExemplarConditioner
    weights: Mapping[str, str]
    hints: Hints

    @property
    def key(self) -> str:
        """The hashes of the weights that candidates depend on, and the kind of the hints."""
        own = {part: value for part, value in self.weights.items() if part in self.text.networks()}
        return f"{sorted(own.items())}/{self.hints.source.kind}"

    def key_of(self, sample: ImageSample) -> str:
        """Return what differs where the hint's file differs."""
        return self.hints.key(sample)

    def __call__(self, prompt: str, sample: ImageSample) -> Cond:
        """Return the condition of a prompt in the layout that agrees with a hint; see `CanvasFit`."""
        lines = self.hints([sample]).mean(1, keepdim=True)  # (1, 1, H, W)
        size = (lines.shape[-2] // self.text.cell, lines.shape[-1] // self.text.cell)
        return hinted_condition(self.text, prompt, 0, lines, size)


class FittedCanvases:
    """The conditions of captioned images for a model with exemplars.

    A caption does not state where its things lie, or which image of the library resembles them. Both are
    fitted, with seed 0.

    Args:
        text: The conditioner.
        fit: What they are fitted to.
        samples: The training images.
        validated: Images that are not trained on, but validated on.

    Raises:
        ValueError: If no caption names a thing of the library.

    Warns:
        UserWarning: Names the words of captions that the model does not read.
    """

    def __init__(
        self,
        text: ExemplarConditioner,
        fit: CanvasFit,
        samples: CachedFiles,
        validated: Sequence[ImageSample],
    ) -> None:
        self.text, self.files, self.fit = text, samples.files, fit
        config = self.files.config
        content = f"{fit.key}/{library_content_key(text)}/{config.size}/{config.background}"
        self.store = TensorStore(CACHES / f"canvases-{hashlib.sha256(content.encode()).hexdigest()[:16]}")
        captioned = [
            (caption, sample)
            for sample in (*map(samples.sample, samples.present), *validated)
            for caption in self.files.dataset.record(sample.item).captions
        ]
        named = self._naming_things({caption for caption, _ in captioned})
        pairs = {self._key(*pair): pair for pair in captioned if pair[0] in named}
        missing = [(key, pair) for key, pair in pairs.items() if key not in self.store]
        if own := own_share(missing):
            fill(self.store, self._fitted(own))
        wait_for_others()
        self.store.refresh()

    def _naming_things(self, captions: set[str]) -> set[str]:
        """Return the captions that name a thing of the library; see the class for what is raised."""
        named = {each for each in captions if self.text.read(escape_prompt(each)).things}
        unknown = sorted({word for each in captions for word in self.text.unknown(escape_prompt(each))})
        listed = f"{', '.join(unknown[:MOST_UNKNOWN])}{' …' if len(unknown) > MOST_UNKNOWN else ''}"
        if not named:
            words = f"; unknown words: {listed}" if unknown else ""
            raise ValueError(
                f"data: no caption names a thing of the model's library, from which it draws{words}."
                " pipe.exemplars.names lists them; pipe.exemplars.add and ldm.save add others"
            )
        if unknown:
            warn_user(f"captions have words that the model does not read: {listed}")
        return named

    def _key(self, caption: str, sample: ImageSample) -> str:
        """Return the key of an image under a caption."""
        content = f"{self.files.key(sample)}/{caption}{self.fit.key_of(sample)}"
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    @torch.no_grad()
    def _fitted(
        self, wanted: Sequence[tuple[str, tuple[str, ImageSample]]]
    ) -> Iterator[Mapping[str, Tensor]]:
        """Fit canvases (K, 4, H, W), and give each by its key."""
        name = f"compute {self.store.folder.name}"
        for key, (caption, sample) in progress_bar(len(wanted), iterable=wanted, desc=name):
            cond = self.fit(escape_prompt(caption), sample)
            assert cond.exemplars is not None
            yield {key: cond.exemplars[0]}

    def __call__(self, texts: Sequence[str], samples: Sequence[ImageSample]) -> Cond:
        """Return the condition of B images under texts, each a caption of its image or empty.

        The text is read by the tower as it is now, with gradients.
        """
        conds = []
        for text, sample in zip(texts, samples, strict=True):
            read = self.text.read(escape_prompt(text))
            canvas = torch.zeros(self.text.slots, 4, *sample.frame[:2], dtype=torch.float32, device="cpu")
            if read.things:
                canvas = torch.from_numpy(self.store[self._key(text, sample)]).float()  # (K, 4, H, W)
            conds.append(replace(read.text, exemplars=canvas[None].to(self.text.device)))
        return Cond.cat(conds)


def library_content_key(text: ExemplarConditioner) -> str:
    """Return a hash of the images of a conditioner's library, and of what means them."""
    found = hashlib.sha256(repr(sorted(text.library.nouns.items())).encode())
    for exemplar in text.library:
        found.update(f"\n{exemplar.name}\n{exemplar.style}\n".encode() + exemplar.content)
    return found.hexdigest()
