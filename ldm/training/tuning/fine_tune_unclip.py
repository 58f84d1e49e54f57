"""Fine-tuning of an unCLIP model that `ldm.load` reads: its decoder or its prior (Ramesh et al. 2022).

The CLIP of the model, which makes the embeddings, stays, and so do the autoencoder and the upsamplers. The
export is a whole model, which `ldm.load(weights=...)` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.catalog.unclip_cards import StageCard, UnCLIPCard
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.prompt import escape_prompt
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.models.unclip.decoder import Decoder
from ldm.models.unet import UNet
from ldm.pipelines.stages.decoder import DecoderStage
from ldm.pipelines.stages.prior import PriorStage
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.saving import save
from ldm.training.caches.embeddings import EmbeddingCache, embed
from ldm.training.caches.latents import LatentSpace
from ldm.training.config import RunConfig, check_fraction
from ldm.training.diffusion import sample_latents
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.inputs.protocol import CachedSamples, Samples
from ldm.training.losses.common import diffusion_loss, draw_diffusion_loss, losses_by_timestep
from ldm.training.recomputing import recompute_blocks
from ldm.training.tuning.base_model import check_base, load_unclip_base, network_hashes, unpublished
from ldm.training.tuning.fine_tune_decoder import FIXED_IMAGES
from ldm.training.tuning.tuned_model import PREVIEWED, FineTuneDiffusion


@dataclass(frozen=True, kw_only=True)
class UnCLIPFineTuning:
    """The configuration of the fine-tuning of an unCLIP model.

    Args:
        run: Length, batches and optimizer.
        data: The training images. A decoder of pixels makes images of its card's size: `data.size` is at
            least that, the images are resized to it, and CLIP sees them as they are.
        base: Name of the model (see `ldm.list_models`); None for that of the folder `weights`.
        weights: Its weights, as `ldm.load` takes them; None for the model's own. Default: None.
        train: The network that is trained: "decoder" or "prior". Default: "decoder".
        diffusion: Changes of the decoder's diffusion, and the weights of the loss; `drop` is the share of
            captions replaced by the empty one.
        drop_image: Share of embeddings replaced by what stands for no image (a tenth in the paper); a prior
            reads none. Default: 0.1.
        recompute: See `FineTuning`. Default: False.
    """

    run: RunConfig
    data: DataSection
    base: str | None = None
    weights: str | None = None
    train: Literal["decoder", "prior"] = "decoder"
    diffusion: FineTuneDiffusion = field(default_factory=FineTuneDiffusion)
    drop_image: float = 0.1
    recompute: bool = False

    def __post_init__(self) -> None:
        check_base(self.base, self.weights)
        check_fraction(drop_image=self.drop_image)
        changes = {name: getattr(self.diffusion, name) for name in ("prediction", "zero_terminal_snr")}
        if self.train == "prior" and (given := {k: v for k, v in changes.items() if v is not None}):
            raise ValueError(f"diffusion: expected the prior's own {' and '.join(given)}, got {given}")


class DecoderTuning:
    """What a decoder is trained on: images, conditioned on their embeddings and captions.

    The noise level of embeddings that the decoder reads noised (Stable unCLIP) is drawn uniformly.
    """

    def __init__(self, pipe: UnCLIP, config: UnCLIPFineTuning, samples: CachedSamples) -> None:
        self.pipe, self.stage, self.images = pipe, pipe.decoder, samples.images
        self.drop_image = config.drop_image
        if pipe.card.concat is not None:
            raise ValueError(f"{pipe.name!r} reads the known part of an image, which no data set states")
        if isinstance(self.stage.text, ExemplarConditioner):
            raise ValueError(
                f"{pipe.name!r} is shown exemplars, in which new things are added without training:"
                " pipe.exemplars.add; `part: exemplar-decoder` trains it on scenes"
            )
        self.space, size = self.stage.space, self.images.size
        side = size if self.space.vae is not None else pipe.card.decoder.defaults.height
        if size < side or side % self.space.factor:
            raise ValueError(
                f"data.size {size}: expected at least {side}, the size of the decoder's images"
                if size < side
                else f"data.size {size}: expected a multiple of {self.space.factor}, the autoencoder's factor"
            )
        self.side = side
        self.latents = None
        if self.space.vae is not None:
            key = network_hashes({"vae": self.space.vae})["vae"]
            self.latents = LatentSpace.of(self.space, key, samples, self.stage.device)
        self.nothing = pipe.clip.black() if pipe.card.no_image == "black" else None

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser in training."""
        return self.stage.denoiser

    def clean(self, samples: Samples, rows: Sequence[int], vectors: Tensor, draws: Draws) -> Tensor:
        """Return the states of cached samples, (B, C, h, w)."""
        return self.fixed(samples, vectors) if self.latents is None else self.latents.sample(rows, draws)

    def fixed(self, samples: Samples, vectors: Tensor) -> Tensor:
        """Return the states of samples without random numbers, (B, C, h, w)."""
        return self.space.encode((self.framed(samples) + 1) / 2, self.stage.device)

    def framed(self, samples: Samples) -> Tensor:
        """Return samples at the size of the decoder's images, (B, 3, H, W) in [−1, 1]."""
        x, size = self.images.tensor(samples), (self.side, self.side)
        if x.shape[-2:] == size:
            return x
        resized = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
        return resized.clamp(-1, 1)

    def cond(self, texts: Sequence[str], vectors: Tensor, draws: Draws, kept: Tensor) -> Cond:
        """Return the condition of B texts and embeddings (B, E), of those that are `kept`, (B,) bool."""
        text, n = Cond(), len(vectors)
        if self.stage.text is not None:
            side = self.side // self.space.factor
            escaped = [escape_prompt(each) for each in texts]
            text = self.stage.text(escaped, size=(side, side), seeds=draws.samples)
        level: int | Tensor = 0
        noise = None
        if self.stage.augmentation is not None:
            steps = self.stage.augmentation.config.timesteps
            level = (torch.from_numpy(draws.random()) * steps).long().clamp_max(steps - 1)
            noise = draws.normal(n, self.stage.width)
        own = self.stage.with_images(text, vectors, level=level, noise=noise)
        without = self.stage.without_images(text, n, self.nothing)
        rows = torch.arange(n, device=kept.device) + n * (~kept).long()
        return Cond.cat([own, without])[rows]

    def drawn_kept(self, draws: Draws) -> Tensor:
        """Draw which embeddings of a batch are kept, (B,) bool."""
        return torch.from_numpy(draws.random() >= self.drop_image).to(self.stage.device)

    def preview(self, samples: Samples, texts: Sequence[str], vectors: Tensor) -> np.ndarray:
        """Show images, each with a sample from its embedding and its caption."""
        n, draws = len(samples), Draws(0, range(len(samples)))
        on = torch.ones(n, dtype=torch.bool, device=self.stage.device)
        nothing = self.cond([""] * n, vectors, draws, ~on)
        made = sample_latents(
            self.denoiser,
            self.cond(texts, vectors, draws, on),
            nothing,
            self.space.shape(self.side, self.side),
            n=n,
            steps=20,
            guidance=self.pipe.card.decoder.defaults.guidance,
            seed=0,
        )
        return comparison_grid(self.framed(samples), 2 * self.space.decode(made) - 1, columns=8)


class PriorTuning:
    """What a prior is trained on: the embeddings of images, conditioned on their captions."""

    def __init__(self, pipe: UnCLIP, config: UnCLIPFineTuning, samples: CachedSamples) -> None:
        if not isinstance(pipe.prior, PriorStage):
            raise ValueError(
                f"train: {pipe.name!r} has no prior"
                if pipe.prior is None
                else f"train: the prior of {pipe.name!r} is autoregressive; `part: prior` trains it further"
            )
        self.pipe, self.stage = pipe, pipe.prior

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser in training."""
        return self.stage.denoiser

    def clean(self, samples: Samples, rows: Sequence[int], vectors: Tensor, draws: Draws) -> Tensor:
        """Return embeddings in the space of the diffusion, (B, E)."""
        return self.stage.net.normalize(vectors)

    def fixed(self, samples: Samples, vectors: Tensor) -> Tensor:
        """Return embeddings in the space of the diffusion, (B, E)."""
        return self.stage.net.normalize(vectors)

    def cond(self, texts: Sequence[str], vectors: Tensor, draws: Draws, kept: Tensor) -> Cond:
        """Return the condition of B texts; an empty one is the prior's own condition of no text."""
        own = self.stage.read(self.pipe.clip, [escape_prompt(each) for each in texts])
        if self.stage.net.config.blocks != "cosine":
            return own
        n = len(texts)
        without = self.stage.net.unconditional(n, device=kept.device)
        return Cond.cat([own, without])[[i if text else n + i for i, text in enumerate(texts)]]

    def drawn_kept(self, draws: Draws) -> Tensor:
        """Return (B,) True, as a prior reads no embedding."""
        return torch.ones(len(draws), dtype=torch.bool, device=self.stage.stage.device)

    def preview(self, samples: Samples, texts: Sequence[str], vectors: Tensor) -> None:
        """Return None: embeddings cannot be shown."""
        return None


class FineTuneUnCLIPPart:
    """The decoder or the prior of a loaded unCLIP model in training."""

    def __init__(self, config: UnCLIPFineTuning, device: torch.device) -> None:
        self.config, self.device = config, device
        loaded = load_unclip_base(config.base, config.weights)
        card = loaded.card
        if config.train == "decoder":
            card = replace(card, decoder=config.diffusion.changed(card.decoder))
        self.pipe = fine_tuned_unclip(loaded, card).to(device)
        hashes = network_hashes(self.pipe.networks())
        if "vision" not in hashes:
            raise ValueError(f"{self.pipe.name!r} has no image tower, which embeds the training images")
        self.pipe.requires_grad_(False)
        self.images = open_images(config.data, config.run)
        self.samples = self.images.cached(config.run, 0)
        kind = DecoderTuning if config.train == "decoder" else PriorTuning
        self.tuning: DecoderTuning | PriorTuning = kind(self.pipe, config, self.samples)
        stage: StageCard = self.tuning.stage.card
        self.diffusion = config.diffusion.settled(stage, self.pipe.name)
        key = f"{self.pipe.clip.name}/{hashes['vision']}"
        vectors = self.samples.cached("embeddings", key, (self.pipe.clip.width,), self.embed)
        self.embeddings = EmbeddingCache(vectors=vectors)
        self.model = nn.ModuleDict({config.train: self.tuning.denoiser.net}).requires_grad_(True)
        if config.recompute:
            recompute_blocks(self.model)

    def embed(self, samples: Samples) -> Tensor:
        """Return CLIP's embeddings of samples, (B, E)."""
        return embed(self.pipe.clip, self.images, samples)

    def fixed_samples(self) -> Samples:
        """Return the images that are validated on: held-out ones, or training images."""
        return self.images.held_out(FIXED_IMAGES) or self.images.plain(FIXED_IMAGES, seed=7)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the diffusion loss of a random batch, and the losses of each tenth of the timesteps."""
        chosen, rows = self.samples.draw(draws)
        vectors = self.embeddings[rows].to(self.device)  # (B, E)
        x0 = self.tuning.clean(chosen, rows, vectors, draws)
        texts = self.images.captions(chosen, draws, drop=self.diffusion.drop)
        cond = self.tuning.cond(texts, vectors, draws, self.tuning.drawn_kept(draws))
        loss, losses, t = draw_diffusion_loss(self.tuning.denoiser, self.diffusion, x0, cond, draws)
        return loss, losses_by_timestep(losses, t, self.diffusion.timesteps, draws)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.samples.draw(draws)[0])

    def validate(self) -> dict[str, float]:
        """Return the loss at fixed timesteps and noise over held-out images, or over training images."""
        chosen, losses = self.fixed_samples(), []
        for start in range(0, len(chosen), 8):
            part = chosen[start : start + 8]
            draws, vectors = Draws(7, range(start, start + len(part))), self.embed(part).to(self.device)
            x0 = self.tuning.fixed(part, vectors)
            t = self.diffusion.draw(draws).to(self.device)
            eps = draws.normal(*x0.shape).to(self.device)
            on = torch.ones(len(part), dtype=torch.bool, device=self.device)
            cond = self.tuning.cond(self.images.describe(part), vectors, draws, on)
            losses.append(diffusion_loss(self.tuning.denoiser, x0, cond, t, eps).cpu())
        return {"loss": float(torch.cat(losses).mean())}

    def preview(self) -> np.ndarray | None:
        """Show images, each with a sample from its embedding and its caption; None of a prior."""
        chosen = self.images.plain(PREVIEWED, seed=3)
        return self.tuning.preview(chosen, self.images.describe(chosen), self.embed(chosen).to(self.device))

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the whole model, with half precision."""
        save(self.pipe, folder, dtype="float16", training=record, figures=self.validate())


def fine_tuned_unclip(pipe: UnCLIP, card: UnCLIPCard) -> UnCLIP:
    """Return a pipeline with the networks of another one, and a card of its own."""
    old = pipe.decoder
    net = old.denoiser.net
    assert isinstance(net, Decoder | UNet)
    decoder = DecoderStage(
        net,
        card.decoder,
        clip=old.clip,
        space=old.space,
        text=old.text,
        augmentation=old.augmentation,
    )
    return UnCLIP(
        clip=pipe.clip,
        prior=pipe.prior,
        decoder=decoder,
        upsamplers=list(pipe._upsamplers()),
        card=unpublished(card),
    ).eval()
