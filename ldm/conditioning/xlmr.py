"""The conditioner of Kandinsky's decoder: prompts to conditions by XLM-R."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ldm.diffusion.cond import Cond
from ldm.models.text.unigram import UNIGRAM_PAD, Unigram
from ldm.models.text.xlmr import XLMR


class XLMRConditioner(nn.Module):
    """XLM-R as a conditioner.

    Args:
        encoder: The encoder.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: If the tokenizer has more tokens than the encoder.
    """

    def __init__(self, encoder: XLMR, tokenizer: Unigram) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        if len(tokenizer.ids) > encoder.config.vocabulary:
            raise ValueError(
                f"the vocabulary has {len(tokenizer.ids)} tokens, the encoder {encoder.config.vocabulary}"
            )

    def forward(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, *, seeds: Sequence[int] = ()
    ) -> Cond:
        """Return the condition of B prompts: context (B, L, D) and pooled (B, E).

        All prompts are padded to the encoder's length; the network attends to the padding, as in training.
        `size` and `seeds` are not read.

        Raises:
            ValueError: If a prompt has more tokens than the encoder takes.
        """
        ids = torch.tensor(
            self.tokenizer(prompts, self.encoder.config.length), device=self.encoder.kind.device
        )  # (B, L)
        states, pooled = self.encoder(ids, ids != self.tokenizer.ids[UNIGRAM_PAD])
        return Cond(context=states, pooled=pooled)

    def unknown(self, prompt: str) -> list[str]:
        """Return an empty list: which words the model was trained on is not known."""
        return []

    def networks(self) -> dict[str, nn.Module]:
        """Return the encoder as "words", its name in weight files."""
        return {"words": self.encoder}
