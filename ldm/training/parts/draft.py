"""Training of the draft: a text tower and the layers behind it predict the latent of a caption's image.

The loss is the squared error (the prior loss of Popov et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.conditioning.conditioner import TextConditioner
from ldm.models.draft import Draft, DraftConfig
from ldm.training.caches.latents import LatentSpace, check_draft_shape, read_latent_shape
from ldm.training.config import RunConfig, check_at_least, check_fraction
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.emoji import EmojiImages
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import words_of
from ldm.weights.formats.ldm_folder import read_text, write_text


@dataclass(frozen=True, kw_only=True)
class DraftTraining:
    """The configuration of a draft's training.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        vae: Folder of the autoencoder.
        text: Folder of the text tower to begin with. A draft in it is continued; it may be narrower than
            `model`, or lack its `Finish`.
        model: Shape of the draft.
        variants: Number of cached scenes that are not plain; see `CachedScenes`.
        drop: Share of captions replaced by the empty one. Default: 0.1.
    """

    run: RunConfig
    data: DataSection
    vae: str
    text: str
    model: DraftConfig
    variants: int
    drop: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(0, variants=self.variants)
        check_fraction(drop=self.drop)


class DraftPart:
    """A text tower and its draft in training."""

    def __init__(self, config: DraftTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = open_images(config.data, config.run)
        check_draft_shape(config.model, read_latent_shape(config.vae, self.images))
        text = with_draft(read_text(config.text), config)
        self.text = text.to(device).requires_grad_(True)
        self.model = self.text
        self.scenes = self.images.cached(config.run, config.variants)
        self.latents = LatentSpace.open(config.vae, self.scenes, device)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of the drafts of a random batch."""
        chosen, rows = self.scenes.draw(draws)
        x0 = self.latents.sample(rows, draws)  # (B, C, h, w)
        captions = self.images.captions(chosen, draws, drop=self.config.drop)
        return draws.mean((self.draft(captions) - x0).square()), {}

    def draft(self, captions: Sequence[str], group: int = 16) -> Tensor:
        """Compute the drafts of captions, (B, C, h, w) float32.

        Captions are grouped by length, because a batch is padded to its longest caption.
        """
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        parts = [
            self.text([captions[i] for i in order[start : start + group]]).concat
            for start in range(0, len(order), group)
        ]
        drafts = torch.cat([part for part in parts if part is not None]).float()
        return drafts[torch.tensor(order, device=drafts.device).argsort()]

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.scenes.draw(draws)[0])

    def validate(self) -> dict[str, float]:
        """Return mean squared errors and the retrieval accuracy of drafts from canonical captions.

        Errors are over 256 training images, and of the emoji over 64 held-out (name, background) pairs. The
        accuracy is how often the latent nearest to a draft is its own, of the 256.
        """
        plain = self.images.plain(256, seed=7)
        drafts = self.draft(self.images.describe(plain)).cpu().flatten(1)  # (256, C·h·w)
        truth = self.latents.encode(plain).cpu().flatten(1)
        hits = torch.cdist(drafts, truth).argmin(1) == torch.arange(len(plain), device="cpu")
        figures = {
            "plain_mse": float((drafts - truth).square().mean()),
            "plain_top1": float(hits.float().mean()),
        }
        if isinstance(self.images, EmojiImages) and (pairs := self.images.held_out_pairs(plain)[:64]):
            drafts = self.draft(self.images.describe(pairs)).cpu()
            figures["held_out_pairs_mse"] = float((drafts - self.latents.encode(pairs).cpu()).square().mean())
        return figures

    def preview(self) -> np.ndarray:
        """Show training images, each with the draft of its caption."""
        chosen = self.images.plain(16, seed=3)
        if isinstance(self.images, EmojiImages):
            chosen = self.images.on_backgrounds(chosen, [None, "blue", None, "yellow"])
        drafts = self.latents.decode(self.draft(self.images.describe(chosen)))
        return comparison_grid(self.images.tensor(chosen), drafts, columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the text tower and its draft."""
        write_text(
            folder,
            self.text,
            words=words_of(self.images),
            figures=self.validate(),
            training=record,
        )


def with_draft(text: TextConditioner, config: DraftTraining) -> TextConditioner:
    """Give a text tower a new draft of the configured shape, or let its own draft grow to that shape.

    Raises:
        ValueError: If the tower's draft cannot grow to the shape.
    """
    torch.manual_seed(config.run.seed)
    if text.draft is None:
        return TextConditioner(
            text.tower, text.tokenizer, text.convention, text.known_words, Draft(config.model)
        )
    if text.draft.config != config.model:
        try:
            text.draft = text.draft.grown(config.model)
        except ValueError as error:
            raise ValueError(f"model: in {config.text!r}, {error}") from None
    return text
