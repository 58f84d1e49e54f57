"""The layers of DALL·E Mini's transformers: blocks of NormFormer with gated linear units.

In NormFormer (Shleifer et al. 2021) each sublayer has a norm before it, and attention another one behind it.
The names of the parameters are those of the published files. Of the norms, some have no scale there
(`UNIT_SCALES`); it is 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.layers.attention import attend

# The norms whose scale the flax files do not have, by the last piece of their name.
UNIT_SCALES = ("pre_self_attn_layer_norm", "pre_encoder_attn_layer_norm", "ln0", "ln1", "final_ln")


class TokenLinear(nn.Linear):
    """Linear layer without bias that is mostly applied to a few rows: reading its weights takes the time.

    Args:
        width: Input width D.
        out_width: Output width D_out.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__(width, out_width, bias=False)


class DalleGLU(nn.Module):
    """fc2(ln1(gelu(fc0(x')) · fc1(x'))), x' = ln0(x), with the exact gelu (Shazeer 2020).

    Args:
        width: Width D.
        inner: Width G of the gate.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(width)
        self.ln1 = nn.LayerNorm(inner)
        self.fc0 = TokenLinear(width, inner)
        self.fc1 = TokenLinear(width, inner)
        self.fc2 = TokenLinear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (..., D) for x (..., D)."""
        x = self.ln0(x)  # (..., D)
        return self.fc2(self.ln1(F.gelu(self.fc0(x)) * self.fc1(x)))


class TokenAttention(nn.Module):
    """Multi-head attention whose keys and values are given, so that they can be kept.

    Args:
        width: Width D of queries, keys and values.
        heads: Number of heads H, a divisor of D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = TokenLinear(width, width)
        self.v_proj = TokenLinear(width, width)
        self.q_proj = TokenLinear(width, width)
        self.out_proj = TokenLinear(width, width)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and the values, (B, H, M, d) each, of a context (B, M, D)."""
        return self._heads(self.k_proj(context)), self._heads(self.v_proj(context))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention of a sequence.

        Args:
            x: Sequence, shape (B, L, D).
            keys: Shape (B, H, M, d).
            values: Shape (B, H, M, d).
            mask: True where a query attends to a key, bool, broadcastable to (B, H, L, M). None attends to
                all.

        Returns:
            Shape (B, L, D).
        """
        y = attend(self._heads(self.q_proj(x)), keys, values, mask)  # (B, H, L, d)
        return self.out_proj(rearrange(y, "b h l d -> b l (h d)"))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (h d) -> b h l d", h=self.heads)


class LayerCache(NamedTuple):
    """What a layer of the decoder keeps between steps.

    Attributes:
        keys: Keys of the image tokens, shape (B, H, N, d), of which the first are filled.
        values: Their values, of the same shape.
        context_keys: Keys of the text, shape (B, H, M, d).
        context_values: Values of the text, of the same shape.
    """

    keys: Tensor
    values: Tensor
    context_keys: Tensor
    context_values: Tensor


class DalleEncoderLayer(nn.Module):
    """Self-attention and gated linear unit; see `DalleEncoderConfig` for the arguments."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.pre_self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = TokenAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.glu = DalleGLU(width, inner)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the output (B, M, D) for x (B, M, D) and the mask of its tokens, (B, 1, 1, M) bool."""
        y = self.pre_self_attn_layer_norm(x)  # (B, M, D)
        y = self.self_attn(y, *self.self_attn.keys_values(y), mask)
        x = x + self.self_attn_layer_norm(y)
        return x + self.glu(x)


class DalleDecoderLayer(nn.Module):
    """Causal self-attention, attention to the text, and gated linear unit; see `DalleDecoderConfig`."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.pre_self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = TokenAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.pre_encoder_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = TokenAttention(width, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.glu = DalleGLU(width, inner)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Return the output (B, L, D) of whole sequences, of which each token sees those before it.

        Args:
            x: Image tokens, shape (B, L, D).
            context: States of the text, shape (B, M, D).
            mask: True for tokens of the text, bool, shape (B, 1, 1, M).
        """
        y = self.pre_self_attn_layer_norm(x)  # (B, L, D)
        keys, values = self.self_attn.keys_values(y)  # (B, H, L, d) each
        x = x + self.self_attn_layer_norm(
            self.self_attn(y, keys, values, causal_mask(x.shape[1], 0, x.device))
        )
        return self._rest(x, *self.encoder_attn.keys_values(context), mask)

    def advance(self, x: Tensor, cache: LayerCache, at: int, mask: Tensor) -> Tensor:
        """Return the output (B, l, D) of the next tokens, whose keys and values are written to the cache.

        Args:
            x: The tokens from position `at` on, shape (B, l, D).
            cache: Keys and values of the tokens before them, and of the text.
            at: Number of tokens before them.
            mask: True for tokens of the text, bool, shape (B, 1, 1, M).
        """
        y, end = self.pre_self_attn_layer_norm(x), at + x.shape[1]  # (B, l, D)
        cache.keys[:, :, at:end], cache.values[:, :, at:end] = self.self_attn.keys_values(y)
        causal = None if x.shape[1] == 1 else causal_mask(x.shape[1], at, x.device)  # (l, end)
        y = self.self_attn(y, cache.keys[:, :, :end], cache.values[:, :, :end], causal)
        return self._rest(x + self.self_attn_layer_norm(y), cache.context_keys, cache.context_values, mask)

    def _rest(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Return the output of the layers behind self-attention; the arguments are as above."""
        y = self.encoder_attn(self.pre_encoder_attn_layer_norm(x), keys, values, mask)  # (B, l, D)
        x = x + self.encoder_attn_layer_norm(y)
        return x + self.glu(x)


def causal_mask(length: int, before: int, device: torch.device) -> Tensor:
    """Return the mask (length, before + length) of tokens that see themselves and all tokens before them."""
    return torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
