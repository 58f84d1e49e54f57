"""The autoregressive prior as a stage of unCLIP (Ramesh et al. 2022, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldm.catalog.unclip_cards import AutoregressiveCard
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.diffusion.seeds import check_seeds
from ldm.models.unclip.autoregressive import AutoregressivePrior
from ldm.pipelines.call import check_count, check_prompts
from ldm.pipelines.stages.prior import best_of
from ldm.pipelines.stages.stage import PRIOR, STEPS


@dataclass(frozen=True, kw_only=True)
class AutoregressiveCall:
    """A prompt and a seed for each embedding; see `AutoregressivePrior.sample` for the rest."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    similarity: float
    temperature: float


class AutoregressiveStage(nn.Module):
    """Texts → image embeddings of the CLIP ``clip``, component by component; options ``similarity`` and
    ``temperature``."""

    options = ("similarity", "temperature")

    def __init__(self, net: AutoregressivePrior, card: AutoregressiveCard, *, clip: str) -> None:
        super().__init__()
        self.net, self.card, self.clip = net, card, clip

    def settle(
        self,
        prompt: str | Sequence[str],
        *,
        n: int | None = None,
        negative: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        progress: bool = True,
        **own: Any,
    ) -> AutoregressiveCall:
        """The call of some options, None for what the card says; a ``negative`` prompt raises ValueError, as
        there is no guidance."""
        if any(negative):
            raise ValueError(
                f"negative {negative!r}: an autoregressive prior has no guidance, which would turn away"
                " from it"
            )
        each, texts = check_count(n), [str(text) for text in check_prompts(prompt)]
        settings = {
            name: getattr(self.card, name) if own.get(name) is None else float(own[name])
            for name in self.options
        }
        prompts = tuple(text for text in texts for _ in range(each))
        return AutoregressiveCall(prompts=prompts, seeds=check_seeds(seed, len(prompts)), **settings)

    @torch.no_grad()
    def forward(self, clip: ClipPair, call: AutoregressiveCall, *, candidates: int = 1) -> ImageEmbedding:
        """One embedding for each prompt of the call, of ``candidates`` the best as in `PriorStage`;
        ValueError for texts of another CLIP."""
        if clip.name != self.clip:
            raise ValueError(
                f"the prior was trained on {self.clip!r}, and the texts are read by {clip.name!r}: two CLIPs"
                " share no space"
            )
        cond = clip.read(call.prompts)

        def sample(k: int) -> torch.Tensor:
            first = (PRIOR + k) * STEPS
            return self.net.sample(
                cond, call.seeds, similarity=call.similarity, temperature=call.temperature, first=first
            )

        return ImageEmbedding(vector=best_of(sample, candidates, cond), clip=self.clip)
