"""The stage that makes image embeddings of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.catalog.unclip_cards import StageCard
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.image_embedding import ImageEmbedding, Length
from ldm.diffusion.cond import Cond
from ldm.models.unclip.prior import Prior
from ldm.pipelines.call import Call
from ldm.pipelines.stages.stage import PRIOR, Stage


class PriorStage(Stage):
    """Texts → image embeddings of the CLIP ``clip``, by diffusion."""

    options = ("steps", "guidance", "sampler", "latents")

    def __init__(self, net: Prior, card: StageCard, *, clip: str) -> None:
        super().__init__(net, card, number=PRIOR, label="prior")
        self.net, self.clip = net, clip

    @torch.no_grad()
    def forward(self, clip: ClipPair, call: Call, *, candidates: int = 1) -> ImageEmbedding:
        """One embedding for each prompt of the call: of ``candidates`` the one with the largest dot product
        with the text's (Ramesh et al. 2022, section 2.2). ValueError for texts of another CLIP.
        """
        if clip.name != self.clip:
            raise ValueError(
                f"the prior was trained on {self.clip!r}, and the texts are read by {clip.name!r}: two CLIPs"
                " share no space"
            )
        prompts = [str(prompt) for prompt in call.prompts]
        cond = self.read(clip, prompts)
        learned = self.net.config.blocks == "cosine" and not any(call.negatives)
        uncond = self.net.unconditional(1, device=self.device) if learned else self.read(clip, call.negatives)
        fn = self.guided(cond, uncond.expand(len(prompts)), call.guidance)

        def sample(k: int) -> Tensor:
            number = self.number + k
            return self.net.denormalize(
                self.run(
                    fn, self.start(call, (self.net.config.embed_dim,), number=number), call, number=number
                )
            )

        length: Length = "unit" if self.net.config.normalize == "unit" else "clip"
        return ImageEmbedding(vector=best_of(sample, candidates, cond), clip=self.clip, length=length)

    def read(self, clip: ClipPair, prompts: Sequence[str]) -> Cond:
        """Texts as the network takes them: a "unit" prior reads the text's embedding at length 1 too, and as
        many tokens as it was made for."""
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


def best_of(sample: Callable[[int], Tensor], candidates: int, cond: Cond) -> Tensor:
    """Of embeddings (B, E), made for k = 0 … candidates − 1, each the one with the largest dot product with
    the text's; float32."""
    if candidates < 1:
        raise ValueError(f"candidates: expected at least 1, got {candidates}")
    stack = torch.stack([sample(k).float() for k in range(candidates)], dim=1)  # (B, k, E)
    if candidates == 1:
        return stack[:, 0]
    assert cond.pooled is not None
    best = torch.einsum("bke,be->bk", stack, cond.pooled.to(stack)).argmax(1)
    return stack[torch.arange(len(stack)), best]
