"""Training of the UNet of latent diffusion: cached latents, and a text tower that is frozen or tuned with it.

Rombach et al. 2022, eq. 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.prompt import escape_prompt
from ldm.data import Scene, side_by_side
from ldm.data.captions import CaptionPieces, caption_pieces, join_captions
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.models.unet import UNet, UNetConfig
from ldm.training.caches.latents import LatentSpace, read_latent_shape
from ldm.training.caches.texts import CachedTexts
from ldm.training.config import RunConfig, check_at_least
from ldm.training.diffusion import DiffusionConfig, sample_latents, zero_outputs
from ldm.training.draws import Draws
from ldm.training.images import image_grid, to_uint8
from ldm.training.inputs.emoji import EmojiImages, emoji_only
from ldm.training.inputs.files import files_only
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import Samples, words_of
from ldm.training.losses.common import diffusion_loss, draw_diffusion_loss
from ldm.training.losses.grounding import (
    Grounding,
    find_named_areas,
    freeze_all_but_cross_attention,
    grounding_losses,
    record_attention,
)
from ldm.weights.formats.ldm_folder import about_part, begin_with, read_text, write_part, write_text


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """The text tower, with its draft if it has one.

    Args:
        folder: Folder that it was exported to.
        tuned: Whether it is trained with the UNet; otherwise it is frozen. Default: False.
        cached: Whether the states of a frozen tower are kept on the disk for each caption of the data set,
            which consists of image files. Default: False.
        prior: Weight of the draft's squared error beside the diffusion loss, for a tower that is tuned
            (Popov et al. 2021). Default: 0.
    """

    folder: str
    tuned: bool = False
    cached: bool = False
    prior: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(0, prior=self.prior)
        if self.cached and self.tuned:
            raise ValueError("cached: expected false for a text tower that is tuned")
        if self.prior and not self.tuned:
            raise ValueError(f"prior {self.prior}: expected 0 for a text tower that is not tuned")


@dataclass(frozen=True, kw_only=True)
class UNetTraining:
    """The configuration of a UNet's training.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        vae: Folder of the autoencoder.
        text: The text tower.
        model: Shape of the UNet.
        diffusion: Schedule, prediction and timesteps.
        variants: Number of cached scenes that are not plain; see `CachedScenes`.
        net: Folder of a UNet of this shape to begin with; None to begin from scratch. Default: None.
        grounding: How cross-attention is taught where things are drawn; None for not at all. Default: None.
    """

    run: RunConfig
    data: DataSection
    vae: str
    text: TextSource
    model: UNetConfig
    diffusion: DiffusionConfig
    variants: int
    net: str | None = None
    grounding: Grounding | None = None

    def __post_init__(self) -> None:
        check_at_least(0, variants=self.variants)
        if self.grounding is not None and self.grounding.only and (self.text.tuned or self.net is None):
            raise ValueError(
                "grounding.only: expected a net to begin with and a text tower that is not tuned, because"
                f" nothing else is trained; got net {self.net!r} and text.tuned {self.text.tuned}"
            )


class UNetPart:
    """A UNet in training, with its text tower."""

    def __init__(self, config: UNetTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = open_images(config.data, config.run)
        if config.grounding is not None and len(emoji_only(self.images, "grounding").plain_rows()) < 2:
            raise ValueError("grounding: expected at least two training images, which validation pairs")
        channels, *_ = read_latent_shape(config.vae, self.images)
        self.text = read_text(config.text.folder).to(device).requires_grad_(config.text.tuned)
        check_input_widths(config, self.text, channels)
        torch.manual_seed(config.run.seed)
        net = UNet(config.model)
        if config.net is None:
            zero_outputs(net)
        else:
            begin_with(net, config.net, "unet")
        if config.grounding is not None and config.grounding.only:
            freeze_all_but_cross_attention(net)
        self.denoiser = Denoiser(net.to(device), config.diffusion.make(), config.diffusion.prediction)
        self.model = nn.ModuleDict({"net": net, "text": self.text})
        self.states: CachedTexts | None = None
        if config.text.cached:
            files_only(self.images, "text.cached")
            weights = about_part(config.text.folder, "text")["sha256"]
            self.states = CachedTexts(self.text, f"{weights}/{self.text.convention}", self.images.texts())
        self.scenes = self.images.cached(config.run, config.variants)
        self.latents = LatentSpace.open(config.vae, self.scenes, device)

    def read(self, captions: Sequence[str]) -> Cond:
        """Return the condition of captions, which are no prompts: signs of the syntax are text."""
        if self.states is not None:
            return self.states(captions)
        cond: Cond = self.text([escape_prompt(text) for text in captions])
        return cond

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a random batch, and its terms to log.

        The terms are the diffusion loss at high and at low t, the squared error of the draft, and grounding.
        """
        config, diffusion = self.config, self.config.diffusion
        chosen, rows = self.scenes.draw(draws)
        x0 = self.latents.sample(rows, draws)  # (B, C, h, w)
        cond = self.read(self.images.captions(chosen, draws, drop=diffusion.drop))
        with self.record_attention() as maps:
            loss, losses, t = draw_diffusion_loss(self.denoiser, diffusion, x0, cond, draws)
        high = t >= diffusion.timesteps // 2
        figures = {
            "loss_high_t": draws.mean_of_some(losses[high]),
            "loss_low_t": draws.mean_of_some(losses[~high]),
        }
        if cond.concat is not None:
            figures["prior"] = draws.mean((cond.concat.float() - x0).square())
            loss = loss + config.text.prior * figures["prior"]
        if config.grounding is not None:
            emoji = emoji_only(self.images, "grounding")
            pieces = emoji.pieces(chosen, draws, drop=diffusion.drop)  # of the same captions
            losses = self.grounding(emoji, maps, pieces, chosen)
            figures["grounding"] = draws.mean_of_some(losses).nan_to_num()
            loss = loss + config.grounding.weight * figures["grounding"]
        return loss, figures

    def record_attention(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Return the context of `record_attention` where grounding is trained, else an empty one."""
        return nullcontext({}) if self.config.grounding is None else record_attention(self.denoiser.net)

    def grounding(
        self,
        emoji: EmojiImages,
        maps: Mapping[str, Tensor],
        captions: Sequence[CaptionPieces],
        chosen: Sequence[Scene],
    ) -> Tensor:
        """Return the `grounding_losses` of attention maps under captions of scenes."""
        named = find_named_areas(captions, chosen, emoji.data.images, self.text, emoji.size)
        return grounding_losses(maps.values(), named).to(self.device)

    def sample(self, prompts: list[str], *, steps: int = 20, guidance: float = 3.0, seed: int = 0) -> Tensor:
        """Sample images of prompts.

        Args:
            prompts: B prompts.
            steps: Sampling steps. Default: 20.
            guidance: Guidance scale. Default: 3.
            seed: Seed of the first image. Default: 0.

        Returns:
            Images, (B, 3, H, W) in about [−1, 1].
        """
        z = sample_latents(
            self.denoiser,
            self.text([escape_prompt(text) for text in prompts]),
            self.text([""]),
            self.latents.shape,
            n=len(prompts),
            steps=steps,
            guidance=guidance,
            seed=seed,
        )
        return self.latents.decode(z)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.scenes.draw(draws)[0])

    def validate(self) -> dict[str, float]:
        """Return figures over 64 training images.

        The loss at fixed timesteps and noise, and the mean squared error between samples and the images of
        their captions. Where grounding is trained, also the grounding loss over 64 pairs side by side.
        """
        chosen = self.images.plain(64, seed=7)
        captions = self.images.describe(chosen)
        losses, errors = [], []
        for part in (slice(i, i + 16) for i in range(0, len(chosen), 16)):
            draws = Draws(7, range(len(chosen))[part])
            losses.append(self.fixed_loss(chosen[part], captions[part], draws).cpu())
            made = self.sample(captions[part], steps=10).cpu()
            errors.append((self.images.tensor(chosen[part]) - made).square().flatten(1).mean(1))
        figures = {"loss": float(torch.cat(losses).mean()), "sample_mse": float(torch.cat(errors).mean())}
        if self.config.grounding is not None:
            figures["pairs_grounding"] = self.pairs_grounding()
        return figures

    def fixed_loss(self, chosen: Samples, captions: list[str], draws: Draws) -> Tensor:
        """Return the losses (B,) of the mean latents of scenes at drawn timesteps and noise."""
        x0 = self.latents.encode(chosen)
        t = self.config.diffusion.draw(draws).to(self.device)
        eps = draws.normal(*x0.shape).to(self.device)
        return diffusion_loss(self.denoiser, x0, self.read(captions), t, eps)

    def pairs_grounding(self) -> float:
        """Return the mean of `grounding_losses` of 64 pairs of images, at fixed timesteps and noise."""
        emoji = emoji_only(self.images, "grounding")
        rows = [c.rows()[0] for c in emoji.plain(128, seed=8)]
        pairs = [
            side_by_side(emoji.index, first, second)
            for first, second in zip(rows[::2], rows[1::2], strict=False)
        ]
        captions = [caption_pieces(c.facts, emoji.index) for c in pairs]
        with self.record_attention() as maps:
            self.fixed_loss(pairs, join_captions(captions), Draws(8, range(len(pairs))))
        return float(self.grounding(emoji, maps, captions, pairs).mean().nan_to_num())

    def preview(self) -> np.ndarray:
        """Show samples of the data set's prompts."""
        prompts = self.images.prompts(24)
        made = torch.cat([self.sample(prompts[:12]), self.sample(prompts[12:], seed=12)])
        return image_grid(to_uint8(made), columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the UNet, and the text tower with its draft."""
        write_part(
            folder,
            "unet",
            self.denoiser.net,
            self.config.model,
            diffusion=self.config.diffusion,
            figures=self.validate(),
            training=record,
        )
        write_text(folder, self.text, words=words_of(self.images), training=record)


def check_input_widths(config: UNetTraining, text: TextConditioner, channels: int) -> None:
    """Raise ValueError unless the UNet's inputs fit the text tower, its draft and a latent's channels."""
    model = config.model
    if text.width != model.context_dim:
        raise ValueError(
            f"model.context_dim {model.context_dim}: the text tower's tokens are {text.width} wide"
        )
    draft = 0 if text.draft is None else text.draft.config.channels
    if model.in_channels != channels + draft:
        raise ValueError(
            f"model.in_channels {model.in_channels}: expected {channels + draft}, because the latent has"
            f" {channels} and the text tower's draft {draft}"
        )
    if config.text.prior and not draft:
        raise ValueError(
            f"text.prior {config.text.prior}: the text tower in {config.text.folder!r} has no draft"
        )
