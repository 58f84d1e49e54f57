"""Prompts to conditions by XLM-R."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ldm.diffusion.cond import Cond
from ldm.models.text.unigram import UNIGRAM_PAD, Unigram
from ldm.models.text.xlmr import XLMR


class XLMRConditioner(nn.Module):
    """Prompts in, `Cond` out: context (B, length, D), padding attended to, and pooled (B, E)."""

    def __init__(self, encoder: XLMR, tokenizer: Unigram) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        if len(tokenizer.ids) > encoder.config.vocabulary:
            raise ValueError(
                f"the vocabulary has {len(tokenizer.ids)} tokens, the encoder {encoder.config.vocabulary}"
            )

    def forward(self, prompts: Sequence[str]) -> Cond:
        """The condition of B prompts; ValueError if a prompt has more tokens than the encoder takes."""
        ids = torch.tensor(
            self.tokenizer(prompts, self.encoder.config.length), device=self.encoder.kind.device
        )
        states, pooled = self.encoder(ids, ids != self.tokenizer.ids[UNIGRAM_PAD])
        return Cond(context=states, pooled=pooled)

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the model has never seen: not known of any."""
        return []

    def networks(self) -> dict[str, nn.Module]:
        """The encoder, as "words"."""
        return {"words": self.encoder}
