"""Attention: the product, control over its probabilities, and the attention layers of the networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.layers.modules import ModuleListOf
from ldm.models.layers.norm import SpatialNorm, group_norm_32

# probabilities (B, H, L, M) float32 -> replacements of the same shape, or None to keep them
AttentionControl = Callable[[Tensor], Tensor | None]
Joined: TypeAlias = "Mapping[Attention, tuple[AttentionJoin, ...]]"


@dataclass(frozen=True, kw_only=True)
class AttentionJoin:
    """What joins an attention.

    Args:
        product: Maps queries (B, H, L, d) to what is added to the product, of the same shape. None: nothing.
        inputs: By the names "to_q", "to_k" and "to_v", what maps the input of a projection, (B, L, D) or
            (B, M, D_c), to another one of the same shape. Default: none.
    """

    product: Callable[[Tensor], Tensor] | None = None
    inputs: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ / sqrt(d)) v (Vaswani et al. 2017, eq. 1).

    On the CPU, if q requires a gradient, the two matrix products are computed separately, because the
    backward pass of the fused kernel is several times slower in bfloat16.

    Args:
        q: Queries, shape (B, H, L, d).
        k: Keys, shape (B, H, M, d).
        v: Values, shape (B, H, M, d).
        mask: True where a query attends to a key, bool, broadcastable to (B, H, L, M). None attends to all.

    Returns:
        Shape (B, H, L, d).
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, L, M)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))  # (B, H, L, M)
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ / sqrt(d)), (B, H, L, M), in float32 also under autocast; arguments as `attend`."""
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)  # (B, H, L, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))  # (B, H, L, M)
    return scores.softmax(dim=-1)


def attend_controlled(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, controls: tuple[AttentionControl, ...]
) -> Tensor:
    """Return `attend` with probabilities that pass through `controls`.

    If no control replaces the probabilities, the result is bit-identical to `attend`. Replaced probabilities
    are multiplied explicitly, which differs from the fused kernel by rounding (2e-7, relative, in float32).

    Args:
        q: Queries, shape (B, H, L, d).
        k: Keys, shape (B, H, M, d).
        v: Values, shape (B, H, M, d).
        mask: True where a query attends to a key, broadcastable to (B, H, L, M), or None.
        controls: Called in order with the probabilities; a replacement is passed to the controls after it.

    Returns:
        Shape (B, H, L, d).

    Raises:
        ValueError: If a control returns another shape.
    """
    original = probabilities(q, k, mask)  # (B, H, L, M)
    p = original
    for control in controls:
        replacement = control(p)
        if replacement is not None:
            if replacement.shape != original.shape:
                raise ValueError(
                    f"attention probabilities: expected shape {tuple(original.shape)} (B, H, L, M), the"
                    f" control returned {tuple(replacement.shape)}"
                )
            p = replacement  # (B, H, L, M)
    return attend(q, k, v, mask) if p is original else p.to(v.dtype) @ v


# The controls of this thread (or task), by the identity of the attention. They are not on the modules, which
# threads share; a module only counts how many blocks control it, in any thread.
_CONTROLS: ContextVar[Mapping[int, tuple[AttentionControl, ...]]] = ContextVar("controls", default={})  # noqa: B039
# What joins this thread's attentions.
_JOINED: ContextVar[Joined] = ContextVar("joined", default={})  # noqa: B039
_COUNTING = Lock()


@contextmanager
def attention_control(
    network: nn.Module,
    fn: Callable[[str, Tensor], Tensor | None],
    *,
    of: Literal["cross", "self", "all"] = "cross",
) -> Iterator[list[str]]:
    """Call a function with the probabilities of every attention of a network, inside a `with` block.

    The calls of other threads are not controlled. Blocks may be nested: an inner function receives what the
    outer one returned. Under guidance the batch is that of `ldm.diffusion.guidance.under`: the samples with
    their prompts, then the same samples without.

    Args:
        network: The network whose attentions are controlled.
        fn: Called as `fn(name, probabilities)`. `name` is the module's name in the network, for instance
            "mid_block.attentions.0.transformer_blocks.0.attn2". The probabilities have shape (B, H, L, M),
            float32, for L positions over M tokens or positions; each row sums to 1. A returned tensor
            replaces them, None keeps them.
        of: Which attentions: "cross" (to a context), "self" (to the positions), or "all". Default: "cross".

    Yields:
        The names of the attentions.

    Raises:
        ValueError: If the network has no attention of this kind, or `of` is unknown.
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
    outer = _CONTROLS.get()
    added: dict[int, tuple[AttentionControl, ...]] = {
        id(part): (*outer.get(id(part), ()), partial(fn, name)) for name, part in found.items()
    }
    token = _CONTROLS.set({**outer, **added})
    _count_controls(found.values(), 1)
    try:
        yield list(found)
    finally:
        _count_controls(found.values(), -1)
        _CONTROLS.reset(token)


@contextmanager
def joined_attention(joins: Mapping[Attention, Sequence[AttentionJoin]]) -> Iterator[None]:
    """Let functions join attentions, at their inputs or their products, inside a `with` block.

    The calls of other threads are not changed.

    Args:
        joins: For each attention what joins it, in order.
    """
    outer = joined_now()
    own = {part: (*outer.get(part, ()), *found) for part, found in joins.items()}
    with only_joined({**outer, **own}):
        yield


def joined_now() -> Joined:
    """Return what joins attentions at this place of this thread."""
    return _JOINED.get()


@contextmanager
def only_joined(joins: Joined) -> Iterator[None]:
    """Let what `joined_now` returned elsewhere join, and nothing else, inside a `with` block."""
    token = _JOINED.set(joins)
    with _COUNTING:
        for part in joins:
            part.joined += 1
    try:
        yield
    finally:
        with _COUNTING:
            for part in joins:
                part.joined -= 1
        _JOINED.reset(token)


def _count_controls(parts: Iterable[Attention], change: int) -> None:
    with _COUNTING:
        for part in parts:
            part.controlled += change


class Attention(nn.Module):
    """Multi-head attention of a sequence to a context, or to itself.

    Args:
        width: Width D of the sequence.
        heads: Number of heads H.
        head_dim: Channels d of a head.
        context_dim: Width D_c of the context; None for self-attention. Default: None.
        bias: Whether the projections to queries, keys and values have a bias. Default: False.

    Attributes:
        controlled: Number of `attention_control` blocks that the attention is in, in any thread.
        joined: Number of `joined_attention` blocks that it is in, in any thread.
        linear: Class of the projections.
    """

    controlled: int = 0
    joined: int = 0
    linear: type[nn.Linear] = nn.Linear

    @property
    def controls(self) -> tuple[AttentionControl, ...]:
        """The functions that receive the probabilities in this thread and may replace them.

        Without any, the default, the probabilities are not computed. See `attention_control`.
        """
        return _CONTROLS.get().get(id(self), ()) if self.controlled else ()

    @property
    def joins(self) -> tuple[AttentionJoin, ...]:
        """What joins it in this thread; see `joined_attention`."""
        return joined_now().get(self, ()) if self.joined else ()

    def __init__(
        self, width: int, *, heads: int, head_dim: int, context_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.cross = context_dim is not None
        inner = heads * head_dim
        self.to_q = self.linear(width, inner, bias=bias)
        self.to_k = self.linear(context_dim or width, inner, bias=bias)
        self.to_v = self.linear(context_dim or width, inner, bias=bias)
        # a list of one element, because the published name is to_out.0
        self.to_out: ModuleListOf[nn.Linear] = ModuleListOf([self.linear(inner, width)])

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the attention of x to the context.

        Args:
            x: Sequence, shape (B, L, D).
            context: Shape (B, M, D_c); None attends to x itself.
            mask: True where a query attends to a token, bool, shape (B, M) for all queries or (B, L, M).
                None attends to all.

        Returns:
            Shape (B, L, D).
        """
        context = x if context is None else context  # (B, M, D_c)
        joins = self.joins
        inputs = {"to_q": x, "to_k": context, "to_v": context}
        for join in joins:
            inputs |= {name: change(inputs[name]) for name, change in join.inputs.items()}
        q, k, v = (
            rearrange(t, "b l (h d) -> b h l d", h=self.heads)
            for t in (self.to_q(inputs["to_q"]), self.to_k(inputs["to_k"]), self.to_v(inputs["to_v"]))
        )  # (B, H, L, d), (B, H, M, d), (B, H, M, d)
        if mask is not None:  # (B, 1, 1, M) or (B, 1, L, M)
            mask = (
                rearrange(mask, "b m -> b 1 1 m") if mask.ndim == 2 else rearrange(mask, "b l m -> b 1 l m")
            )
        y = self.product(q, k, v, mask)  # (B, H, L, d)
        for join in joins:
            y = y if join.product is None else y + join.product(q)  # (B, H, L, d)
        return self.to_out[0](rearrange(y, "b h l d -> b l (h d)"))

    def product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return `attend` of the arguments, through the controls if there are any."""
        controls = self.controls
        return attend_controlled(q, k, v, mask, controls) if controls else attend(q, k, v, mask)


class AttentionBlock(Attention):
    """Attention of the positions of a feature map to each other, with norm and residual sum.

    The block is that of Dhariwal & Nichol (2021). With a context the positions attend to it and to each other
    in one softmax (Nichol et al. 2022, section 3).

    Args:
        channels: Channels C of the map.
        heads: Number of heads H.
        head_dim: Channels d of a head.
        context_dim: Width D_c of the context; None for none. Default: None.
        eps: Constant added to the variance in the norm. Default: 1e-5.
        spatial: Channels C_z of a latent that modulates the norm (`SpatialNorm`). None for a group norm.
            Default: None.
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
        """Return the map plus its attention.

        Args:
            x: Feature map, shape (B, C, h, w).
            context: Shape (B, M, D_c), or None.
            mask: True for tokens of the context that are attended to, bool, shape (B, M). None attends to
                all.
            z: Latent that modulates the norm, shape (B, C_z, *, *); None for a group norm.

        Returns:
            Shape (B, C, h, w).
        """
        h, w = x.shape[-2:]
        y = self.group_norm(x) if z is None else self.spatial_norm(x, z)  # (B, C, h, w)
        y = rearrange(y, "b c h w -> b (h w) c")  # (B, h·w, C)
        q, k, v = self.to_q(y), self.to_k(y), self.to_v(y)  # (B, h·w, H·d) each
        if context is None:
            mask = None
        else:
            k = torch.cat([self.add_k_proj(context), k], dim=1)  # (B, M + h·w, H·d)
            v = torch.cat([self.add_v_proj(context), v], dim=1)  # (B, M + h·w, H·d)
            # (B, 1, 1, M + h·w)
            mask = None if mask is None else rearrange(F.pad(mask, (0, h * w), value=True), "b m -> b 1 1 m")
        q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=self.heads) for part in (q, k, v))
        y = self.product(q, k, v, mask)  # (B, H, h·w, d)
        y = self.to_out[0](rearrange(y, "b h l d -> b l (h d)"))  # (B, h·w, C)
        return x + rearrange(y, "b (h w) c -> b c h w", h=h, w=w)
