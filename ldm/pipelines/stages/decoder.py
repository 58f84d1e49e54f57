"""The decoder of unCLIP: image embeddings → images (Ramesh et al. 2022, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.unclip_cards import StageCard
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.diffusion.cond import Cond
from ldm.diffusion.noise import keyed_normal
from ldm.models.unclip.decoder import Decoder
from ldm.models.unclip.noise_augmentation import NoiseAugmentation
from ldm.models.unet import UNet
from ldm.pipelines.call import Call
from ldm.pipelines.conditions import Pair
from ldm.pipelines.stages.space import Space
from ldm.pipelines.stages.stage import AUGMENT, DRAWS_PER_STAGE, Stage


class DecoderStage(nn.Module):
    """Image embeddings, with texts → images.

    Args:
        net: A `Decoder`, or a `UNet` with an `augmentation` (Stable unCLIP).
        card: How it is sampled.
        clip: Name of the CLIP whose embeddings it takes.
        space: The space of its states.
        text: Reads the texts; None if it takes none.
        augmentation: Noises the embeddings (Stable unCLIP).
    """

    def __init__(
        self,
        net: Decoder | UNet,
        card: StageCard,
        *,
        clip: str,
        space: Space,
        text: Conditioner | None = None,
        augmentation: NoiseAugmentation | None = None,
    ) -> None:
        super().__init__()
        shape = net.config.network if isinstance(net, Decoder) else net.config
        made = shape.out_channels // (2 if card.learned_var else 1)
        if made != space.channels:
            where = (
                "pixels, as there is no autoencoder," if space.vae is None else "the autoencoder's latents"
            )
            raise ValueError(f"the decoder makes {made} channels, {where} have {space.channels}")
        self.card, self.clip, self.space = card, clip, space
        self.augmentation = augmentation
        self.text: Any = text  # a conditioner of any kind, or None
        self.denoiser = card.make_denoiser(net)

    @property
    def stage(self) -> Stage:
        """The diffusion of images."""
        return Stage(
            denoiser=self.denoiser, card=self.card, space=self.space, name=self.clip, label="decoder"
        )

    @property
    def device(self) -> torch.device:
        """Device that it computes on."""
        return self.stage.device

    @property
    def width(self) -> int:
        """E, the width of the embeddings that it takes."""
        if self.augmentation is not None:
            return self.augmentation.config.embed_dim
        return self._decoder().config.condition.embed_dim

    def conditions(
        self,
        embedding: ImageEmbedding,
        nothing: ImageEmbedding | None,
        call: Call,
        *,
        noise_level: int = 0,
        image: Tensor | None = None,
        named: Sequence[str] = (),
    ) -> Pair:
        """Return the conditions with and without embeddings and texts, both of batch size B.

        Args:
            embedding: One embedding, or one for each image.
            nothing: The embedding that stands for no image. None: the learned one, or zeros where the
                embeddings are noised.
            call: The call of B images.
            noise_level: Timestep that the embeddings are noised to (Stable unCLIP).
            image: Images (1 or B, 3, H, W) in [0, 1] that a decoder with exemplars is shown as they are,
                where the call has no prompt. Default: none.
            named: Texts that name what a decoder with exemplars is shown, where a prompt names nothing.
                Default: none.

        Raises:
            ValueError: If the embeddings are of another CLIP, width or number.
        """
        n = len(call.seeds)
        vector = embedding.of(self.clip, self.width, by="the decoder").to(self.device)
        vector = vector.expand(n, -1) if len(vector) == 1 else vector
        if len(vector) != n:
            raise ValueError(f"{len(vector)} embeddings for {n} images: expected one, or one for each")
        cond, uncond = Cond(), Cond()
        if self.text is not None:
            cond, uncond = self._texts(call, vector, image, named)
        noise = None
        if self.augmentation is not None:
            first = AUGMENT * DRAWS_PER_STAGE
            noise = torch.stack([keyed_normal(seed, first, vector.shape[1:]) for seed in call.seeds])
        cond = self.with_images(cond, vector, level=noise_level, noise=noise)
        return cond, self.without_images(uncond, n, nothing)

    def with_images(
        self, text: Cond, vectors: Tensor, *, level: int | Tensor = 0, noise: Tensor | None = None
    ) -> Cond:
        """Return the condition of B texts and image embeddings.

        Args:
            text: The condition of the texts; without fields if the decoder reads none.
            vectors: Embeddings, (B, E).
            level: Timestep that they are noised to (Stable unCLIP), one or one for each, (B,).
            noise: Standard normal noise (B, E) for that; None for a decoder that takes them as they are.
        """
        if self.augmentation is None:
            return replace(self._decoder().condition.taken(text), image_emb=vectors)
        assert noise is not None
        noised: Tensor = self.augmentation(vectors, level, noise.to(self.device))
        return replace(text, pooled=noised.float())

    def without_images(self, text: Cond, n: int, nothing: ImageEmbedding | None = None) -> Cond:
        """Return the condition of n texts and what stands for no image; `nothing` is as in `conditions`."""
        if self.augmentation is not None:
            zeros = torch.zeros(n, 2 * self.width, dtype=torch.float32, device=self.device)
            return replace(text, pooled=zeros)
        condition = self._decoder().condition
        if nothing is None:
            absent = condition.nothing()
        else:
            absent = nothing.of(self.clip, self.width, by="the decoder")
        return replace(condition.taken(text), image_emb=absent.to(self.device).float().expand(n, -1))

    def _texts(self, call: Call, vectors: Tensor, image: Tensor | None, named: Sequence[str]) -> Pair:
        """Return the conditions of a call's texts, in which embeddings (B, E) choose exemplars, if any."""
        size = (call.height // self.space.factor, call.width // self.space.factor)
        if isinstance(self.text, ExemplarConditioner) and image is not None and not any(call.texts):
            cond = self.text.shown(image.to(self.device)).expand(len(call.seeds))
        elif isinstance(self.text, ExemplarConditioner):
            cond = self.text.seen(call.texts, vectors, size, seeds=call.seeds, named=named)
        else:
            cond = self.text(call.texts, size=size, seeds=call.seeds)
        return cond, self.text(call.negatives, size=size, seeds=call.seeds).expand(len(call.seeds))

    def _decoder(self) -> Decoder:
        net = self.denoiser.net
        assert isinstance(net, Decoder)
        return net
