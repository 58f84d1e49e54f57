"""Training the latent diffusion model: a UNet on cached latents, its text tower frozen or tuned with it
(Rombach et al. 2022, eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data import Composition, caption
from ldm.data.captions import CaptionPieces, caption_pieces, join_captions, vocabulary
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import cfg
from ldm.diffusion.interfaces import Prediction
from ldm.diffusion.noise import initial_noise
from ldm.diffusion.schedule import NoiseSchedule, ScheduleName
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.samplers.ode.dpmpp_2m import dpmpp_2m
from ldm.training.config import DataConfig, RunConfig, at_least, share
from ldm.training.data import Pictures, picture_grid, to_uint8
from ldm.training.grounding import Grounding, attended, grounding_loss, learn_where_to_look, named
from ldm.training.latents import LatentCache
from ldm.training.loop import Draws
from ldm.training.losses import diffusion_loss
from ldm.weights.formats.ldm_folder import begin_with, read_part, read_text, write_part, write_text


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The schedule, what is predicted, and how training weights the timesteps.

    ``min_snr``: losses are weighted as min(SNR, γ) would weight x0's (Hang et al. 2023), None for the
    prediction's own weighting. ``drop``: the share of captions replaced by the empty one, for guidance.
    ``shift``: timesteps are drawn as s·u/(1 + (s − 1)·u) of a uniform u, so that s > 1 has more of the noisy
    ones (Esser et al. 2024, eq. 23).
    """

    schedule: ScheduleName = "cosine"
    timesteps: int = 1000
    prediction: Prediction = "v"
    min_snr: float | None = None
    drop: float = 0.1
    shift: float = 1.0

    def __post_init__(self) -> None:
        at_least(2, timesteps=self.timesteps)
        share(drop=self.drop)
        if not self.shift > 0:
            raise ValueError(f"shift: expected a positive number, got {self.shift}")
        if self.min_snr is not None and self.min_snr <= 0:
            raise ValueError(f"min_snr: expected a positive number, got {self.min_snr}")

    def make(self) -> NoiseSchedule:
        """The schedule's tables."""
        return NoiseSchedule.make(self.schedule, self.timesteps)

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """Timesteps of a batch, (B,) int64: one in every B-th of their distribution."""
        u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        return (
            (self.shift * u / (1 + (self.shift - 1) * u) * self.timesteps)
            .long()
            .clamp_max(self.timesteps - 1)
        )

    def weight(self, snr: Tensor) -> Tensor:
        """The weight of the raw prediction's squared error at a signal-to-noise ratio."""
        if self.min_snr is None:
            return torch.ones_like(snr)
        # the loss in terms of x0's error
        own = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[self.prediction]
        return snr.clamp(max=self.min_snr) / own


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """The text tower, and its draft if it has one: the folder they were exported to, and whether they learn
    on with the UNet or stay as they are.

    ``prior``: the weight of the draft's own squared error beside the diffusion's where they are tuned (Popov
    et al. 2021).
    """

    folder: str
    tuned: bool = False
    prior: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, prior=self.prior)
        if self.prior and not self.tuned:
            raise ValueError(
                f"prior {self.prior}: a text tower that is not tuned has nothing to learn from it"
            )


@dataclass(frozen=True, kw_only=True)
class LDMTraining:
    """The configuration of a latent diffusion model's training. ``variants``: how many small and double
    pictures the latent cache holds; ``net``: the folder of a UNet of this shape to begin with, None to begin
    anew; ``grounding``: whether attention learns where things are drawn.
    """

    run: RunConfig
    data: DataConfig
    vae: str
    text: TextSource
    model: UNetConfig
    diffusion: Diffusion
    variants: int
    net: str | None = None
    grounding: Grounding | None = None

    def __post_init__(self) -> None:
        if self.grounding is not None and self.grounding.only and (self.text.tuned or self.net is None):
            got = f"net {self.net!r} and text.tuned {self.text.tuned}"
            raise ValueError(
                "grounding.only: expected a net to begin with and a text that is not tuned, as nothing else"
                f" is learnt; got {got}"
            )


class LDMPart:
    """A latent diffusion model in training."""

    def __init__(self, config: LDMTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.pictures = Pictures(config.data)
        vae, about = read_part(config.vae, "vae", VAEConfig, AutoencoderKL)
        assert isinstance(vae, AutoencoderKL)
        self.vae = vae.to(device)
        self.text = read_text(config.text.folder).to(device).requires_grad_(config.text.tuned)
        if self.text.width != config.model.context_dim:
            raise ValueError(
                f"model.context_dim {config.model.context_dim}: the text tower's tokens are {self.text.width}"
                " wide"
            )
        draft = 0 if self.text.draft is None else self.text.draft.config.channels
        if config.model.in_channels != vae.config.latent_channels + draft:
            has = f"the latent has {vae.config.latent_channels}, the text tower's draft {draft}"
            raise ValueError(f"model.in_channels {config.model.in_channels}: {has}")
        if config.text.prior and not draft:
            raise ValueError(
                f"text.prior {config.text.prior}: the text tower in {config.text.folder!r} has no draft"
            )
        torch.manual_seed(config.run.seed)
        net = UNet(config.model)
        if config.net is None:
            zero_outputs(net)
        else:
            begin_with(net, config.net, "unet")
        if config.grounding is not None and config.grounding.only:
            learn_where_to_look(net)
        self.denoiser = Denoiser(net.to(device), config.diffusion.make(), config.diffusion.prediction)
        self.model = nn.ModuleDict({"net": net, "text": self.text})
        self.cache = LatentCache.of_run(config.run, self.pictures, self.vae, about, config.variants)

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        diffusion, schedule = self.config.diffusion, self.denoiser.schedule
        chosen = [self.cache.choose(c, draws.rng) for c in self.pictures.draw(draws.rng, batch)]
        x0 = self.cache.sample([row for _, row in chosen], draws).to(self.device)  # (B, C, h, w)
        compositions = [c for c, _ in chosen]
        said = [
            []
            if draws.rng.random() < diffusion.drop
            else caption_pieces(c, self.pictures.data.index, draws.rng)
            for c in compositions
        ]
        t = diffusion.draw(batch, draws.torch).to(self.device)
        eps = draws.normal(*x0.shape).to(self.device)
        cond = self.text(join_captions(said))
        with self.watched() as maps:
            losses = diffusion_loss(self.denoiser, x0, cond, t, eps)  # (B,)
        loss = (diffusion.weight(schedule.snr(t)).to(losses) * losses).mean()
        high = t >= len(schedule) // 2
        figures = {"loss_high_t": losses[high].mean(), "loss_low_t": losses[~high].mean()}
        if cond.concat is not None:
            prior = (cond.concat.float() - x0).square().mean()
            loss, figures = loss + self.config.text.prior * prior, {**figures, "prior": prior}
        if self.config.grounding is not None:
            grounding = self.grounding(maps, said, compositions)
            loss, figures = (
                loss + self.config.grounding.weight * grounding,
                {
                    **figures,
                    "grounding": grounding,
                },
            )
        return loss, figures

    def watched(self) -> AbstractContextManager[dict[str, Tensor]]:
        """`attended` where that is learnt from, else nothing."""
        return nullcontext({}) if self.config.grounding is None else attended(self.denoiser.net)

    def grounding(
        self, maps: Mapping[str, Tensor], said: Sequence[CaptionPieces], compositions: Sequence[Composition]
    ) -> Tensor:
        """How far the attention to what captions name is from where it is: `grounding_loss`."""
        wanted = named(said, compositions, self.pictures.data.images, self.text, self.config.data.size)
        return grounding_loss(maps.values(), wanted).to(self.device)

    def sample(self, prompts: list[str], *, steps: int = 20, guidance: float = 3.0, seed: int = 0) -> Tensor:
        """Pictures (B, 3, H, W) in about [−1, 1] of prompts."""
        latent = (self.vae.config.latent_channels, *[self.config.data.size // self.vae.config.factor] * 2)
        fn = cfg(self.denoiser, self.text(prompts), self.text([""]), guidance)
        x = initial_noise(range(seed, seed + len(prompts)), latent).to(self.device)
        return self.vae.decode(
            dpmpp_2m(fn, x, TimeGrid.make(self.denoiser.schedule, steps, spacing="trailing"))
            / self.cache.scale
        )

    def validate(self) -> dict[str, float]:
        """Over 64 plain pictures: the loss at fixed timesteps and noise, and the mean squared error between
        samples and what was asked; and where attention learns to lie where things are, how far it is from
        that, over 64 pairs side by side.
        """
        rng = np.random.default_rng(7)
        chosen = [
            Composition(image=int(row))
            for row in rng.permutation(self.pictures.data.index.train_of["noto"])[:64]
        ]
        captions = [caption(c, self.pictures.data.index) for c in chosen]
        x, draws, losses, errors = self.pictures.tensor(chosen), Draws(7, 0), [], []
        for part in (slice(i, i + 16) for i in range(0, len(chosen), 16)):
            x0 = self.cache.scale * self.vae.encode(x[part].to(self.device)).mean
            t, eps = (
                self.config.diffusion.draw(len(x0), draws.torch).to(self.device),
                draws.normal(*x0.shape).to(self.device),
            )
            losses.append(diffusion_loss(self.denoiser, x0, self.text(captions[part]), t, eps).cpu())
            errors.append((x[part] - self.sample(captions[part], steps=10).cpu()).square().flatten(1).mean(1))
        figures = {"loss": float(torch.cat(losses).mean()), "sample_mse": float(torch.cat(errors).mean())}
        return figures | (
            {} if self.config.grounding is None else {"pairs_grounding": self.pairs_grounding()}
        )

    def pairs_grounding(self) -> float:
        """`grounding_loss` over 64 pairs of training pictures side by side, at fixed timesteps and noise."""
        rows = np.random.default_rng(8).permutation(self.pictures.data.index.train_of["noto"])[:128].tolist()
        compositions = [
            Composition(image=first, second=second)
            for first, second in zip(rows[::2], rows[1::2], strict=False)
        ]
        said, draws = [caption_pieces(c, self.pictures.data.index) for c in compositions], Draws(8, 0)
        x0 = self.cache.scale * self.vae.encode(self.pictures.tensor(compositions).to(self.device)).mean
        t, eps = (
            self.config.diffusion.draw(len(x0), draws.torch).to(self.device),
            draws.normal(*x0.shape).to(self.device),
        )
        with self.watched() as maps:
            diffusion_loss(self.denoiser, x0, self.text(join_captions(said)), t, eps)
        return float(self.grounding(maps, said, compositions))

    def preview(self) -> np.ndarray:
        index = self.pictures.data.index
        rng = np.random.default_rng(3)
        known = [
            "red-apple",
            "cat-face",
            "snowman",
            "rocket",
            "grinning-face",
            "guitar",
            "sunflower",
            "fire-engine",
        ]
        names = [name for name in known if index.has(name)] + list(
            rng.choice(index.names("noto", held_out=False), 24 - len(known))
        )
        grounds = [None, "blue", None, "yellow"] * 6
        prompts = [
            name.replace("-", " ") + (f" on a {ground} background" if ground else "")
            for name, ground in zip(names, grounds, strict=False)
        ]
        return picture_grid(
            to_uint8(torch.cat([self.sample(prompts[:12]), self.sample(prompts[12:], seed=12)])), columns=8
        )

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        facts = {"diffusion": self.config.diffusion, "figures": self.validate(), "training": record}
        write_part(folder, "unet", self.denoiser.net, self.config.model, **facts)
        write_text(folder, self.text, words=vocabulary(self.pictures.data.index), training=record)


def zero_outputs(net: UNet) -> None:
    """Start every residual branch and the output at zero, as the published trainings do (Dhariwal & Nichol
    2021)."""
    for name, module in net.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")) and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
