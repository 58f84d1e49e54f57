"""The stage that makes an image of an embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ldm.catalog.unclip_cards import StageCard
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.diffusion.cond import Cond
from ldm.diffusion.noise import keyed_normal
from ldm.models.unclip.decoder import Decoder
from ldm.models.unclip.noise_augmentation import NoiseAugmentation
from ldm.models.unet import UNetConfig
from ldm.pipelines.call import Call
from ldm.pipelines.stages.space import Space
from ldm.pipelines.stages.stage import AUGMENT, STEPS, Stage


class DecoderStage(Stage):
    """Image embeddings of the CLIP ``clip``, with texts → pictures.

    ``net``: a `Decoder`, or a UNet beside an ``augmentation`` (Stable unCLIP). ``text``: what reads the
    texts, None where none are read.
    """

    def __init__(
        self,
        net: nn.Module,
        card: StageCard,
        *,
        clip: str,
        space: Space,
        text: Conditioner | None = None,
        augmentation: NoiseAugmentation | None = None,
    ) -> None:
        super().__init__(net, card, number=0, label="decoder")
        unet: UNetConfig = net.config.unet if isinstance(net, Decoder) else net.config  # type: ignore[assignment]
        if (made := unet.out_channels // (2 if card.learned_var else 1)) != space.channels:
            where = (
                "pixels, as there is no autoencoder," if space.vae is None else "the autoencoder's latents"
            )
            raise ValueError(f"the decoder makes {made} channels, {where} have {space.channels}")
        self.clip, self.space, self.augmentation, self.unet_config = clip, space, augmentation, unet
        self.text: Any = text

    @property
    def multiple(self) -> int:
        """What the sides of a picture must be multiples of: the autoencoder's factor, and the UNet's where
        that cannot round."""
        return self.space.factor * (self.unet_config.factor if self.unet_config.resample == "resblock" else 1)

    @property
    def width(self) -> int:
        """E of the embeddings it reads."""
        net = self.denoiser.net
        if self.augmentation is not None:
            return self.augmentation.config.embed_dim
        assert isinstance(net, Decoder)
        return net.config.condition.embed_dim

    def conditions(
        self, embedding: ImageEmbedding, nothing: ImageEmbedding | None, call: Call, *, noise_level: int = 0
    ) -> tuple[Cond, Cond]:
        """What the network is told with and without the embeddings and texts of a call, both of batch B.

        ``nothing``: the embedding of no picture, None for the learned one, or zeros where the condition is
        noised.
        """
        n = len(call.seeds)
        vector = embedding.of(self.clip, self.width, by="the decoder").to(self.device)
        vector = vector.expand(n, -1) if len(vector) == 1 else vector
        if len(vector) != n:
            raise ValueError(f"{len(vector)} embeddings for {n} pictures: expected one, or one for each")
        cond, uncond = Cond(), Cond()
        if self.text is not None:
            cond = self.text([str(prompt) for prompt in call.prompts])
            uncond = self.text(call.negatives).expand(n)
        if self.augmentation is not None:
            noise = torch.stack(
                [keyed_normal(seed, AUGMENT * STEPS, vector.shape[1:]) for seed in call.seeds]
            )
            told = self.augmentation(vector, noise_level, noise.to(self.device)).float()
            return replace(cond, pooled=told), replace(uncond, pooled=torch.zeros_like(told))
        net = self.denoiser.net
        assert isinstance(net, Decoder)
        cond, uncond = net.condition.taken(cond), net.condition.taken(uncond)
        nothing_vector = (
            net.condition.nothing()
            if nothing is None
            else nothing.of(self.clip, self.width, by="the decoder")
        )
        return replace(cond, image_emb=vector), replace(
            uncond, image_emb=nothing_vector.to(self.device).float().expand(n, -1)
        )

    def shape(self, call: Call) -> tuple[int, int, int]:
        """(C, h, w) of the call's pictures; ValueError for a size that cannot be held."""
        return self.space.shape(call.height, call.width)
