"""Attention: the product itself, and the transformer blocks of the diffusion networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.layers.norm import SpatialNorm, group_norm_32

# probabilities (B, H, L, M) float32 -> others in their place, or None to leave them
AttentionControl = Callable[[Tensor], Tensor | None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v (Vaswani et al. 2017, eq. 1).

    q (B, H, L, d), k and v (B, H, M, d); mask: bool, broadcastable to (B, H, L, M), True where a query may
    look. With gradients on the CPU it is written as two matrix products: the fused kernel's backward is
    several times slower there in bfloat16.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(d)), (B, H, L, M), computed in float32 whatever q and k are in, under autocast too;
    arguments as in `attend`."""
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


def attend_controlled(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, controls: tuple[AttentionControl, ...]
) -> Tensor:
    """`attend` with the probabilities shown to ``controls``, in order, each of which may replace them for
    those behind it and for the product.

    Where none does, the product is that of `attend`: looking changes nothing, to the bit. Replaced ones are
    multiplied out explicitly, which differs from the fused kernel by rounding (2e-7 of a value in float32).
    """
    shown = probabilities(q, k, mask)
    p = shown
    for control in controls:
        changed = control(p)
        if changed is not None:
            if changed.shape != shown.shape:
                raise ValueError(
                    f"attention probabilities: expected {tuple(shown.shape)} (B, H, L, M), the control gave"
                    f" {tuple(changed.shape)}"
                )
            p = changed
    return attend(q, k, v, mask) if p is shown else p.to(v.dtype) @ v


@contextmanager
def attention_control(
    network: nn.Module,
    fn: Callable[[str, Tensor], Tensor | None],
    *,
    of: Literal["cross", "self", "all"] = "cross",
) -> Iterator[list[str]]:
    """Within it, ``fn(name, probabilities)`` is called by every attention of a network, and may return others
    to be used in their place.

    ``name`` is the attention's own in the network ("mid_block.attentions.0.transformer_blocks.0.attn2");
    probabilities are (B, H, L, M) float32, L positions over M tokens or positions, each row summing to 1.
    Under guidance the batch is that of `ldm.diffusion.guidance.under`: the pictures with their prompts first,
    then the same pictures without. ``of``: attention to a context, to the positions themselves, or all.
    Yields the names. Controls may be nested: an inner one sees what the outer one made. ValueError where the
    network has none of the kind.
    """
    if of not in ("cross", "self", "all"):
        raise ValueError(f"of: expected cross, self or all, got {of!r}")
    found = {
        name: part
        for name, part in network.named_modules()
        if isinstance(part, Attention) and (of == "all" or part.cross == (of == "cross"))
    }
    if not found:
        raise ValueError(
            f"the network {type(network).__name__} has no {'' if of == 'all' else of + '-'}attention"
        )
    own = {name: partial(fn, name) for name in found}
    for name, part in found.items():
        part.controls = (*part.controls, own[name])
    try:
        yield list(found)
    finally:
        for name, part in found.items():
            part.controls = tuple(control for control in part.controls if control is not own[name])


class Attention(nn.Module):
    """Multi-head attention of (B, L, D) queries over a context (B, M, D_context), or over themselves without
    one.

    The mask is bool, True where a query may look: (B, M) for all of them alike, or (B, L, M). ``controls``:
    who sees the probabilities and may replace them (`attention_control`); with none, the default, nothing but
    the product is computed.
    """

    controls: tuple[AttentionControl, ...] = ()

    def __init__(
        self, width: int, *, heads: int, head_dim: int, context_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.cross = context_dim is not None
        inner = heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=bias)
        self.to_k = nn.Linear(context_dim or width, inner, bias=bias)
        self.to_v = nn.Linear(context_dim or width, inner, bias=bias)
        # a list of one: the published names say to_out.0
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            rearrange(t, "b l (h d) -> b h l d", h=self.heads)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if mask is not None:
            mask = (
                rearrange(mask, "b m -> b 1 1 m") if mask.ndim == 2 else rearrange(mask, "b l m -> b 1 l m")
            )
        return self.to_out[0](rearrange(self.product(q, k, v, mask), "b h l d -> b l (h d)"))

    def product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`attend`, before the eyes of the controls where there are any."""
        return attend_controlled(q, k, v, mask, self.controls) if self.controls else attend(q, k, v, mask)


class AttentionBlock(Attention):
    """Attention of a feature map's positions (B, C, h, w) to each other, with its own norm and residual sum
    (Dhariwal & Nichol 2021).

    With a ``context_dim`` the positions attend to a context (B, M, D) as well, in the same softmax (Nichol et
    al. 2022, section 3). ``spatial``: the channels of a latent z that modulates the norm.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        context_dim: int | None = None,
        eps: float = 1e-5,
        spatial: int | None = None,
    ) -> None:
        super().__init__(channels, heads=heads, head_dim=head_dim, bias=True)
        if spatial is None:
            self.group_norm = nn.GroupNorm(group_norm_32(channels), channels, eps=eps)
        else:
            self.spatial_norm = SpatialNorm(channels, spatial, eps=eps)
        self.cross = context_dim is not None
        if context_dim is not None:
            self.add_k_proj = nn.Linear(context_dim, heads * head_dim)
            self.add_v_proj = nn.Linear(context_dim, heads * head_dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, z: Tensor | None = None
    ) -> Tensor:
        h, w = x.shape[-2:]
        y = self.group_norm(x) if z is None else self.spatial_norm(x, z)
        y = rearrange(y, "b c h w -> b (h w) c")
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)  # (B, h·w, H·d)
        if context is None:
            mask = None
        else:
            # (B, M + h·w, H·d)
            k, v = (
                torch.cat([self.add_k_proj(context), k], dim=1),
                torch.cat([self.add_v_proj(context), v], dim=1),
            )
            mask = None if mask is None else rearrange(F.pad(mask, (0, h * w), value=True), "b m -> b 1 1 m")
        q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=self.heads) for part in (q, k, v))
        y = self.product(q, k, v, mask)
        y = self.to_out[0](rearrange(y, "b h l d -> b l (h d)"))
        return x + rearrange(y, "b (h w) c -> b c h w", h=h, w=w)


class GEGLU(nn.Module):
    """value · gelu(gate), with the exact gelu (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each before a residual sum (Rombach et al. 2022,
    appendix E.2.1)."""

    def __init__(
        self, width: int, *, heads: int, head_dim: int, context_dim: int, only_cross: bool = False
    ) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(
            width, heads=heads, head_dim=head_dim, context_dim=context_dim if only_cross else None
        )
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads=heads, head_dim=head_dim, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + (self.attn1(self.norm1(x), context, mask) if self.only_cross else self.attn1(self.norm1(x)))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (B, C, h, w), attending to a context (B, L,
    D)."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        depth: int,
        context_dim: int,
        linear: bool = False,
        only_cross: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.linear = linear
        self.norm = nn.GroupNorm(group_norm_32(channels), channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                inner, heads=heads, head_dim=head_dim, context_dim=context_dim, only_cross=only_cross
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(inner, channels) if linear else nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        h, w = x.shape[-2:]
        y = self.norm(x)
        y = (
            self.proj_in(rearrange(y, "b c h w -> b (h w) c"))
            if self.linear
            else rearrange(self.proj_in(y), "b c h w -> b (h w) c")
        )
        for block in self.transformer_blocks:
            y = block(y, context, mask)  # (B, h·w, C)
        if self.linear:
            return x + rearrange(self.proj_out(y), "b (h w) c -> b c h w", h=h, w=w)
        return x + self.proj_out(rearrange(y, "b (h w) c -> b c h w", h=h, w=w))
