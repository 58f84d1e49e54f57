"""Kandinsky 2.1's text encoder: XLM-R (Conneau et al. 2020), its states averaged and projected into CLIP's
space (Carlsson et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class XLMRConfig:
    """The shape of the encoder; the defaults are XLM-R large's with CLIP ViT-L's projection. ``length``:
    tokens a prompt is padded to."""

    vocabulary: int = 250_002
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    positions: int = 514
    embed_dim: int = 768
    length: int = 77

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width}: expected a multiple of heads {self.heads}")
        if self.length + 2 > self.positions:  # the first two are of padding and of nothing
            raise ValueError(
                f"length {self.length}: expected at most {self.positions - 2}, the positions there are"
            )


class XLMRLayer(nn.Module):
    """Self-attention and an MLP, each with its norm behind the residual sum."""

    def __init__(self, config: XLMRConfig) -> None:
        super().__init__()
        self.heads, width = config.heads, config.width
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            rearrange(p(x), "b l (h d) -> b h l d", h=self.heads) for p in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = self.norm1(x + self.out(rearrange(attended, "b h l d -> b l (h d)")))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class XLMR(nn.Module):
    """Token ids → the states of every token, and the projection of their mean."""

    def __init__(self, config: XLMRConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.kind = nn.Parameter(torch.zeros(1, config.width))  # of the one kind of token that there is
        self.norm = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(XLMRLayer(config) for _ in range(config.layers))
        self.projection = nn.Linear(config.width, config.embed_dim)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids and mask (B, L), True where a token counts → states (B, L, D), and embeddings (B, E)."""
        places = mask.long().cumsum(1) * mask + 1  # counted from 2, 1 for padding
        x = self.norm(self.tokens(ids) + self.positions(places) + self.kind)
        for layer in self.layers:
            x = layer(x, mask)
        weight = mask[..., None].to(x.dtype)
        return x, self.projection((x * weight).sum(1) / weight.sum(1))
