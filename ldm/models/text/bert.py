"""The text encoder of LDM's first text-to-image models: a bidirectional transformer over WordPiece tokens
(Rombach et al. 2022, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.layers.attention import attend


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The shape of the encoder; the defaults are those of text2img-large. Attention is heads × head_dim wide
    inside, whatever the width."""

    vocabulary: int = 30522
    width: int = 1280
    layers: int = 32
    heads: int = 8
    head_dim: int = 64
    length: int = 77

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "head_dim", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


class BertSelfAttention(nn.Module):
    """Every token looks at every token, padding included."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.k_proj = nn.Linear(config.width, inner, bias=False)
        self.v_proj = nn.Linear(config.width, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(p(x), "b l (h d) -> b h l d", h=self.heads)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(rearrange(attend(q, k, v), "b h l d -> b l (h d)"))


class BertLayer(nn.Module):
    """Self-attention and feed-forward with the exact gelu, each behind its norm and before a residual sum."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.width)
        self.self_attn = BertSelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.width)
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class BertTransformer(nn.Module):
    """Token and position embeddings, the layers, and a last norm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.embed_positions = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))
        self.layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids) + self.embed_positions.weight[: ids.shape[1]]  # (B, L, D)
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class LDMBert(nn.Module):
    """Token ids to the context of the UNet. The published files' projection to logits (`to_logits`) serves
    nothing and is left out."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.model = BertTransformer(config)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L), L at most the length → (B, L, D); ValueError for longer ones."""
        if ids.shape[1] > self.config.length:
            raise ValueError(f"got {ids.shape[1]} tokens, expected at most {self.config.length}")
        return self.model(ids)
