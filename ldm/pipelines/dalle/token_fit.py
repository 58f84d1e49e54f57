"""Layouts of exemplars that fit known tokens of an image; see `ldm.pipelines.layouts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.token_texts import ExemplarTexts, encode_condition
from ldm.diffusion.cond import Cond
from ldm.models.dalle.decoder import DalleDecoder
from ldm.pipelines.dalle.token_images import ABSENT
from ldm.pipelines.layouts import ExemplarFit, fitted_condition


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenFit(ExemplarFit):
    """A fit by the probability that a decoder gives the known tokens, given those before each of them.

    Attributes:
        texts: What encodes conditions.
        decoder: The decoder of tokens.
        start: The token before the first one of an image.
    """

    texts: ExemplarTexts
    decoder: DalleDecoder
    start: int

    def errors(self, cond: Cond, seed: int, known: Tensor, hole: Tensor) -> Tensor:
        """Return minus the logarithms of the probabilities, (B,); see `ExemplarFit.errors`.

        Those after a token that is not known are left out too, as the decoder reads that token.

        Args:
            cond: B conditions.
            seed: Not used.
            known: The tokens, int64, (1, 1, h, w).
            hole: 1 where they are not known, else 0, (1, 1, h, w).
        """
        read = encode_condition(self.texts.encoder, cond)
        tokens, absent = known.flatten(1), hole.flatten(1) > 0  # (1, N) each
        before = F.pad(tokens.clamp_min(0)[:, :-1], (1, 0), value=self.start)  # (1, N)
        scored = ~(absent | F.pad(absent[:, :-1], (1, 0)))
        count = len(read.states)
        logits = self.decoder(before.expand(count, -1), read.states, read.mask, read.shown).float()
        target = tokens.masked_fill(~scored, -100).expand(count, -1)
        return F.cross_entropy(logits.movedim(-1, 1), target, reduction="none").sum(1)


def fitted_texts(fit: TokenFit, prompts: Sequence[str], seeds: Sequence[int], known: Tensor) -> Cond:
    """Return the conditions of B prompts, each in the layout that fits the known tokens of its image.

    Args:
        fit: What layouts are fitted with.
        prompts: The prompts.
        seeds: B seeds.
        known: Tokens (B, N), `ABSENT` where they are not known.
    """
    grid = known.unflatten(1, (fit.texts.grid, -1))[:, None]  # (B, 1, h, w)
    holes = (grid == ABSENT).float()
    return Cond.cat(
        [
            fitted_condition(fit, prompt, seed, grid[i : i + 1], holes[i : i + 1])
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
    )
