"""The autoregressive prior of unCLIP (Ramesh et al. 2022, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.unclip_cards import AutoregressiveCard
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.diffusion.seeds import check_seeds
from ldm.models.unclip.autoregressive import AutoregressivePrior
from ldm.pipelines.checks import check_count, check_number, check_prompts
from ldm.pipelines.stages.prior import best_of, check_same_clip
from ldm.pipelines.stages.stage import DRAWS_PER_STAGE, PRIOR


@dataclass(frozen=True, kw_only=True)
class AutoregressiveCall:
    """The settled options of one call of an autoregressive prior.

    Attributes:
        prompts: A prompt for each embedding.
        seeds: A seed for each embedding.
        similarity, temperature: See `AutoregressivePrior.sample`.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    similarity: float
    temperature: float


class AutoregressiveStage(nn.Module):
    """Texts → image embeddings, component by component.

    Args:
        net: The network.
        card: How it is sampled.
        clip: Name of the CLIP whose embeddings it makes.
    """

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
        """Settle the options of a call; None stands for the card's default.

        Args:
            prompt: One prompt or several.
            n: Number of embeddings of each prompt. Default: 1.
            negative: Must be empty.
            seed: Embedding i has seed `seed` + i; or a sequence with one seed for each.
            progress: Not used.
            own: `similarity` and `temperature`.

        Raises:
            ValueError: If there is a negative prompt, as this prior has no guidance.
        """
        if any(negative):
            raise ValueError(
                f"negative {negative!r}: an autoregressive prior has no guidance, so it takes no negative"
                " prompt"
            )
        each, texts = check_count(n), [str(text) for text in check_prompts(prompt)]
        settings = {
            name: getattr(self.card, name) if own.get(name) is None else check_number(name, own[name])
            for name in self.options
        }
        prompts = tuple(text for text in texts for _ in range(each))
        return AutoregressiveCall(prompts=prompts, seeds=check_seeds(seed, len(prompts)), **settings)

    @torch.no_grad()
    def forward(self, clip: ClipPair, call: AutoregressiveCall, *, candidates: int = 1) -> ImageEmbedding:
        """Sample one embedding for each prompt of the call; see `PriorStage.forward`."""
        check_same_clip(self.clip, clip)
        cond = clip.read(call.prompts)

        def sample(k: int) -> Tensor:
            first = (PRIOR + k) * DRAWS_PER_STAGE
            return self.net.sample(
                cond, call.seeds, similarity=call.similarity, temperature=call.temperature, first=first
            )

        return ImageEmbedding(vector=best_of(sample, candidates, cond), clip=self.clip)
