"""The conditioner of the first latent diffusion models: prompts to conditions by a BERT-like encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ldm.conditioning.prompt import parse, plain_texts
from ldm.conditioning.reading import EncoderStates, encode_prompts, word_positions
from ldm.diffusion.cond import Cond
from ldm.models.text.bert import LDMBert
from ldm.models.text.wordpiece import WORDPIECE_UNKNOWN, WordPiece


class BertConditioner(nn.Module):
    """LDM's BERT-like encoder as a conditioner.

    Prompts are padded to the encoder's length; the network attends to the padding, as in training.

    Args:
        encoder: The encoder.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: If the tokenizer has more tokens than the encoder.
    """

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

    def forward(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, *, seeds: Sequence[int] = ()
    ) -> Cond:
        """Return the condition of B prompts: context (B, M, D), and a mask if their lengths differ.

        Prompts may have weights and blends (`ldm.conditioning.prompt`) and be longer than a window
        (`ldm.conditioning.reading`). M is a multiple of the encoder's length.

        `size` and `seeds` are not read.
        """
        return encode_prompts(prompts, self.tokenizer.word_ids, self.encode, self.encoder.config.length - 2)

    def encode(self, rows: list[list[int]]) -> EncoderStates:
        """Return the encoder's states of R rows of token ids, each put between start and end and padded."""
        ids = self.tokenizer.pad(rows, self.encoder.config.length)
        device = self.encoder.model.layer_norm.weight.device
        return EncoderStates(self.encoder(torch.tensor(ids, device=device)), None, None)

    def places(self, prompt: str) -> list[tuple[str, list[int]]]:
        """Return the words of a prompt and the positions of their tokens in the context.

        Of a blend only the first alternative counts.
        """
        length = self.encoder.config.length
        return word_positions(parse(prompt)[0].spans, self.tokenizer.word_ids, length - 2, length)

    def unknown(self, prompt: str) -> list[str]:
        """Return the words of a prompt that contain a token for unknown text, in order, each once."""
        unk = self.tokenizer.vocabulary[WORDPIECE_UNKNOWN]
        return list(
            dict.fromkeys(
                word
                for text in plain_texts(prompt)
                for word, ids in self.tokenizer.word_ids(text)
                if unk in ids
            )
        )

    def networks(self) -> dict[str, nn.Module]:
        """Return the encoder as "text", its name in weight files."""
        return {"text": self.encoder}
