"""Training of the decoder: latents conditioned on CLIP's embedding of their own image, and on its caption.

Ramesh et al. 2022, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.models.unclip.decoder import Decoder, DecoderConfig
from ldm.training.caches.embeddings import EmbeddingCache, check_embed_dim, embed, read_clip
from ldm.training.caches.latents import LatentSpace, read_latent_shape
from ldm.training.caches.prior_embeddings import PriorEmbeddings
from ldm.training.config import RunConfig, check_at_least, check_fraction
from ldm.training.diffusion import DiffusionConfig, sample_latents, zero_outputs
from ldm.training.draws import Draws
from ldm.training.images import comparison_grid
from ldm.training.inputs.opening import DataSection, open_images
from ldm.training.losses.common import draw_diffusion_loss
from ldm.weights.formats.ldm_folder import begin_with, write_part


@dataclass(frozen=True, kw_only=True)
class DecoderTraining:
    """The configuration of a latent decoder's training.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        vae: Folder of the autoencoder.
        text: Folder of CLIP's text tower, which is frozen.
        vision: Folder of CLIP's image tower, which is frozen.
        model: Shape of the decoder.
        diffusion: Schedule, prediction and timesteps; `drop` is the share of captions replaced by the empty
            one (half of them in the paper).
        variants: Number of cached scenes that are not plain; see `CachedScenes`.
        drop_image: Share of embeddings replaced by the learned embedding of no image (a tenth in the paper).
            Default: 0.1.
        length: Number of tokens that captions are padded to. Default: 32.
        net: Folder of a UNet or of a decoder to begin with; None to begin from scratch. Default: None.
        from_prior: A prior that makes a share of the embeddings; None for images alone. Default: None.
    """

    run: RunConfig
    data: DataSection
    vae: str
    text: str
    vision: str
    model: DecoderConfig
    diffusion: DiffusionConfig
    variants: int
    drop_image: float = 0.1
    length: int = 32
    net: str | None = None
    from_prior: PriorEmbeddings | None = None

    def __post_init__(self) -> None:
        check_at_least(0, variants=self.variants)
        check_at_least(1, length=self.length)
        check_fraction(drop_image=self.drop_image)
        if self.model.unet is None:
            raise ValueError("model.unet: expected a UNet; `part: exemplar-decoder` trains a transformer")
        if self.model.unet.in_channels != self.model.unet.out_channels:
            raise ValueError(
                "model.unet: expected as many channels out as in, because a learned variance is not supported"
                " in training"
            )
        if not self.model.condition.null_image:
            raise ValueError(
                "model.condition.null_image: expected true, because the embedding of no image is trained here"
            )


class DecoderPart:
    """A decoder in training."""

    def __init__(self, config: DecoderTraining, device: torch.device) -> None:
        self.config, self.device = config, device
        self.images = open_images(config.data, config.run, validates_held_out=True)
        self.clip = read_clip(config.text, config.vision, length=config.length).to(device)
        check_embed_dim("model.condition.embed_dim", config.model.condition.embed_dim, self.clip)
        channels, *_ = read_latent_shape(config.vae, self.images)
        made = config.model.network.out_channels
        if channels != made:
            raise ValueError(f"model.unet.out_channels {made}: the latent has {channels}")
        self.net = make_decoder(config).to(device)
        self.denoiser = Denoiser(self.net, config.diffusion.make(), config.diffusion.prediction)
        self.model = nn.ModuleDict({"net": self.net})
        self.scenes = self.images.cached(config.run, config.variants)
        self.latents = LatentSpace.open(config.vae, self.scenes, device)
        self.embeddings = EmbeddingCache.open(self.clip, self.scenes, config.from_prior)

    def condition(self, captions: Sequence[str], image: Tensor) -> Cond:
        """Return the condition of captions and image embeddings (B, E); unread fields are left out."""
        c, cond = self.config.model.condition, Cond()
        if c.text_dim is not None or c.pooled_dim is not None:
            cond = self.clip.read(captions)
        if not c.text_dim:
            cond = replace(cond, context=None, context_mask=None)
        return replace(cond, pooled=cond.pooled if c.pooled_dim else None, image_emb=image)

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the diffusion loss of a random batch."""
        diffusion = self.config.diffusion
        chosen, rows = self.scenes.draw(draws)
        x0 = self.latents.sample(rows, draws)  # (B, C, h, w)
        captions = self.images.captions(chosen, draws, drop=diffusion.drop)
        kept = torch.from_numpy(draws.random() >= self.config.drop_image).to(self.device)
        image = self.embeddings.draw(rows, draws).to(self.device)  # (B, E)
        image = torch.where(kept[:, None], image, self.net.condition.nothing())
        cond = self.condition(captions, image)
        return draw_diffusion_loss(self.denoiser, diffusion, x0, cond, draws).weighted, {}

    def sample(
        self, captions: Sequence[str], image: Tensor, *, steps: int = 10, guidance: float = 2.0, seed: int = 0
    ) -> Tensor:
        """Sample images of captions and embeddings.

        Args:
            captions: B captions.
            image: Image embeddings, (B, E).
            steps: Sampling steps. Default: 10.
            guidance: Guidance scale. Default: 2.
            seed: Seed of the first image. Default: 0.

        Returns:
            Images, (B, 3, H, W) in about [−1, 1].
        """
        n = len(image)
        nothing = self.condition([""] * n, self.net.condition.nothing().expand(n, -1))
        z = sample_latents(
            self.denoiser,
            self.condition(captions, image),
            nothing,
            self.latents.shape,
            n=n,
            steps=steps,
            guidance=guidance,
            seed=seed,
        )
        return self.latents.decode(z)

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the captions of the samples that `loss` draws."""
        return self.images.describe(self.scenes.draw(draws)[0])

    def validate(self) -> dict[str, float]:
        """Return the mean squared error of 64 held-out images, sampled from their embeddings alone."""
        chosen = self.images.held_out(64)
        errors = []
        for part in (chosen[i : i + 16] for i in range(0, len(chosen), 16)):
            made = self.sample([""] * len(part), embed(self.clip, self.images, part)).cpu()
            errors.append((made - self.images.tensor(part)).square().flatten(1).mean(1))
        return {"sample_mse": float(torch.cat(errors).mean())}

    def preview(self) -> np.ndarray:
        """Show held-out images, each with a sample from its embedding."""
        chosen = self.images.held_out(12)
        made = self.sample([""] * len(chosen), embed(self.clip, self.images, chosen))
        return comparison_grid(self.images.tensor(chosen), made, columns=8)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the decoder, with the name of its CLIP."""
        write_part(
            folder,
            "decoder",
            self.net,
            self.config.model,
            clip=self.clip.name,
            diffusion=self.config.diffusion,
            figures=self.validate(),
            training=record,
        )


def make_decoder(config: DecoderTraining) -> Decoder:
    """Build a decoder, with the weights of `config.net`.

    Raises:
        ValueError: If that has another shape.
    """
    torch.manual_seed(config.run.seed)
    net = Decoder(config.model)
    if config.net is None:
        zero_outputs(net.unet)
    elif (Path(config.net) / "decoder.yaml").is_file():
        begin_with(net, config.net, "decoder")
    else:
        # a decoder's added embedding reads the image, a UNet's reads the text
        begin_with(net.unet, config.net, "unet", leave="add_embedding")
    return net
