"""Prompts to conditions by LDM's BERT-like encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ldm.conditioning.prompt import parse, plain_texts
from ldm.conditioning.reading import States, read, word_places
from ldm.diffusion.cond import Cond
from ldm.models.text.bert import LDMBert
from ldm.models.text.wordpiece import WORDPIECE_UNKNOWN, WordPiece


class BertConditioner(nn.Module):
    """Prompts in, `Cond` out: padded to the encoder's length, the padding attended to, as these models were
    trained."""

    def __init__(self, encoder: LDMBert, tokenizer: WordPiece) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        if len(tokenizer.vocabulary) > encoder.config.vocabulary:
            raise ValueError(
                f"the vocabulary has {len(tokenizer.vocabulary)} tokens, the encoder"
                f" {encoder.config.vocabulary}"
            )

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.encoder.config.width

    def forward(self, prompts: Sequence[str]) -> Cond:
        """The condition of B prompts: context (B, M, D), M the encoder's length or a multiple, and a mask if
        their lengths differ.

        Prompts may have weights and blends (`ldm.conditioning.prompt`), and any length
        (`ldm.conditioning.reading`).
        """
        return read(prompts, self.tokenizer.words, self.encode, self.encoder.config.length - 2)

    def encode(self, rows: list[list[int]]) -> States:
        """The encoder's states of rows of ids, each put between start and end and padded."""
        ids = self.tokenizer.pad(rows, self.encoder.config.length)
        return States(
            self.encoder(torch.tensor(ids, device=self.encoder.model.layer_norm.weight.device)), None, None
        )

    def places(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt and where in the context their tokens stand; of a blend's first
        alternative."""
        length = self.encoder.config.length
        return word_places(parse(prompt)[0].spans, self.tokenizer.words, length - 2, length)

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that have no tokens but the one for unknown words."""
        unk = self.tokenizer.vocabulary[WORDPIECE_UNKNOWN]
        return list(
            dict.fromkeys(
                word for text in plain_texts(prompt) for word, ids in self.tokenizer.words(text) if unk in ids
            )
        )

    def networks(self) -> dict[str, nn.Module]:
        """The encoder, as "text"."""
        return {"text": self.encoder}
