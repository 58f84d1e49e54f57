"""Training the draft: a text tower and the layers behind it learn the latent of a caption by squared error
(Popov et al. 2021, the prior loss)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.data import Composition, caption, held_out_pair
from ldm.data.captions import vocabulary
from ldm.data.palette import PALETTE
from ldm.models.draft import Draft, DraftConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.training.config import DataConfig, RunConfig, share
from ldm.training.data import Pictures, picture_grid, to_uint8
from ldm.training.latents import LatentCache
from ldm.training.loop import Draws
from ldm.weights.formats.ldm_folder import read_part, read_text, write_text


@dataclass(frozen=True, kw_only=True)
class DraftTraining:
    """The configuration of a draft's training. ``text``: the folder of the tower to begin with, and of its
    draft if it has one already, which may be less wide or lack its `Finish`; ``drop``: the share of captions
    made empty.
    """

    run: RunConfig
    data: DataConfig
    vae: str
    text: str
    model: DraftConfig
    variants: int
    drop: float = 0.1

    def __post_init__(self) -> None:
        share(drop=self.drop)


class DraftPart:
    """A text tower and its draft in training."""

    def __init__(self, config: DraftTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.pictures = Pictures(config.data)
        vae, about = read_part(config.vae, "vae", VAEConfig, AutoencoderKL)
        assert isinstance(vae, AutoencoderKL)
        self.vae = vae.to(device)
        latent = (vae.config.latent_channels, config.data.size // vae.config.factor)
        if (config.model.channels, config.model.size) != latent:
            got = f"{config.model.channels} of {config.model.size}"
            raise ValueError(
                f"model: expected {latent[0]} channels of size {latent[1]}, as the latent has, got {got}"
            )
        text = read_text(config.text)
        torch.manual_seed(config.run.seed)
        if text.draft is None:
            text = TextConditioner(
                text.tower, text.tokenizer, text.convention, text.words, Draft(config.model)
            )
        elif text.draft.config != config.model:
            try:
                text.draft = text.draft.grown(config.model)
            except ValueError as error:
                raise ValueError(f"model: in {config.text!r}, {error}") from None
        self.text = text.to(device).requires_grad_(True)
        self.model: nn.Module = self.text
        self.cache = LatentCache.of_run(config.run, self.pictures, self.vae, about, config.variants)

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = [self.cache.choose(c, draws.rng) for c in self.pictures.draw(draws.rng, batch)]
        x0 = self.cache.sample([row for _, row in chosen], draws).to(self.device)  # (B, C, h, w)
        captions = [
            "" if draws.rng.random() < self.config.drop else caption(c, self.pictures.data.index, draws.rng)
            for c, _ in chosen
        ]
        return (self.draft(captions) - x0).square().mean(), {}

    def draft(self, captions: Sequence[str], group: int = 16) -> Tensor:
        """Drafts of captions, (B, C, h, w) float32; computed in groups of like length, for a long caption
        makes all beside it as long."""
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        parts = [
            self.text([captions[i] for i in order[start : start + group]]).concat
            for start in range(0, len(order), group)
        ]
        drafts = torch.cat([part for part in parts if part is not None]).float()
        return drafts[torch.tensor(order, device=drafts.device).argsort()]

    def validate(self) -> dict[str, float]:
        """Mean squared errors over 256 noto names on white and 64 pairs of name and ground that training
        never sees; and how often the nearest latent of the 256 is the asked name's."""
        index = self.pictures.data.index
        plain = [
            Composition(image=int(row))
            for row in np.random.default_rng(7).permutation(index.train_of["noto"])[:256]
        ]
        pairs = [
            replace(c, background=ground)
            for c in plain
            for ground in PALETTE
            if held_out_pair(index[c.image].name, ground)
        ][:64]
        # (256, C·h·w)
        drafts, truth = (
            self.draft([caption(c, index) for c in plain]).cpu().flatten(1),
            self.encode(plain).flatten(1),
        )
        hits = torch.cdist(drafts, truth).argmin(1) == torch.arange(len(plain))
        figures = {
            "plain_mse": float((drafts - truth).square().mean()),
            "plain_top1": float(hits.float().mean()),
        }
        if pairs:
            figures["held_out_pairs_mse"] = float(
                (self.draft([caption(c, index) for c in pairs]).cpu() - self.encode(pairs)).square().mean()
            )
        return figures

    def encode(self, compositions: Sequence[Composition]) -> Tensor:
        """The scaled latents' means of compositions, (B, C, h, w)."""
        parts = self.pictures.tensor(compositions).to(self.device).split(32)
        return self.cache.scale * torch.cat([self.vae.encode(x).mean for x in parts]).cpu()

    def preview(self) -> np.ndarray:
        index = self.pictures.data.index
        rows = np.random.default_rng(3).permutation(index.train_of["noto"])[:16]
        chosen = [
            Composition(image=int(row), background=(None, "blue", None, "yellow")[i % 4])
            for i, row in enumerate(rows)
        ]
        drafts = self.vae.decode(self.draft([caption(c, index) for c in chosen]) / self.cache.scale)
        return picture_grid(
            to_uint8(torch.stack([self.pictures.tensor(chosen), drafts.cpu()], 1).flatten(0, 1)), columns=8
        )

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        write_text(
            folder,
            self.text,
            words=sorted(vocabulary(self.pictures.data.index)),
            figures=self.validate(),
            training=record,
        )
