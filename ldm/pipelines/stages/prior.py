"""The prior of unCLIP: texts → image embeddings, by diffusion (Ramesh et al. 2022, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.catalog.unclip_cards import StageCard
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.image_embedding import ImageEmbedding, Length
from ldm.diffusion.cond import Cond
from ldm.models.unclip.prior import Prior
from ldm.pipelines.call import Call
from ldm.pipelines.stages.stage import PRIOR, Stage


class PriorStage(nn.Module):
    """Texts → image embeddings, by diffusion.

    Args:
        net: The network.
        card: How it is sampled.
        clip: Name of the CLIP whose embeddings it makes.
    """

    options = ("steps", "guidance", "sampler", "latents")

    def __init__(self, net: Prior, card: StageCard, *, clip: str) -> None:
        super().__init__()
        self.net, self.card, self.clip = net, card, clip
        self.denoiser = card.make_denoiser(net)

    @property
    def stage(self) -> Stage:
        """The diffusion of embeddings."""
        return Stage(denoiser=self.denoiser, card=self.card, name=self.clip, number=PRIOR, label="prior")

    def settle(self, prompt: Any, **options: Any) -> Call:
        """Settle the options of a call; see `ldm.pipelines.call.settle`."""
        call = self.stage.settle(prompt, **options)
        self.stage.check_shape(call, (self.net.config.embed_dim,))
        return call

    @torch.no_grad()
    def forward(self, clip: ClipPair, call: Call, *, candidates: int = 1) -> ImageEmbedding:
        """Sample one embedding for each prompt of the call.

        Args:
            clip: The CLIP that reads the texts.
            call: The settled options.
            candidates: Number of embeddings sampled for each, of which the one with the largest dot product
                with the text's embedding is returned.

        Raises:
            ValueError: If the texts are read by another CLIP.
        """
        check_same_clip(self.clip, clip)
        cond = self.read(clip, call.texts)
        learned = self.net.config.blocks == "cosine" and not any(call.negatives)
        stage = self.stage
        uncond = (
            self.net.unconditional(1, device=stage.device) if learned else self.read(clip, call.negatives)
        )
        pair = cond, uncond.expand(len(call.prompts))

        def sample(k: int) -> Tensor:
            own = replace(stage, number=PRIOR + k)
            begun, x = own.begin(call, shape=(self.net.config.embed_dim,))
            return self.net.denormalize(own.sample(begun, x, pair))

        length: Length = "unit" if self.net.config.normalize == "unit" else "clip"
        return ImageEmbedding(vector=best_of(sample, candidates, cond), clip=self.clip, length=length)

    def read(self, clip: ClipPair, prompts: Sequence[str]) -> Cond:
        """Read texts as the network takes them.

        A "unit" prior takes the text's embedding at length 1, and a fixed number of tokens.

        Raises:
            ValueError: If the text tower gives more tokens than that.
        """
        cond, config = clip.read(prompts), self.net.config
        if config.normalize == "statistics":
            return cond
        assert cond.context is not None and cond.context_mask is not None and cond.pooled is not None
        more = config.length - cond.context.shape[1]
        if more < 0:
            raise ValueError(
                f"this prior reads {config.length} tokens, the text tower gives {cond.context.shape[1]}"
            )
        context, mask = F.pad(cond.context, (0, 0, 0, more)), F.pad(cond.context_mask, (0, more), value=False)
        return replace(cond, context=context, context_mask=mask, pooled=F.normalize(cond.pooled, dim=-1))


def check_same_clip(trained: str, clip: ClipPair) -> None:
    """Raise ValueError if a prior was trained on another CLIP than the one that reads the texts."""
    if clip.name != trained:
        raise ValueError(
            f"the prior was trained on {trained!r}, and the texts are read by {clip.name!r}: two CLIPs"
            " share no space"
        )


def best_of(sample: Callable[[int], Tensor], candidates: int, cond: Cond) -> Tensor:
    """Return, for each text, the candidate with the largest dot product with the text's embedding.

    Args:
        sample: Makes candidate k of all texts, (B, E).
        candidates: Number of candidates.
        cond: The texts' condition, with their embeddings (B, E) in `pooled`.

    Returns:
        Embeddings (B, E), float32.
    """
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")
    stack = torch.stack([sample(k).float() for k in range(candidates)], dim=1)  # (B, k, E)
    if candidates == 1:
        return stack[:, 0]
    assert cond.pooled is not None
    best = torch.einsum("bke,be->bk", stack, cond.pooled.to(stack)).argmax(1)
    return stack[torch.arange(len(stack), device=stack.device), best]
