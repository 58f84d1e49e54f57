"""The stages of unCLIP: the prior that makes an embedding, the decoder that makes a picture of it, the upsamplers that enlarge the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.catalog.unclip_cards import StageCard
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.image_embedding import ImageEmbedding, Length
from ldm.diffusion.guidance import switch
from ldm.diffusion.interfaces import Cond, DenoiseFn
from ldm.diffusion.noise import keyed_normal
from ldm.models.unclip.decoder import Decoder
from ldm.models.unclip.noise_augmentation import NoiseAugmentation
from ldm.models.unclip.prior import Prior
from ldm.models.unet import UNetConfig
from ldm.pipelines.call import Call
from ldm.pipelines.stages.space import Space
from ldm.pipelines.stages.stage import STEPS, Stage, make_denoiser
from ldm.pipelines.windows import tiled
from ldm.support.config import nearest

UPSAMPLE, AUGMENT, PRIOR = 1, 64, 128  # numbers of stages; upsamplers and the candidates of a prior count up from theirs


class PriorStage(Stage):
    """Texts → image embeddings of the CLIP ``clip``, by diffusion."""

    options = ("steps", "guidance", "sampler", "latents")

    def __init__(self, net: Prior, card: StageCard, *, clip: str) -> None:
        super().__init__(net, card, number=PRIOR, label="prior")
        self.net, self.clip = net, clip

    @torch.no_grad()
    def forward(self, clip: ClipPair, call: Call, *, candidates: int = 1) -> ImageEmbedding:
        """One embedding for each prompt of the call: of ``candidates`` the one with the largest dot product with the text's
        (Ramesh et al. 2022, section 2.2). ValueError for texts of another CLIP.
        """
        if clip.name != self.clip:
            raise ValueError(f"the prior was trained on {self.clip!r}, and the texts are read by {clip.name!r}: two CLIPs share no space")
        prompts = [str(prompt) for prompt in call.prompts]
        cond = self.read(clip, prompts)
        learned = self.net.config.blocks == "cosine" and not any(call.negatives)
        uncond = self.net.unconditional(1, device=self.device) if learned else self.read(clip, call.negatives)
        fn = self.guided(cond, uncond.expand(len(prompts)), call.guidance)

        def sample(k: int) -> Tensor:
            number = self.number + k
            return self.net.denormalize(self.run(fn, self.start(call, (self.net.config.embed_dim,), number=number), call, number=number))

        length: Length = "unit" if self.net.config.normalize == "unit" else "clip"
        return ImageEmbedding(vector=best_of(sample, candidates, cond), clip=self.clip, length=length)

    def read(self, clip: ClipPair, prompts: Sequence[str]) -> Cond:
        """Texts as the network takes them: a "unit" prior reads the text's embedding at length 1 too, and as many tokens as it was made for."""
        cond, config = clip.read(prompts), self.net.config
        if config.normalize == "statistics":
            return cond
        assert cond.context is not None and cond.context_mask is not None and cond.pooled is not None
        more = config.length - cond.context.shape[1]
        if more < 0:
            raise ValueError(f"this prior reads {config.length} tokens, the text tower gives {cond.context.shape[1]}")
        context, mask = F.pad(cond.context, (0, 0, 0, more)), F.pad(cond.context_mask, (0, more), value=False)
        return replace(cond, context=context, context_mask=mask, pooled=F.normalize(cond.pooled, dim=-1))


def best_of(sample: Callable[[int], Tensor], candidates: int, cond: Cond) -> Tensor:
    """Of embeddings (B, E), made for k = 0 … candidates − 1, each the one with the largest dot product with the text's; float32."""
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")
    stack = torch.stack([sample(k).float() for k in range(candidates)], dim=1)  # (B, k, E)
    if candidates == 1:
        return stack[:, 0]
    assert cond.pooled is not None
    best = torch.einsum("bke,be->bk", stack, cond.pooled.to(stack)).argmax(1)
    return stack[torch.arange(len(stack)), best]


class DecoderStage(Stage):
    """Image embeddings of the CLIP ``clip``, with texts → pictures.

    ``net``: a `Decoder`, or a UNet beside an ``augmentation`` (Stable unCLIP). ``text``: what reads the texts, None where none are read.
    """

    def __init__(
        self, net: nn.Module, card: StageCard, *, clip: str, space: Space, text: Conditioner | None = None,
        augmentation: NoiseAugmentation | None = None,
    ) -> None:  # fmt: skip
        super().__init__(net, card, number=0, label="decoder")
        unet: UNetConfig = net.config.unet if isinstance(net, Decoder) else net.config  # type: ignore[assignment]
        if (made := unet.out_channels // (2 if card.learned_var else 1)) != space.channels:
            where = "pixels, as there is no autoencoder," if space.vae is None else "the autoencoder's latents"
            raise ValueError(f"the decoder makes {made} channels, {where} have {space.channels}")
        self.clip, self.space, self.augmentation, self.unet_config = clip, space, augmentation, unet
        self.text: Any = text

    @property
    def multiple(self) -> int:
        """What the sides of a picture must be multiples of: the autoencoder's factor, and the UNet's where that cannot round."""
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

        ``nothing``: the embedding of no picture, None for the learned one, or zeros where the condition is noised.
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
            noise = torch.stack([keyed_normal(seed, AUGMENT * STEPS, vector.shape[1:]) for seed in call.seeds])
            told = self.augmentation(vector, noise_level, noise.to(self.device)).float()
            return replace(cond, pooled=told), replace(uncond, pooled=torch.zeros_like(told))
        net = self.denoiser.net
        assert isinstance(net, Decoder)
        cond, uncond = net.condition.taken(cond), net.condition.taken(uncond)
        nothing_vector = net.condition.nothing() if nothing is None else nothing.of(self.clip, self.width, by="the decoder")
        return replace(cond, image_emb=vector), replace(uncond, image_emb=nothing_vector.to(self.device).float().expand(n, -1))

    def shape(self, call: Call) -> tuple[int, int, int]:
        """(C, h, w) of the call's pictures; ValueError for a size that cannot be held."""
        return self.space.shape(call.height, call.width)


class UpsamplerStage(Stage):
    """Small pictures → large ones, by a network that is given the enlarged small one; ``last``: another network for the last step."""

    def __init__(self, net: nn.Module, card: StageCard, *, index: int = 0, last: nn.Module | None = None) -> None:
        super().__init__(net, card, number=UPSAMPLE + index, label="upsampler")
        self.last = None if last is None else make_denoiser(last, card)

    @torch.no_grad()
    def forward(self, small: Tensor, call: Call, *, tile: int | None = None) -> Tensor:
        """Pictures (B, 3, h, w) in [0, 1] → (B, 3, H, W) of the call's size in [0, 1]; ``tile``: see `ldm.pipelines.windows.tiled`."""
        size = (call.height, call.width)
        low = enlarge(2 * small.to(self.device).float() - 1, size)
        cond = Cond(concat=low)

        def bound(denoiser: Any) -> DenoiseFn:
            return tiled(denoiser, cond, tile, overlap=tile // 4) if tile is not None and tile < max(size) else denoiser.bind(cond)

        fn = bound(self.denoiser)
        if self.last is not None:
            t = call.grid.t
            fn = switch(fn, bound(self.last), float(t[-2] + t[-1]) / 2 if len(t) > 1 else float(t[-1]) + 1)
        x = self.run(self.clamped(fn), self.start(call, (3, *size)), call)
        if self.card.residual is not None:
            x = low + self.card.residual * x
        return ((x + 1) / 2).clamp(0, 1).cpu()


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pictures resized as upsamplers were trained: bicubic, antialiased."""
    return F.interpolate(x, tuple(size), mode="bicubic", align_corners=False, antialias=True)


def options_of(stage: str, options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options of a stage among those of a call: "prior_steps" becomes "steps"; ValueError for one that it does not have."""
    own = {name.removeprefix(f"{stage}_"): value for name, value in options.items() if name.startswith(f"{stage}_")}
    for name in own:
        if name not in names:
            raise ValueError(f"the {stage} has no option {name!r}; {nearest(name, names)}")
    return {name: value for name, value in own.items() if value is not None}
