"""Prompts to conditions: a tokenizer, a text tower, and the convention of how the one feeds the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ldm.models.clip import TextTower
from ldm.models.draft import Draft
from ldm.models.tokenizer import Tokenizer
from ldm.types import Cond
from ldm.words import words


@dataclass(frozen=True, kw_only=True)
class TextConvention:
    """How a model reads its text tower.

    ``layer``: which block's output, −1 the last, −2 the last but one; ``final_norm``: whether the final norm is applied to it. ``length``:
    tokens a prompt is padded to, None for the longest of the batch; ``pad``: the token it is padded with; ``masked``: whether padding is left
    out of attention. ``pooled``: whether the projected end-of-text state conditions the network too.
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
    """Prompts in, `Cond` out. ``words``: those the model was trained on, where that is known; ``draft``: what drafts `Cond.concat`, if anything."""

    def __init__(
        self, tower: TextTower, tokenizer: Tokenizer, convention: TextConvention, words: frozenset[str] | None = None, draft: Draft | None = None
    ) -> None:
        super().__init__()
        if draft is not None and draft.config.embed_dim != tower.config.embed_dim:
            raise ValueError(f"the draft reads embeddings {draft.config.embed_dim} wide, the text tower's are {tower.config.embed_dim}")
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
        """The condition of B prompts: context (B, L, D), its mask where padding is left out, and pooled (B, E) where the network takes it.

        Where the model drafts, concat (B, C, h, w) too, at the latent's ``size`` (h, w), or at the draft's own.

        ValueError if a prompt has more tokens than the tower takes; tokens that a small vocabulary lacks are left out (see `unknown`).
        """
        c = self.convention
        ids = self.tokenizer(list(prompts), context_length=c.length, pad=c.pad)
        limit = self.tower.config.context_length
        if ids.shape[1] > limit:
            raise ValueError(f"a prompt has {ids.shape[1]} tokens, expected at most {limit} with those for start and end")
        ids = ids.to(self.tower.token_embedding.weight.device)
        eot = (ids == self.tower.config.eot_id).int().argmax(dim=1)  # (B,) the first one
        mask = torch.arange(ids.shape[1], device=ids.device) <= eot[:, None] if c.masked else None  # (B, L)
        out = self.tower(ids, layer=c.layer, final_norm=c.final_norm, pooled=c.pooled or self.draft is not None)
        draft = None if self.draft is None else self.draft(out.pooled, size)
        return Cond(context=out.tokens, context_mask=mask, pooled=out.pooled if c.pooled else None, concat=draft)

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the model has never seen, in order; none where its words are not known."""
        if self.words is None:
            return []
        return [word for word in dict.fromkeys(words(prompt)) if word not in self.words]

    def places(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt that have tokens, and where in the context (0 … L − 1) these stand."""
        found, at = [], 1  # the start's token is first
        for word, ids in self.tokenizer.words(prompt):
            found.append((word, list(range(at, at + len(ids)))))
            at += len(ids)
        return found

    def networks(self) -> dict[str, nn.Module]:
        """The tower as "text", and the draft as "draft" where there is one."""
        return {"text": self.tower} | ({} if self.draft is None else {"draft": self.draft})


class TwoTowers(nn.Module):
    """SDXL's conditioner: the tokens of both towers side by side, and the second one's pooled state (Podell et al. 2023, section 2.1).

    ``first`` None: the second tower alone, as in the refiner.
    """

    def __init__(self, first: TextConditioner | None, second: TextConditioner) -> None:
        super().__init__()
        if not second.convention.pooled or second.tower.text_projection is None:
            raise ValueError("the second tower gives the pooled text: expected a projection, and pooled in its convention")
        self.first = first
        self.second = second

    @property
    def width(self) -> int:
        """D, the width of a token: that of both towers together."""
        return self.second.width + (0 if self.first is None else self.first.width)

    def forward(self, prompts: Sequence[str]) -> Cond:
        """The condition of B prompts: context (B, L, D) and pooled (B, E); ValueError if a prompt has more tokens than a tower takes."""
        second = self.second(prompts)
        if self.first is None:
            return second
        first = self.first(prompts)
        assert first.context is not None and second.context is not None
        return Cond(context=torch.cat([first.context, second.context], dim=-1), pooled=second.pooled)

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the second tower has never seen."""
        return self.second.unknown(prompt)

    def places(self, prompt: str) -> list[tuple[str, list[int]]]:
        """The words of a prompt and where in the context their tokens stand: in both towers alike."""
        return self.second.places(prompt)

    def networks(self) -> dict[str, nn.Module]:
        """The towers, as "text" and "text2"."""
        return ({} if self.first is None else {"text": self.first.tower}) | {"text2": self.second.tower}
