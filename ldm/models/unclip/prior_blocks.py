"""The transformers of priors: a GPT's blocks, and DALLE2-pytorch's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.layers.attention import Attention


class GELU(nn.Module):
    """A linear layer and the exact gelu behind it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class GELUFeedForward(nn.Module):
    """To four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class PlainBlock(nn.Module):
    """Causal self-attention and MLP, each after a norm and before a residual sum (Radford et al. 2019)."""

    def __init__(self, width: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads=heads, head_dim=head_dim, bias=True)
        self.norm3 = nn.LayerNorm(width)
        self.ff = GELUFeedForward(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask=mask)
        return x + self.ff(self.norm3(x))


class PlainStack(nn.Module):
    """Blocks and a last norm; (B, L, D) with the mask (B, L) of tokens that count, None for all → (B, L,
    D)."""

    def __init__(self, width: int, *, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(width, heads=heads, head_dim=head_dim) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        length = x.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()  # (L, L)
        # (B, L, L); a token sees itself and those before it that count
        seen = seen[None] if mask is None else seen & mask[:, None]
        # no row is empty, which softmax could not bear
        seen = seen | torch.eye(length, dtype=torch.bool, device=x.device)
        for block in self.blocks:
            x = block(x, seen)
        return self.norm_out(x)


class Gain(nn.Module):
    """A LayerNorm with a gain alone. ``stable``: divided by its largest number first."""

    def __init__(self, width: int, *, stable: bool = False) -> None:
        super().__init__()
        self.stable = stable
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.stable:
            x = x / x.amax(dim=-1, keepdim=True).detach()
        return F.layer_norm(x, x.shape[-1:], self.g, eps=1e-5 if x.dtype == torch.float32 else 1e-3)


class RelativeBias(nn.Module):
    """T5's bias by distance (Raffel et al. 2020): 32 buckets, half of them exact, the others to a distance of
    128 in its logarithm."""

    BUCKETS, FARTHEST = 32, 128

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(self.BUCKETS, heads)

    def forward(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(H, queries, keys); key 0 is the one that stands before all tokens, so that distances are one less
        than between tokens."""
        distance = (torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)).clamp(
            min=0
        )
        exact = self.BUCKETS // 2
        far = (
            torch.log(distance.clamp(min=1) / exact)
            / math.log(self.FARTHEST / exact)
            * (self.BUCKETS - exact)
        )
        bucket = torch.where(distance < exact, distance, (exact + far.long()).clamp(max=self.BUCKETS - 1))
        return rearrange(self.relative_attention_bias(bucket), "q k h -> h q k")


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on the first channels of (..., L, d): pairs of neighbours turn by
    position · frequency."""
    angles = torch.arange(x.shape[-2], device=x.device, dtype=freqs.dtype)[:, None] * freqs  # (L, K)
    turned, rest = x[..., : 2 * len(freqs)], x[..., 2 * len(freqs) :]
    a, b = rearrange(turned, "... (k two) -> two ... k", two=2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat(
        [rearrange([a * cos - b * sin, b * cos + a * sin], "two ... k -> ... (k two)"), rest], dim=-1
    )


class CosineAttention(nn.Module):
    """Causal attention whose queries share one head of keys and values (Shazeer 2019), with a learned key and
    value before all tokens.

    ``cosine_sim``: queries and keys are brought to length 4 each, so that their products are cosines times
    16.
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
        self.freqs = freqs  # one for all layers, though files hold it once a layer
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, width, bias=False), Gain(width)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.norm(x)
        q = rearrange(self.to_q(x), "b l (h d) -> b h l d", h=self.heads)
        k, v = self.to_kv(x).chunk(2, dim=-1)  # (B, L, d)
        if not self.cosine_sim:
            q = q * q.shape[-1] ** -0.5  # once more than usual, as it was published
        q, k = rotate(q, self.freqs), rotate(k, self.freqs)
        null_k, null_v = self.null_kv.to(x.dtype)[:, None, None].expand(-1, len(x), 1, -1)
        # (B, 1, 1 + L, d)
        k, v = (torch.cat([null_k, k], dim=1)[:, None], torch.cat([null_v, v], dim=1)[:, None])
        if self.cosine_sim:
            q, k = 4 * F.normalize(q, dim=-1), 4 * F.normalize(k, dim=-1)
        # (B, H, L, 1 + L)
        scores = q @ k.transpose(-2, -1) * (1.0 if self.cosine_sim else q.shape[-1] ** -0.5) + bias
        out = scores.float().softmax(dim=-1).to(v.dtype) @ v
        return self.to_out[1](self.to_out[0](rearrange(out, "b h l d -> b l (h d)")))


class SwiGLU(nn.Module):
    """value · silu(gate) (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class CosineStack(nn.Module):
    """DALLE2-pytorch's causal transformer; (B, L, D) → (B, L, D). A mask is not looked at: padding is
    replaced before."""

    def __init__(
        self, width: int, *, layers: int, heads: int, head_dim: int, cosine_sim: bool, norm_mlp: bool
    ) -> None:
        super().__init__()
        self.rel_pos_bias = RelativeBias(heads)
        self.layers = nn.ModuleList()
        turning = min(32, head_dim)  # channels of a head that turn
        freqs = nn.Parameter(
            10_000.0 ** -(torch.arange(0, turning, 2).float() / turning), requires_grad=False
        )
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
        length = x.shape[1]
        bias = self.rel_pos_bias(length, length + 1, x.device)
        # key 0 is always seen
        hidden = torch.ones(length, length + 1, dtype=torch.bool, device=x.device).triu(2)
        bias = bias.masked_fill(hidden, float("-inf"))
        for attention, mlp in self.layers:
            x = x + attention(x, bias)
            x = x + mlp(x)
        return self.norm(x)
