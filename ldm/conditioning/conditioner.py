"""Prompts to conditions: a tokenizer, a text tower, and the convention of how the one feeds the other."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from ldm.conditioning.prompt import parse, plain_texts, unknown_words
from ldm.conditioning.reading import States, read, word_places
from ldm.diffusion.cond import Cond
from ldm.models.clip.towers import TextTower
from ldm.models.draft import Draft
from ldm.models.text.bpe import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextConvention:
    """How a model reads its text tower.

    ``layer``: which block's output, −1 the last, −2 the last but one; ``final_norm``: whether the final norm
    is applied to it. ``length``: tokens a prompt is padded to, None for the longest of the batch; ``pad``:
    the token it is padded with; ``masked``: whether padding is left out of attention. ``pooled``: whether the
    projected end-of-text state conditions the network too.
    """

    layer: int = -1
    final_norm: bool = True
    length: int | None = 77
    pad: int = 49407
    masked: bool = False
    pooled: bool = False


class Conditioner(Protocol):
    """What turns prompts into conditions; ``networks`` are its parts by name, as weights are stored."""

    def __call__(self, prompts: Sequence[str]) -> Cond: ...

    def unknown(self, prompt: str) -> list[str]: ...

    def networks(self) -> dict[str, nn.Module]: ...


class TextConditioner(nn.Module):
    """Prompts in, `Cond` out. ``words``: those the model was trained on, where that is known; ``draft``: what
    drafts `Cond.concat`, if anything."""

    def __init__(
        self,
        tower: TextTower,
        tokenizer: Tokenizer,
        convention: TextConvention,
        words: frozenset[str] | None = None,
        draft: Draft | None = None,
    ) -> None:
        super().__init__()
        if draft is not None and draft.config.embed_dim != tower.config.embed_dim:
            raise ValueError(
                f"the draft reads embeddings {draft.config.embed_dim} wide, the text tower's are"
                f" {tower.config.embed_dim}"
            )
        self.tower = tower
        self.draft = draft
        self.tokenizer = tokenizer
        self.convention = convention
        self.words = words

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.tower.config.width

    def forward(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Cond:
        """The condition of B prompts: context (B, M, D), its mask where padding is left out, and pooled (B,
        E) where the network takes it.

        Where the model drafts, concat (B, C, h, w) too, at the latent's ``size`` (h, w), or at the draft's
        own.

        Prompts may have weights and blends (`ldm.conditioning.prompt`), and any length
        (`ldm.conditioning.reading`); words that a small vocabulary lacks are left out (see `unknown`).
        """
        cond = read(prompts, self.tokenizer.words, self.encode, self.room)
        draft = None
        if self.draft is not None:
            assert cond.pooled is not None
            draft = self.draft(cond.pooled, size)
        return replace(cond, pooled=cond.pooled if self.convention.pooled else None, concat=draft)

    @property
    def room(self) -> int:
        """The tokens of a prompt that are read at once, besides start and end."""
        return (
            min(self.convention.length or self.tower.config.context_length, self.tower.config.context_length)
            - 2
        )

    def encode(self, rows: list[list[int]]) -> States:
        """The tower's states of rows of ids, each put between start and end and padded."""
        c = self.convention
        ids = self.tokenizer.pad(rows, c.length, c.pad).to(self.tower.token_embedding.weight.device)
        eot = (ids == self.tower.config.eot_id).int().argmax(dim=1)  # (R,) the first one
        mask = torch.arange(ids.shape[1], device=ids.device) <= eot[:, None] if c.masked else None  # (R, L)
        out = self.tower(
            ids, layer=c.layer, final_norm=c.final_norm, pooled=c.pooled or self.draft is not None
        )
        return States(out.tokens, mask, out.pooled)

    def places(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt that have tokens, and where in the context (0 … M − 1) these stand; of a
        blend's first alternative."""
        length = None if self.convention.masked else self.convention.length
        return word_places(parse(prompt)[0].spans, self.tokenizer.words, self.room, length)

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the model has never seen, in order, then what else of it is left out:
        signs that a small vocabulary lacks, control characters. Where the words are not known, none is named.
        """
        texts = plain_texts(prompt)
        missing = [] if self.words is None else unknown_words(prompt, self.words)
        signs = [
            part
            for text in texts
            for part in self.tokenizer.unknown(text)
            if not any(part in word for word in missing)
        ]
        control = [
            char
            for text in texts
            for char in text
            if unicodedata.category(char) == "Cc" and not char.isspace()
        ]
        return list(dict.fromkeys([*missing, *signs, *control]))

    def networks(self) -> dict[str, nn.Module]:
        """The tower as "text", and the draft as "draft" where there is one."""
        return {"text": self.tower} | ({} if self.draft is None else {"draft": self.draft})


class TwoTowers(nn.Module):
    """SDXL's conditioner: the tokens of both towers side by side, and the second one's pooled state (Podell
    et al. 2023, section 2.1).

    ``first`` None: the second tower alone, as in the refiner.
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
        """D, the width of a token: that of both towers together."""
        return self.second.width + (0 if self.first is None else self.first.width)

    def forward(self, prompts: Sequence[str]) -> Cond:
        """The condition of B prompts: context (B, M, D), its mask if their lengths differ, and pooled (B,
        E)."""
        second = self.second(prompts)
        if self.first is None:
            return second
        first = self.first(prompts)
        assert first.context is not None and second.context is not None
        return replace(second, context=torch.cat([first.context, second.context], dim=-1))

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the second tower has never seen."""
        return self.second.unknown(prompt)

    def places(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt and where in the context their tokens stand: in both towers alike."""
        return self.second.places(prompt)

    def networks(self) -> dict[str, nn.Module]:
        """The towers, as "text" and "text2"."""
        return ({} if self.first is None else {"text": self.first.tower}) | {"text2": self.second.tower}
