"""The text encoder of LDM's first text-to-image models (Rombach et al. 2022, section 4.3).

It is a bidirectional transformer over WordPiece tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.checks import check_positive
from ldm.models.layers.attention import attend


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Shape of the encoder; the defaults are those of text2img-large.

    Args:
        vocabulary: Number of token ids. Default: 30522.
        width: Width D of a token. Default: 1280.
        layers: Number of layers. Default: 32.
        heads: Number of attention heads H. Default: 8.
        head_dim: Channels d of a head; H·d may differ from D. Default: 64.
        length: Maximum number L of tokens. Default: 77.

    Raises:
        ValueError: If a number is below 1.
    """

    vocabulary: int = 30522
    width: int = 1280
    layers: int = 32
    heads: int = 8
    head_dim: int = 64
    length: int = 77

    def __post_init__(self) -> None:
        check_positive(**vars(self))


class BertSelfAttention(nn.Module):
    """Multi-head self-attention without a mask: padding is attended to."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.k_proj = nn.Linear(config.width, inner, bias=False)
        self.v_proj = nn.Linear(config.width, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention (B, L, D) of x (B, L, D)."""
        q, k, v = (
            rearrange(p(x), "b l (h d) -> b h l d", h=self.heads)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H, L, d) each
        return self.out_proj(rearrange(attend(q, k, v), "b h l d -> b l (h d)"))


class BertLayer(nn.Module):
    """Self-attention and feed-forward with the exact gelu, each after a layer norm and added to its input."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.self_attn = BertSelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, L, D) for x (B, L, D)."""
        x = x + self.self_attn(self.self_attn_layer_norm(x))  # (B, L, D)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class BertTransformer(nn.Module):
    """Token and position embeddings, the layers, and a final norm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.embed_positions = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """Return token states (B, L, D) of ids (B, L)."""
        x = self.embed_tokens(ids) + self.embed_positions.weight[: ids.shape[1]]  # (B, L, D)
        for layer in self.layers:
            x = layer(x)  # (B, L, D)
        return self.layer_norm(x)


class LDMBert(nn.Module):
    """Encoder from token ids to the context of the UNet.

    The published files also hold a projection to logits (`to_logits`), which is not used and not included.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.model = BertTransformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Return token states (B, L, D) of ids (B, L).

        Raises:
            ValueError: If L exceeds the configured length.
        """
        if ids.shape[1] > self.config.length:
            raise ValueError(f"got {ids.shape[1]} tokens, expected at most {self.config.length}")
        return self.model(ids)
