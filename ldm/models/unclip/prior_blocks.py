"""The transformers of priors: the blocks of a GPT, and those of DALLE2-pytorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.layers.attention import Attention
from ldm.models.layers.modules import ModuleListOf


class GELU(nn.Module):
    """Linear layer followed by the exact gelu."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., inner) for x (..., width)."""
        return F.gelu(self.proj(x))


class GELUFeedForward(nn.Module):
    """GELU to four times the width, and a linear layer back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., width) for x (..., width)."""
        return self.net[2](self.net[0](x))


class PlainBlock(nn.Module):
    """Self-attention and MLP, each after a layer norm and added to its input (Radford et al. 2019)."""

    def __init__(self, width: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads=heads, head_dim=head_dim, bias=True)
        self.norm3 = nn.LayerNorm(width)
        self.ff = GELUFeedForward(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the output (B, L, W) for x (B, L, W); the mask (B or 1, L, L) is True where x attends."""
        x = x + self.attn1(self.norm1(x), mask=mask)  # (B, L, W)
        return x + self.ff(self.norm3(x))


class PlainStack(nn.Module):
    """Causal transformer of `PlainBlock`s with a final norm.

    Args:
        width: Width W of a token.
        layers: Number of blocks.
        heads: Number of attention heads.
        head_dim: Channels of a head.
    """

    def __init__(self, width: int, *, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(width, heads=heads, head_dim=head_dim) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the output (B, L, W).

        Args:
            x: Tokens, shape (B, L, W).
            mask: True for tokens that are attended to, bool, shape (B, L). None for all.
        """
        length = x.shape[1]
        attended = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()  # (L, L)
        attended = attended[None] if mask is None else attended & mask[:, None]  # (B or 1, L, L)
        # every token attends to itself, because softmax of an empty row is undefined
        attended = attended | torch.eye(length, dtype=torch.bool, device=x.device)  # (B or 1, L, L)
        for block in self.blocks:
            x = block(x, attended)  # (B, L, W)
        return self.norm_out(x)


class Gain(nn.Module):
    """Layer norm with a gain and no bias.

    Args:
        width: Width W of a token.
        stable: Whether to divide by the largest entry first. Default: False.
    """

    def __init__(self, width: int, *, stable: bool = False) -> None:
        super().__init__()
        self.stable = stable
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x (..., W)."""
        if self.stable:
            x = x / x.amax(dim=-1, keepdim=True).detach()  # (..., W)
        gain = self.g.to(torch.promote_types(self.g.dtype, x.dtype))  # (W,)
        return F.layer_norm(x, x.shape[-1:], gain, eps=1e-5 if x.dtype == torch.float32 else 1e-3)


class RelativeBias(nn.Module):
    """Attention bias by distance (T5, Raffel et al. 2020).

    Of the 32 buckets, 16 are the distances 0 to 15, the others are logarithmic up to a distance of 128.
    """

    BUCKETS, FARTHEST = 32, 128

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(self.BUCKETS, heads)

    def forward(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Return the bias (H, queries, keys).

        Key 0 is the learned one before all tokens, so distances are one less than between tokens.
        """
        distance = (torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)).clamp(
            min=0
        )  # (queries, keys)
        exact = self.BUCKETS // 2
        far = (
            torch.log(distance.float().clamp(min=1) / exact)
            / math.log(self.FARTHEST / exact)
            * (self.BUCKETS - exact)
        )  # (queries, keys)
        # (queries, keys)
        bucket = torch.where(distance < exact, distance, (exact + far.long()).clamp(max=self.BUCKETS - 1))
        return rearrange(self.relative_attention_bias(bucket), "q k h -> h q k")


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Return x with rotary positions on its first channels (Su et al. 2021).

    Args:
        x: Queries or keys, shape (..., L, d).
        freqs: Angles per position, shape (K,); channel pairs 2i and 2i + 1 rotate by position · freqs[i].

    Returns:
        Shape (..., L, d).
    """
    angles = torch.arange(x.shape[-2], device=x.device, dtype=freqs.dtype)[:, None] * freqs  # (L, K)
    rotated, rest = x[..., : 2 * len(freqs)], x[..., 2 * len(freqs) :]  # (..., L, 2K), (..., L, d − 2K)
    a, b = rearrange(rotated, "... (k two) -> two ... k", two=2)  # (..., L, K) each
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # (L, K) each
    return torch.cat(
        [rearrange([a * cos - b * sin, b * cos + a * sin], "two ... k -> ... (k two)"), rest], dim=-1
    )


class CosineAttention(nn.Module):
    """Causal attention with one head of keys and values (Shazeer 2019), and a learned key and value.

    The learned key and value precede all tokens.

    Args:
        width: Width W of a token.
        heads: Number H of query heads.
        head_dim: Channels d of a head.
        cosine_sim: Whether queries and keys are normalized to length 4, so that their products are 16 times
            a cosine.
        freqs: Rotary frequencies, shape (K,), shared by all layers; published files hold a copy per layer.
    """

    def __init__(
        self, width: int, *, heads: int, head_dim: int, cosine_sim: bool, freqs: nn.Parameter
    ) -> None:
        super().__init__()
        self.heads, self.cosine_sim = heads, cosine_sim
        self.norm = Gain(width)
        self.null_kv = nn.Parameter(torch.randn(2, head_dim))
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * head_dim, bias=False)
        self.freqs = freqs
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, width, bias=False), Gain(width)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return the attention (B, L, W) of x (B, L, W); the bias (H, L, 1 + L) is added to the scores."""
        x = self.norm(x)  # (B, L, W)
        q = rearrange(self.to_q(x), "b l (h d) -> b h l d", h=self.heads)  # (B, H, L, d)
        k, v = self.to_kv(x).chunk(2, dim=-1)  # (B, L, d) each
        if not self.cosine_sim:
            q = q * q.shape[-1] ** -0.5  # (B, H, L, d); the published network scales twice, here and below
        q, k = rotate(q, self.freqs), rotate(k, self.freqs)  # (B, H, L, d), (B, L, d)
        null_k, null_v = self.null_kv.to(x.dtype)[:, None, None].expand(-1, len(x), 1, -1)  # (B, 1, d) each
        # (B, 1, 1 + L, d) each
        k, v = (torch.cat([null_k, k], dim=1)[:, None], torch.cat([null_v, v], dim=1)[:, None])
        if self.cosine_sim:
            q, k = 4 * F.normalize(q, dim=-1), 4 * F.normalize(k, dim=-1)  # (B, H, L, d), (B, 1, 1 + L, d)
        # (B, H, L, 1 + L)
        scores = q @ k.transpose(-2, -1) * (1.0 if self.cosine_sim else q.shape[-1] ** -0.5) + bias
        out = scores.float().softmax(dim=-1).to(v.dtype) @ v  # (B, H, L, d)
        return self.to_out[1](self.to_out[0](rearrange(out, "b h l d -> b l (h d)")))


class SwiGLU(nn.Module):
    """value · silu(gate), where value and gate are the halves of the input (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated values (..., W) of x (..., 2·W)."""
        value, gate = x.chunk(2, dim=-1)  # (..., W) each
        return value * F.silu(gate)


class CosineStack(nn.Module):
    """The causal transformer of DALLE2-pytorch.

    Args:
        width: Width W of a token.
        layers: Number of layers.
        heads: Number of query heads.
        head_dim: Channels of a head.
        cosine_sim: See `CosineAttention`.
        norm_mlp: Whether the MLP has a norm inside.
    """

    def __init__(
        self, width: int, *, layers: int, heads: int, head_dim: int, cosine_sim: bool, norm_mlp: bool
    ) -> None:
        super().__init__()
        self.rel_pos_bias = RelativeBias(heads)
        self.layers: ModuleListOf[nn.ModuleList] = ModuleListOf()
        rotary = min(32, head_dim)  # channels of a head that are rotated
        freqs = nn.Parameter(
            10_000.0 ** -(torch.arange(0, rotary, 2).float() / rotary), requires_grad=False
        )  # (rotary / 2,)
        for _ in range(layers):
            attention = CosineAttention(
                width, heads=heads, head_dim=head_dim, cosine_sim=cosine_sim, freqs=freqs
            )
            inner = [
                Gain(width),
                nn.Linear(width, 8 * width, bias=False),
                SwiGLU(),
                Gain(4 * width) if norm_mlp else nn.Identity(),
                nn.Identity(),
            ]
            self.layers.append(
                nn.ModuleList([attention, nn.Sequential(*inner, nn.Linear(4 * width, width, bias=False))])
            )
        self.norm = Gain(width, stable=True)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the output (B, L, W) for x (B, L, W); the mask is ignored, padding is replaced before."""
        length = x.shape[1]
        bias = self.rel_pos_bias(length, length + 1, x.device)  # (H, L, 1 + L)
        # (L, 1 + L); key 0 is visible to all tokens
        hidden = torch.ones(length, length + 1, dtype=torch.bool, device=x.device).triu(2)
        bias = bias.masked_fill(hidden, float("-inf"))  # (H, L, 1 + L)
        for layer in self.layers:
            attention, mlp = layer
            x = x + attention(x, bias)  # (B, L, W)
            x = x + mlp(x)  # (B, L, W)
        return self.norm(x)
