"""Conditioners: prompts to conditions by a tokenizer, a text tower, and the convention that connects them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from ldm.conditioning.learned import LearnedWords, Words
from ldm.conditioning.prompt import parse, plain_texts, unknown_words
from ldm.conditioning.reading import EncoderStates, encode_prompts, word_positions
from ldm.diffusion.cond import Cond
from ldm.models.clip.towers import TextTower
from ldm.models.draft import Draft
from ldm.models.text.bpe import Tokenizer
from ldm.support.config import check_between


@dataclass(frozen=True, kw_only=True)
class TextConvention:
    """How a model reads its text tower.

    Args:
        layer: The block whose output is the context: −1 the last, −2 the last but one. Default: −1.
        final_norm: Whether the final norm is applied to it. Default: True.
        length: Tokens that a prompt is padded to, with start and end; None for the longest prompt of the
            batch. Default: 77.
        pad: The token that it is padded with. Default: 49407, CLIP's end-of-text token.
        masked: Whether the padding is masked in attention. Default: False.
        pooled: Whether the projected end-of-text state conditions the network too. Default: False.
    """

    layer: int = -1
    final_norm: bool = True
    length: int | None = 77
    pad: int = 49407
    masked: bool = False
    pooled: bool = False

    def __post_init__(self) -> None:
        check_between(-1000, 1000, layer=self.layer)
        check_between(2, 100_000, length=self.length)
        check_between(0, 10_000_000, pad=self.pad)


class Conditioner(Protocol):
    """What turns prompts into conditions."""

    def __call__(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, *, seeds: Sequence[int] = ()
    ) -> Cond:
        """Return the condition of B prompts.

        Args:
            prompts: B prompts.
            size: (h, w) of the latent, for conditioners that draft it. Default: the draft's own size.
            seeds: The seeds of the images, for conditioners that draw what a prompt leaves open: B, or any
                number for a single prompt, which then has a condition for each seed if it depends on it.
                Default: 0 for all.
        """
        ...

    def unknown(self, prompt: str) -> list[str]:
        """Return the words of a prompt that the model was not trained on, as far as known."""
        ...

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks by their names in weight files."""
        ...


@runtime_checkable
class KnowsWords(Protocol):
    """A conditioner that can say which words, or phrases, its model was trained on; None if not known."""

    @property
    def known_words(self) -> frozenset[str] | None:
        """The words."""
        ...


class TextConditioner(nn.Module):
    """A CLIP text tower as a conditioner.

    Args:
        tower: The text tower.
        tokenizer: Its tokenizer.
        convention: How the model reads the tower.
        known_words: The words that the model was trained on; None if not known. Default: None.
        draft: The network that computes `Cond.concat` from the text embedding. Default: None.

    Attributes:
        learned: Words that stand for learned vectors; none at first.

    Raises:
        ValueError: If the draft reads embeddings of another width than the tower's, or the tower has fewer
            tokens or blocks than tokenizer and convention use.
    """

    def __init__(
        self,
        tower: TextTower,
        tokenizer: Tokenizer,
        convention: TextConvention,
        known_words: frozenset[str] | None = None,
        draft: Draft | None = None,
    ) -> None:
        super().__init__()
        if draft is not None and draft.config.embed_dim != tower.config.embed_dim:
            raise ValueError(
                f"the draft reads embeddings {draft.config.embed_dim} wide, the text tower's are"
                f" {tower.config.embed_dim}"
            )
        config = tower.config
        check_between(0, config.vocab_size, tokens=len(tokenizer))
        check_between(0, config.vocab_size - 1, pad=convention.pad)
        check_between(-config.layers, -1, layer=convention.layer)
        check_between(2, config.context_length, length=convention.length)
        self.tower = tower
        self.draft = draft
        self.tokenizer = tokenizer
        self.convention = convention
        self.known_words = known_words
        self.learned = LearnedWords(config.vocab_size, config.width)

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.tower.config.width

    def forward(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, *, seeds: Sequence[int] = ()
    ) -> Cond:
        """Return the condition of B prompts.

        Prompts may have weights and blends (`ldm.conditioning.prompt`) and be longer than a window
        (`ldm.conditioning.reading`). Words that a small vocabulary lacks are left out; see `unknown`.

        Args:
            prompts: B prompts.
            size: (h, w) of the latent, for models with a draft. Default: the draft's own size.
            seeds: Not read.

        Returns:
            A Cond with context (B, M, D), its mask where padding is masked, pooled (B, E) where the network
            takes it, and concat (B, C, h, w) where the model has a draft.
        """
        cond = encode_prompts(prompts, self.word_ids, self.encode, self.room)
        draft = None
        if self.draft is not None:
            assert cond.pooled is not None
            draft = self.draft(cond.pooled, size)
        return replace(cond, pooled=cond.pooled if self.convention.pooled else None, concat=draft)

    @property
    def room(self) -> int:
        """The number of tokens that the tower reads at once, without start and end."""
        longest = self.tower.config.context_length
        return min(self.convention.length or longest, longest) - 2

    @property
    def padded_length(self) -> int | None:
        """The number of tokens of a window in the context; None if padding is masked and thus left out."""
        return None if self.convention.masked else self.convention.length

    def encode(self, rows: list[list[int]]) -> EncoderStates:
        """Return the tower's states of R rows of token ids, each put between start and end and padded."""
        c = self.convention
        ids = self.tokenizer.pad(rows, c.length, c.pad).to(self.tower.token_embedding.weight.device)  # (R, L)
        eot = (ids == self.tower.config.eot_id).int().argmax(dim=1)  # (R,) the first one
        mask = torch.arange(ids.shape[1], device=ids.device) <= eot[:, None] if c.masked else None  # (R, L)
        out = self.tower(
            ids,
            layer=c.layer,
            final_norm=c.final_norm,
            pooled=c.pooled or self.draft is not None,
            learned=self.learned.embeddings(self.tower.token_embedding.weight),
        )
        return EncoderStates(out.tokens, mask, out.pooled)

    def word_ids(self, text: str) -> Words:
        """Return the words of a text that have tokens, with their ids; learned words are such words."""
        return self.learned.word_ids(text, self.tokenizer.word_ids)

    def readers(self) -> dict[str, TextConditioner]:
        """Return what reads prompts with learned words, by the name of its tower in weight files."""
        return {"text": self}

    def places(self, prompt: str) -> list[tuple[str, list[int]]]:
        """Return the words of a prompt that have tokens, and the positions 0 … M − 1 of these in the context.

        Of a blend only the first alternative counts.
        """
        return word_positions(parse(prompt)[0].spans, self.word_ids, self.room, self.padded_length)

    def unknown(self, prompt: str) -> list[str]:
        """Return what the model was not trained on in a prompt, in order, each once.

        First the words that it was not trained on (none if these are not known), then what else is left out:
        signs that a small vocabulary lacks, and control characters.
        """
        prompt = self.learned.without(prompt)
        texts = plain_texts(prompt)
        missing = [] if self.known_words is None else unknown_words(prompt, self.known_words)
        named = "\n".join(missing)
        signs = [part for text in texts for part in self.tokenizer.unknown(text) if part not in named]
        control = [
            char
            for text in texts
            for char in text
            if unicodedata.category(char) == "Cc" and not char.isspace()
        ]
        return list(dict.fromkeys([*missing, *signs, *control]))

    def networks(self) -> dict[str, nn.Module]:
        """Return the tower as "text", and the draft as "draft" if there is one."""
        networks: dict[str, nn.Module] = {"text": self.tower}
        return networks if self.draft is None else networks | {"draft": self.draft}


class TwoTowers(nn.Module):
    """SDXL's conditioner: the tokens of two towers side by side (Podell et al. 2023, section 2.1).

    Args:
        first: The first tower; None for the second alone, as in the refiner.
        second: The second tower, whose pooled state conditions the network too.

    Raises:
        ValueError: If the second tower has no projection, or its convention does not include the pooled
            state.
    """

    def __init__(self, first: TextConditioner | None, second: TextConditioner) -> None:
        super().__init__()
        if not second.convention.pooled or second.tower.text_projection is None:
            raise ValueError(
                "the second tower gives the pooled text: expected a projection, and pooled in its convention"
            )
        self.first = first
        self.second = second

    @property
    def width(self) -> int:
        """D, the width of a token: the sum of both towers'."""
        return self.second.width + (0 if self.first is None else self.first.width)

    def forward(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, *, seeds: Sequence[int] = ()
    ) -> Cond:
        """Return the condition of B prompts: context (B, M, D), its mask if lengths differ, pooled (B, E).

        `size` and `seeds` are not read.
        """
        second = self.second(prompts)
        if self.first is None:
            return second
        first = self.first(prompts)
        assert first.context is not None and second.context is not None
        return replace(second, context=torch.cat([first.context, second.context], dim=-1))

    def unknown(self, prompt: str) -> list[str]:
        """Return the words of a prompt that the second tower was not trained on; see `TextConditioner`."""
        return self.second.unknown(prompt)

    def readers(self) -> dict[str, TextConditioner]:
        """Return what reads prompts with learned words, by the name of its tower in weight files."""
        second = {"text2": self.second}
        return second if self.first is None else {"text": self.first, **second}

    def places(self, prompt: str) -> list[tuple[str, list[int]]]:
        """Return the words of a prompt and the positions of their tokens, the same in both towers."""
        return self.second.places(prompt)

    def networks(self) -> dict[str, nn.Module]:
        """Return the towers as "text" and "text2", their names in weight files."""
        second: dict[str, nn.Module] = {"text2": self.second.tower}
        return second if self.first is None else {"text": self.first.tower, **second}
