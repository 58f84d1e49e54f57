"""The text encoder of Kandinsky 2.1, XLM-R (Conneau et al. 2020).

The mean of its token states is projected into CLIP's space (Carlsson et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.checks import check_positive


@dataclass(frozen=True, kw_only=True)
class XLMRConfig:
    """Shape of the encoder; the defaults are those of XLM-R large with a projection to CLIP ViT-L.

    Args:
        vocabulary: Number of token ids. Default: 250002.
        width: Width D of a token. Default: 1024.
        layers: Number of layers. Default: 24.
        heads: Number of attention heads H. Default: 16.
        mlp_width: Hidden width of the MLPs. Default: 4096.
        positions: Number of position embeddings; the first two are not used by tokens. Default: 514.
        embed_dim: Width E of the projected embedding. Default: 768.
        length: Number L of tokens that prompts are padded to. Default: 77.

    Raises:
        ValueError: If a number is out of range.
    """

    vocabulary: int = 250_002
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    positions: int = 514
    embed_dim: int = 768
    length: int = 77

    def __post_init__(self) -> None:
        check_positive(**vars(self))
        if self.width % self.heads:
            raise ValueError(f"width {self.width}: expected a multiple of heads {self.heads}")
        if self.length + 2 > self.positions:
            raise ValueError(
                f"length {self.length}: expected at most {self.positions - 2}, the positions available"
            )


class XLMRLayer(nn.Module):
    """Self-attention and MLP, each added to its input and followed by a layer norm."""

    def __init__(self, config: XLMRConfig) -> None:
        super().__init__()
        self.heads, width = config.heads, config.width
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the output (B, L, D) for x (B, L, D); the mask (B, L) is True for tokens, not padding."""
        q, k, v = (
            rearrange(p(x), "b l (h d) -> b h l d", h=self.heads) for p in (self.query, self.key, self.value)
        )  # (B, H, L, d) each
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])  # (B, H, L, d)
        x = self.norm1(x + self.out(rearrange(attended, "b h l d -> b l (h d)")))  # (B, L, D)
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class XLMR(nn.Module):
    """Encoder from token ids to token states and a text embedding."""

    def __init__(self, config: XLMRConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.kind = nn.Parameter(torch.zeros(1, config.width))  # embedding of the only token type
        self.norm = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(XLMRLayer(config) for _ in range(config.layers))
        self.projection = nn.Linear(config.width, config.embed_dim)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return token states (B, L, D) and text embeddings (B, E).

        Args:
            ids: Token ids, shape (B, L).
            mask: True for tokens, False for padding, bool, shape (B, L).
        """
        places = mask.long().cumsum(1) * mask + 1  # (B, L); tokens count from 2, padding is 1
        x = self.norm(self.tokens(ids) + self.positions(places) + self.kind)  # (B, L, D)
        for layer in self.layers:
            x = layer(x, mask)  # (B, L, D)
        weight = mask[..., None].to(x.dtype)  # (B, L, 1)
        return x, self.projection((x * weight).sum(1) / weight.sum(1))
