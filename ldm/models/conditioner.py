"""Prompts to conditions: a tokenizer, a text tower, and the convention of how the one feeds the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.models.clip import TextConfig, TextTower
from ldm.models.tokenizer import Tokenizer
from ldm.types import Cond


@dataclass(frozen=True, kw_only=True)
class TextConvention:
    """How a model reads its text tower.

    ``layer``: which block's output, −1 the last, −2 the last but one; ``final_norm``: whether the final norm is applied to it. ``length``: tokens a
    prompt is padded to, None for the longest of the batch; ``pad``: the token it is padded with; ``masked``: whether padding is left out of attention.
    ``pooled``: whether the projected end-of-text state conditions the network too.
    """

    layer: int = -1
    final_norm: bool = True
    length: int | None = 77
    pad: int = 49407
    masked: bool = False
    pooled: bool = False


EMOJI_TEXT = TextConvention(length=None, pad=0, masked=True, pooled=True)


class TextConditioner(nn.Module):
    """Prompts in, `Cond` out. ``words``: those the model was trained on, where that is known."""

    def __init__(self, tower: TextTower, tokenizer: Tokenizer, convention: TextConvention, words: frozenset[str] | None = None) -> None:
        super().__init__()
        self.tower = tower
        self.tokenizer = tokenizer
        self.convention = convention
        self.words = words

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.tower.config.width

    def forward(self, prompts: Sequence[str]) -> Cond:
        """The condition of B prompts: context (B, L, D), its mask where padding is left out, and pooled (B, E) where the network takes it.

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
        out = self.tower(ids, layer=c.layer, final_norm=c.final_norm)
        return Cond(context=out.tokens, context_mask=mask, pooled=out.pooled if c.pooled else None)

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the model has never seen, in order; none where its words are not known."""
        if self.words is None:
            return []
        from ldm.data.captions import words

        return [word for word in dict.fromkeys(words(prompt)) if word not in self.words]

    def export(self, folder: Path, record: Mapping[str, Any], words: Sequence[str]) -> None:
        """Write text.safetensors, text.yaml and vocabulary.json: tokens and words that training saw."""
        from ldm.training.checkpoint import write_atomically
        from ldm.training.export import export_part

        export_part(folder, "text", self.tower, self.tower.config, record)
        vocabulary = {"tokens": self.tokenizer.vocabulary, "words": list(words)}
        write_atomically(folder / "vocabulary.json", json.dumps(vocabulary, separators=(",", ":")).encode())


def read_text(folder: str | Path, convention: TextConvention = EMOJI_TEXT) -> TextConditioner:
    """The text conditioner that was exported to a folder, in float32."""
    from ldm.config import build
    from ldm.training.export import read_part
    from ldm.weights.io import load_strict, read_safetensors

    config = build(TextConfig, read_part(folder, "text")["model"], "text.model")
    with torch.device("meta"):
        tower = TextTower(config)
    load_strict(tower, read_safetensors(Path(folder) / "text.safetensors"), source=Path(folder) / "text.safetensors", dtype=torch.float32)
    vocabulary = json.loads((Path(folder) / "vocabulary.json").read_text())
    return TextConditioner(tower, Tokenizer(vocabulary=vocabulary["tokens"]), convention, frozenset(vocabulary["words"]))
