"""Gains that change the result: features of a UNet reused across steps, and tokens merged within
self-attention."""

from __future__ import annotations

import weakref
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.layers.attention import Attention
from ldm.models.layers.transformer import SpatialTransformer
from ldm.models.unet import UNet
from ldm.speed.substitute import Substitute

MOST_EVALUATIONS = 16  # evaluations of a step, each with its own features, that `Reuse` keeps


class Reuse(Substitute):
    """DeepCache (Ma et al. 2023, section 3.2): what the deep part of a UNet gives is computed in every
    ``interval``-th step and used again in the others, which compute the first input convolution, ``branch``
    blocks of the way down and the last ``branch`` + 1 blocks of the way up.

    Steps are told apart by their t: evaluations at one t are of one step (two branches of guidance, two
    stages of a solver), each with features of its own. Features are used again only while t falls and shapes
    and conditions, the very same tensors, stay; so another prompt, another run and a noised restart begin
    with a whole evaluation. With gradients nothing is reused.
    """

    def __init__(self, net: UNet, interval: int, branch: int) -> None:
        super().__init__(net)
        self.interval, self.branch = interval, branch
        self.forget()

    def forget(self) -> None:
        """Begin anew: the next evaluation is whole."""
        self.t: Tensor | None = None
        self.steps = 0  # since the last whole one
        self.place = 0  # of the evaluation among those of its step
        self.kept: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        self.forget()  # what conditions are the same ends with a copy
        return self.__dict__.copy()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if torch.is_grad_enabled() or self.module.training:
            return self.plain(x_t, t, cond)
        self._turn(t)
        features, seen = self.kept.get(self.place, (None, ()))
        if (
            self.steps
            and features is not None
            and features.shape[0] == len(x_t)
            and self._same(x_t, cond, seen)
        ):
            out = self._shallow(x_t, t, cond, features)
        else:
            out = self._whole(x_t, t, cond)
        self.place += 1
        return out

    def _turn(self, t: Tensor) -> None:
        """Which step, and which evaluation in it, this is."""
        if self.t is not None and self.t.shape == t.shape and torch.equal(self.t, t):
            return
        fell = self.t is not None and self.t.shape == t.shape and bool((t < self.t).all())
        self.steps = (self.steps + 1) % self.interval if fell else 0
        if self.steps == 0:
            self.kept.clear()
        self.t, self.place = t.clone(), 0

    @staticmethod
    def _same(x_t: Tensor, cond: Cond, seen: tuple[Any, ...]) -> bool:
        """Whether the shape and the conditions are those that features were computed with."""
        shape, *tensors = seen
        given = cond.items()
        return (
            shape == x_t.shape
            and [name for name, _ in given] == [name for name, _, _ in tensors]
            and all(
                ref() is value and version == _version(value)
                for (_, value), (_, ref, version) in zip(given, tensors, strict=True)
            )
        )

    def _whole(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network as it is; what enters the first of the last blocks is kept."""
        level, i = rises(self.module)[-self.branch - 1]
        if self.place >= MOST_EVALUATIONS:
            return self.plain(x_t, t, cond)

        def keep(block: nn.Module, args: tuple[Tensor, ...]) -> None:
            skip = skip_widths(self.module)[self.branch]
            seen = (x_t.shape, *((name, weakref.ref(value), _version(value)) for name, value in cond.items()))
            self.kept[self.place] = args[0][:, :-skip].clone(), seen  # without the skip connection behind it

        handle = level.resnets[i].register_forward_pre_hook(keep)
        try:
            return self.plain(x_t, t, cond)
        finally:
            handle.remove()

    def _shallow(self, x_t: Tensor, t: Tensor, cond: Cond, features: Tensor) -> Tensor:
        """`UNet.forward` without its deep part."""
        net, context, mask = self.module, cond.context, cond.context_mask
        x = x_t if cond.concat is None else torch.cat([x_t, cond.concat], dim=1)
        net.check(x, cond)
        emb = net.embed(t, cond, x_t.dtype)
        x = net.conv_in(x)
        skips = [x]
        for level, i in islice(falls(net), self.branch):
            if i is not None:
                x = level.block(i, x, emb, context, mask)
            else:
                x = level.downsamplers[0](x) if net.config.resample is None else level.downsamplers[0](x, emb)
            skips.append(x)
        x = features
        for level, i in rises(net)[-self.branch - 1 :]:
            x = level.block(i, torch.cat([x, skips.pop()], dim=1), emb, context, mask)
            if i == net.config.blocks and level.upsamplers is not None:
                x = level.upsamplers[0](x, skips[-1].shape[-2:] if net.config.resample is None else emb)
        return net.conv_out(F.silu(net.conv_norm_out(x)))


def _version(x: Tensor) -> int:
    """How often a tensor was written to."""
    return 0 if x.is_inference() else x._version


def falls(net: Any) -> list[tuple[Any, int | None]]:
    """(level, block) of each step on the way down, None for its change of size."""
    return [
        (level, i)
        for level in net.down_blocks
        for i in (*range(net.config.blocks), *([None] if level.downsamplers is not None else []))
    ]


def rises(net: Any) -> list[tuple[Any, int]]:
    """(level, block) of each block on the way up."""
    return [(level, i) for level in net.up_blocks for i in range(net.config.blocks + 1)]


def skip_widths(net: Any) -> list[int]:
    """The channels of each skip connection, in the order of the way down."""
    channels = net.config.channels
    return [channels[0]] + [channels[list(net.down_blocks).index(level)] for level, _ in falls(net)]


class Merge(Substitute):
    """Self-attention over fewer tokens (Bolya & Hoffman 2023): a part ``ratio`` of the positions, those most
    alike to one of the positions in even rows and columns, is merged with it, as the mean, before the
    attention, and gets its result behind it.

    The paper draws one position of each 2×2 at random; here it is the first, so that a picture stays a
    function of its seed. Where someone looks at the probabilities
    (`ldm.models.layers.attention.attention_control`), or a gradient is wanted, nothing is merged.
    """

    def __init__(self, attention: Attention, ratio: float) -> None:
        super().__init__(attention)
        self.ratio = ratio
        self.size = (0, 0)  # (h, w) of the map whose positions are attended to: `Sized` tells

    def __call__(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if (
            context is not None
            or self.module.controls
            or torch.is_grad_enabled()
            or self.size[0] * self.size[1] != x.shape[1]
        ):
            return self.plain(x, context, mask)
        at, tokens = assign(x, self.size, self.ratio)
        return take(self.plain(means(x, at, tokens)), at)


class Sized(Substitute):
    """A transformer of a feature map, which tells its self-attentions the map's size."""

    def __call__(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.module.transformer_blocks:
            block.attn1.forward.size = tuple(x.shape[-2:])
        return self.plain(x, context, mask)


def assign(x: Tensor, size: tuple[int, int], ratio: float) -> tuple[Tensor, int]:
    """The token that each position of x (B, h·w, D) becomes, (B, h·w), and the number of tokens: h·w less a
    part ``ratio`` of it (rounded down, and at most all positions that do not lie in even rows and columns).
    """
    fixed, free = (index.to(x.device) for index in even_positions(*size))
    merged = min(int(ratio * x.shape[1]), len(free))
    unit = F.normalize(x, dim=-1)
    # (B, free): likeness to the most alike, and which it is
    best, token = (unit[:, free] @ unit[:, fixed].transpose(1, 2)).max(dim=-1)
    alone = best.argsort(dim=-1, descending=True)[:, merged:]  # (B, free − merged)
    token.scatter_(1, alone, (len(fixed) + torch.arange(alone.shape[1], device=x.device)).expand_as(alone))
    at = token.new_empty(x.shape[:2])
    at[:, fixed], at[:, free] = torch.arange(len(fixed), device=x.device), token
    return at, x.shape[1] - merged


@lru_cache(maxsize=16)
def even_positions(h: int, w: int) -> tuple[Tensor, Tensor]:
    """The positions of an h×w map in even rows and columns, and the others."""
    even = torch.zeros(h, w, dtype=torch.bool)
    even[::2, ::2] = True
    return even.flatten().nonzero()[:, 0], (~even).flatten().nonzero()[:, 0]


def rows(at: Tensor, tokens: int) -> Tensor:
    """Tokens (B, L) of positions as rows of all samples' tokens laid end to end, (B·L,)."""
    return (at + tokens * torch.arange(len(at), device=at.device)[:, None]).flatten()


def means(x: Tensor, at: Tensor, tokens: int) -> Tensor:
    """The mean of the positions of each token, (B, tokens, D)."""
    index = rows(at, tokens)  # by rows it is ten times as fast on a CPU as scatter_reduce
    total = x.new_zeros(len(x) * tokens, x.shape[2], dtype=torch.float32).index_add_(
        0, index, x.flatten(0, 1).float()
    )
    mean = total / torch.bincount(index, minlength=len(total))[:, None]
    return mean.to(x.dtype).unflatten(0, (len(x), tokens))


def take(y: Tensor, at: Tensor) -> Tensor:
    """The token (B, tokens, D) of each position, (B, L, D)."""
    return y.flatten(0, 1)[rows(at, y.shape[1])].unflatten(0, at.shape)


def unets(pipe: nn.Module) -> list[UNet]:
    """The UNets of a pipeline, or the network itself; ValueError where there is none."""
    found = [part for part in pipe.modules() if isinstance(part, UNet)]
    if not found:
        raise ValueError(f"reuse and merge act on a UNet, and the {type(pipe).__name__} has none")
    return found


def reuse_features(pipe: nn.Module, interval: int, branch: int) -> tuple[str, ...]:
    """Have the UNets of a pipeline reuse features; says what was done. ValueError for an interval or a branch
    that is not there."""
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(
            f"reuse: expected a whole number of steps, 1 or more (1: none are reused), got {interval!r}"
        )
    for net in unets(pipe) if interval > 1 else []:
        most = len(rises(net)) - 1
        if isinstance(branch, bool) or not isinstance(branch, int) or not 0 <= branch <= most:
            raise ValueError(
                f"branch: expected a whole number from 0 to {most}, the blocks of this UNet's way up but one,"
                f" got {branch!r}"
            )
        Reuse(net, interval, branch)
    done = (
        f"reuse: the deep part of the UNet computed in one step of {interval}, the last {branch + 1} blocks"
        " in all (approximate)"
    )
    return (done,) if interval > 1 else ()


def merge_tokens(pipe: nn.Module, ratio: float) -> tuple[str, ...]:
    """Have the self-attentions of the UNets' largest attending level merge tokens; says what was done.
    ValueError for a ratio outside [0, 0.75]."""
    if not 0 <= ratio <= 0.75:
        raise ValueError(
            f"merge: expected a part of the positions from 0 (none) to 0.75 (all that can be), got {ratio!r}"
        )
    for net in unets(pipe) if ratio else []:
        level = next((i for i, depth in enumerate(net.config.depth) if depth), None)
        for blocks in (
            () if level is None else (net.down_blocks[level], net.up_blocks[len(net.up_blocks) - 1 - level])
        ):
            for transformer in blocks.attentions:
                if (
                    isinstance(transformer, SpatialTransformer)
                    and not transformer.transformer_blocks[0].only_cross
                ):
                    for block in transformer.transformer_blocks:
                        Merge(block.attn1, ratio)
                    Sized(transformer)
    done = f"merge: {ratio:g} of the positions merged in self-attention where it is largest (approximate)"
    return (done,) if ratio else ()
