"""Texts as the states that a decoder of image tokens attends to.

Either a tokenizer and an encoder of its ids (DALL·E Mini), or a frozen text tower and an encoder of its
states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.models.dalle.encoder import DalleEncoder, StateEncoder, text_mask
from ldm.models.text.byte_bpe import ByteTokenizer
from ldm.support.device import computing_dtype


class TextStates(NamedTuple):
    """The states of B texts.

    Attributes:
        states: Shape (B, M, D).
        mask: True for tokens of the texts, bool, shape (B, M).
    """

    states: Tensor
    mask: Tensor


class TokenTexts(Protocol):
    """What turns texts into states of the width D of a decoder."""

    @property
    def width(self) -> int:
        """The width D."""

    def __call__(self, texts: Sequence[str]) -> TextStates:
        """Return the states of B texts."""

    def cut(self, texts: Sequence[str]) -> tuple[int, list[str]]:
        """Return the number of tokens that are read of a text, and the texts that have more."""

    def networks(self) -> Mapping[str, nn.Module]:
        """Return the networks by their names in weight files."""


class EncodedTexts:
    """A tokenizer of bytes or symbols, and an encoder of its ids.

    Args:
        tokenizer: Texts → ids.
        encoder: Ids → states.

    Raises:
        ValueError: If the tokenizer has more ids than the encoder.
    """

    def __init__(self, tokenizer: ByteTokenizer, encoder: DalleEncoder) -> None:
        if len(tokenizer) > encoder.config.vocabulary:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} ids, the encoder {encoder.config.vocabulary}"
            )
        self.tokenizer, self.encoder = tokenizer, encoder

    @property
    def width(self) -> int:
        """The width D."""
        return self.encoder.config.width

    def __call__(self, texts: Sequence[str]) -> TextStates:
        """Return the states of B texts."""
        ids, _ = self.tokenizer(texts, self.encoder.config.length)
        ids = ids.to(self.encoder.embed_tokens.weight.device)
        return TextStates(self.encoder(ids), text_mask(ids))

    def cut(self, texts: Sequence[str]) -> tuple[int, list[str]]:
        """Return the number of tokens that are read of a text, and the texts that have more."""
        length = self.encoder.config.length
        return length, self.tokenizer(texts, length)[1]

    def networks(self) -> dict[str, nn.Module]:
        """Return the encoder."""
        return {"encoder": self.encoder}


class TowerTexts:
    """A frozen text tower, and an encoder of its states.

    Texts may have weights and blends (`ldm.conditioning.prompt`) and be longer than the tower's window.

    Args:
        tower: The text tower with its tokenizer.
        encoder: The tower's states → states.

    Raises:
        ValueError: If the encoder reads states of another width.
    """

    def __init__(self, tower: TextConditioner, encoder: StateEncoder) -> None:
        if tower.width != encoder.config.text_width:
            raise ValueError(
                f"the text tower is {tower.width} wide, the encoder reads {encoder.config.text_width}"
            )
        self.tower, self.encoder = tower, encoder

    @property
    def width(self) -> int:
        """The width D."""
        return self.encoder.config.width

    def __call__(self, texts: Sequence[str]) -> TextStates:
        """Return the states of B texts; the tower's are computed without gradients."""
        with torch.no_grad():
            cond = self.tower(texts)
        assert cond.context is not None
        context = cond.context.to(computing_dtype(self.encoder) or torch.float32)  # (B, M, D_text)
        mask = cond.context_mask
        if mask is None:
            mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        return TextStates(self.encoder(context, mask), mask)

    def cut(self, texts: Sequence[str]) -> tuple[int, list[str]]:
        """Return the tokens of a window, and no texts: long ones are read in several windows."""
        return self.tower.room, []

    def networks(self) -> dict[str, nn.Module]:
        """Return the tower and the encoder."""
        return {**self.tower.networks(), "encoder": self.encoder}


def token_texts(
    encoder: DalleEncoder | StateEncoder, tokenizer: ByteTokenizer | None, tower: TextConditioner | None
) -> TokenTexts:
    """Return what reads texts with an encoder: a tokenizer for one of ids, a text tower for one of states.

    Raises:
        ValueError: If the encoder has not what it reads with, or does not fit it.
    """
    if isinstance(encoder, DalleEncoder):
        if tokenizer is None or tower is not None:
            raise ValueError("a DalleEncoder reads ids: expected a tokenizer, and no text tower")
        return EncodedTexts(tokenizer, encoder)
    if tower is None or tokenizer is not None:
        raise ValueError("a StateEncoder reads states: expected a text tower, and no tokenizer")
    return TowerTexts(tower, encoder)
