"""Texts as the states that a decoder of image tokens attends to.

Either a tokenizer and an encoder of its ids (DALL·E Mini), or the conditioner of a model with exemplars and
an encoder of its states and canvases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.diffusion.cond import Cond
from ldm.models.dalle.encoder import DalleEncoder, StateEncoder, text_mask
from ldm.models.text.byte_bpe import ByteTokenizer
from ldm.support.device import computing_dtype


class TextStates(NamedTuple):
    """What a decoder reads for B images.

    Attributes:
        states: States of T texts, shape (T, M, D).
        mask: True for tokens of the texts, bool, shape (T, M).
        rows: Index of the text of each image, int64, shape (B,). None: one image for each text.
        shown: What exemplars show in the cell of each token, shape (B, N, D). None: there are none.
    """

    states: Tensor
    mask: Tensor
    rows: Tensor | None = None
    shown: Tensor | None = None


class TokenTexts(Protocol):
    """What turns texts into states of the width D of a decoder."""

    def __call__(self, texts: Sequence[str], seeds: Sequence[int]) -> TextStates:
        """Return the states of the texts of B images, and what their seeds choose to show."""

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

    def __call__(self, texts: Sequence[str], seeds: Sequence[int]) -> TextStates:
        """Return the states of the texts of B images, each of which is encoded once."""
        different = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        states = self.encode(list(different))
        rows = torch.tensor([different[text] for text in texts], device=states.mask.device)
        return states._replace(rows=rows)

    def encode(self, texts: Sequence[str]) -> TextStates:
        """Return the states of T texts, each of an image of its own."""
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


class ExemplarTexts:
    """The conditioner of a model with exemplars, and an encoder of its states and canvases.

    Texts may have weights and blends (`ldm.conditioning.prompt`) and be longer than the tower's window.

    Args:
        conditioner: The text tower, the prior over layouts, and the library.
        encoder: The tower's states → states, and canvases → embeddings of cells.
        grid: Side of the grid of an image's tokens.

    Raises:
        ValueError: If the encoder reads states of another width, or sees another number of things.
    """

    def __init__(self, conditioner: ExemplarConditioner, encoder: StateEncoder, grid: int) -> None:
        given, read = (
            (conditioner.width, conditioner.slots),
            (encoder.config.text_width, encoder.config.slots),
        )
        if given != read:
            raise ValueError(
                f"the text tower is {given[0]} wide and the prior over layouts places {given[1]} things, the"
                f" encoder reads {read[0]} and {read[1]}"
            )
        self.conditioner, self.encoder, self.grid = conditioner, encoder, grid

    def __call__(self, texts: Sequence[str], seeds: Sequence[int]) -> TextStates:
        """Return the states of B texts, and the exemplars where B seeds place them."""
        return encode_condition(self.encoder, self.condition(texts, seeds))

    @torch.no_grad()
    def condition(self, texts: Sequence[str], seeds: Sequence[int]) -> Cond:
        """Return the condition of B texts and B seeds."""
        return self.conditioner(texts, (self.grid, self.grid), seeds=seeds)

    def cut(self, texts: Sequence[str]) -> tuple[int, list[str]]:
        """Return the tokens of a window, and no texts: long ones are read in several windows."""
        return self.conditioner.text.room, []

    def networks(self) -> dict[str, nn.Module]:
        """Return the text tower, the prior over layouts, and the encoder."""
        return {**self.conditioner.networks(), "encoder": self.encoder}


def encode_condition(encoder: StateEncoder, cond: Cond) -> TextStates:
    """Return the states of B conditions with context, its mask and exemplars."""
    assert cond.context is not None and cond.context_mask is not None and cond.exemplars is not None
    context = cond.context.to(computing_dtype(encoder) or torch.float32)  # (B, M, D_text)
    states = encoder(context, cond.context_mask)  # (B, M, D)
    return TextStates(states, cond.context_mask, shown=encoder.cells(cond.exemplars))


def token_texts(
    encoder: DalleEncoder | StateEncoder,
    tokenizer: ByteTokenizer | None,
    conditioner: ExemplarConditioner | None,
    grid: int,
) -> TokenTexts:
    """Return what reads texts with an encoder.

    Args:
        encoder: The encoder.
        tokenizer: The tokenizer of an encoder of ids; None for one of states.
        conditioner: What gives an encoder of states what it reads; None for one of ids.
        grid: Side of the grid of an image's tokens.

    Raises:
        ValueError: If the encoder has not what it reads with, or does not fit it.
    """
    if isinstance(encoder, DalleEncoder):
        if tokenizer is None or conditioner is not None:
            raise ValueError("a DalleEncoder reads ids: expected a tokenizer, and no conditioner")
        return EncodedTexts(tokenizer, encoder)
    if conditioner is None or tokenizer is not None:
        raise ValueError("a StateEncoder reads states: expected a conditioner, and no tokenizer")
    return ExemplarTexts(conditioner, encoder, grid)
