"""Training the decoder: latents under CLIP's embedding of their own picture, and its caption (Ramesh et al.
2022, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.data import Composition, caption
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import cfg
from ldm.diffusion.noise import initial_noise
from ldm.models.unclip.decoder import Decoder, DecoderConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.samplers.ode.dpmpp_2m import dpmpp_2m
from ldm.training.config import DataConfig, RunConfig, share
from ldm.training.data import Pictures, picture_grid, to_uint8
from ldm.training.embeddings import EmbeddingCache, embed, read_clip
from ldm.training.imagined import Imagined
from ldm.training.latents import LatentCache
from ldm.training.loop import Draws
from ldm.training.losses import diffusion_loss
from ldm.training.parts.latent_diffusion import Diffusion, zero_outputs
from ldm.training.parts.vae import held_out_compositions
from ldm.weights.formats.ldm_folder import begin_with, read_part, write_part


@dataclass(frozen=True, kw_only=True)
class DecoderTraining:
    """The configuration of a latent decoder's training.

    ``diffusion.drop``: the share of captions made empty (the paper: half); ``drop_image``: of embeddings
    replaced by the learned one of no image (a tenth). ``length``: tokens that captions are read at. ``net``:
    the folder of a UNet or a whole decoder to begin with, ``draft``: that of an image's draft, which stays as
    it is (`image-draft` trains it); None to begin anew. Without the squared error of its own a draft drifts
    away from what it was trained to be. ``imagined``: a prior whose embeddings are learnt from beside the
    pictures'.
    """

    run: RunConfig
    data: DataConfig
    vae: str
    text: str
    vision: str
    model: DecoderConfig
    diffusion: Diffusion
    variants: int
    drop_image: float = 0.1
    length: int = 32
    net: str | None = None
    draft: str | None = None
    imagined: Imagined | None = None

    def __post_init__(self) -> None:
        share(drop_image=self.drop_image)
        joined = 0 if self.model.draft is None else self.model.draft.channels
        if self.model.unet.in_channels != self.model.unet.out_channels + joined:
            raise ValueError(
                "model.unet: training here learns no variance, expected as many channels out as in, less"
                " those of a draft"
            )
        if not self.model.condition.null_image:
            raise ValueError(
                "model.condition.null_image: expected true, as the embedding of no image is learned here"
            )


class DecoderPart:
    """A decoder in training."""

    def __init__(self, config: DecoderTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.pictures = Pictures(config.data)
        vae, about = read_part(config.vae, "vae", VAEConfig, AutoencoderKL)
        assert isinstance(vae, AutoencoderKL)
        self.vae = vae.to(device)
        self.clip = read_clip(config.text, config.vision, length=config.length).to(device)
        if self.clip.width != config.model.condition.embed_dim:
            raise ValueError(
                f"model.condition.embed_dim {config.model.condition.embed_dim}: embeddings are"
                f" {self.clip.width} wide"
            )
        if vae.config.latent_channels != config.model.unet.out_channels:
            raise ValueError(
                f"model.unet.out_channels {config.model.unet.out_channels}: the latent has"
                f" {vae.config.latent_channels}"
            )
        torch.manual_seed(config.run.seed)
        net = Decoder(config.model)
        if config.net is None:
            zero_outputs(net.unet)
        elif (Path(config.net) / "decoder.yaml").is_file():
            begin_with(net, config.net, "decoder", leave=None if config.draft is None else "draft")
        else:
            # the vector comes from the embedding here
            begin_with(net.unet, config.net, "unet", leave="add_embedding")
        if config.draft is not None:
            if net.draft is None:
                raise ValueError(f"draft {config.draft!r}: model.draft says no shape for it")
            begin_with(net.draft, config.draft, "draft")
            net.draft.requires_grad_(False)
        self.denoiser = Denoiser(net.to(device), config.diffusion.make(), config.diffusion.prediction)
        self.net = net
        self.model: nn.Module = nn.ModuleDict({"net": net})
        self.cache = LatentCache.of_run(config.run, self.pictures, self.vae, about, config.variants)
        self.embeddings = EmbeddingCache.of_run(
            config.run, self.pictures, self.clip, config.variants, config.imagined
        )

    def condition(self, captions: Sequence[str], image: Tensor) -> Cond:
        """What the network is told; captions are left out where it reads none."""
        c, cond = self.config.model.condition, Cond()
        if c.text_dim is not None or c.pooled_dim is not None:
            cond = self.clip.read(captions)
            cond = replace(
                cond,
                context=cond.context if c.text_dim else None,
                context_mask=cond.context_mask if c.text_dim else None,
            )
            cond = replace(cond, pooled=cond.pooled if c.pooled_dim else None)
        return replace(cond, image_emb=image)

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        diffusion, schedule = self.config.diffusion, self.denoiser.schedule
        rows = [self.cache.choose(c, draws.rng) for c in self.pictures.draw(draws.rng, batch)]
        numbers = [row for _, row in rows]
        x0 = self.cache.sample(numbers, draws).to(self.device)  # (B, C, h, w)
        captions = [
            "" if draws.rng.random() < diffusion.drop else caption(c, self.pictures.data.index, draws.rng)
            for c, _ in rows
        ]
        kept = torch.from_numpy(draws.rng.random(batch) >= self.config.drop_image).to(self.device)
        image = torch.where(
            kept[:, None],
            self.embeddings.draw(numbers, draws.rng).to(self.device),
            self.net.condition.nothing(),
        )
        t = diffusion.draw(batch, draws.torch).to(self.device)
        losses = diffusion_loss(
            self.denoiser, x0, self.condition(captions, image), t, draws.normal(*x0.shape).to(self.device)
        )
        return (diffusion.weight(schedule.snr(t)).to(losses) * losses).mean(), {}

    def sample(
        self, captions: Sequence[str], image: Tensor, *, steps: int = 10, guidance: float = 2.0, seed: int = 0
    ) -> Tensor:
        """Pictures (B, 3, H, W) in about [−1, 1] of embeddings and captions."""
        latent = (self.vae.config.latent_channels, *[self.config.data.size // self.vae.config.factor] * 2)
        nothing = self.condition([""] * len(image), self.net.condition.nothing().expand(len(image), -1))
        fn = cfg(self.denoiser, self.condition(captions, image), nothing, guidance)
        x = initial_noise(range(seed, seed + len(image)), latent).to(self.device)
        return self.vae.decode(
            dpmpp_2m(fn, x, TimeGrid.make(self.denoiser.schedule, steps, spacing="trailing"))
            / self.cache.scale
        )

    def validate(self) -> dict[str, float]:
        """Over 64 pictures that training never sees: the mean squared error of what is made of their
        embeddings, without a caption."""
        chosen = held_out_compositions(self.pictures, 64)
        errors = []
        for part in (chosen[i : i + 16] for i in range(0, len(chosen), 16)):
            made = self.sample([""] * len(part), embed(self.clip, self.pictures, part)).cpu()
            errors.append((made - self.pictures.tensor(part)).square().flatten(1).mean(1))
        return {"sample_mse": float(torch.cat(errors).mean())}

    def preview(self) -> np.ndarray:
        chosen: list[Composition] = held_out_compositions(self.pictures, 12)
        made = self.sample([""] * len(chosen), embed(self.clip, self.pictures, chosen)).cpu()
        return picture_grid(
            to_uint8(torch.stack([self.pictures.tensor(chosen), made], 1).flatten(0, 1)), columns=8
        )

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        facts = {
            "clip": self.clip.name,
            "diffusion": self.config.diffusion,
            "figures": self.validate(),
            "training": record,
        }
        write_part(folder, "decoder", self.net, self.config.model, **facts)
