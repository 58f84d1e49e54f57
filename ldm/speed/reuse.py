"""Reuse of a UNet's deep features across sampling steps (DeepCache, Ma et al. 2023).

It changes the result.
"""

from __future__ import annotations

import weakref
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.unet import UNet, UNetLevel
from ldm.speed.networks import unets
from ldm.speed.substitute import Substitute

MOST_EVALUATIONS = 16  # evaluations of a step whose features `Reuse` keeps


class CondKey(NamedTuple):
    """What identifies the inputs of an evaluation.

    Attributes:
        shape: Shape of x_t.
        fields: Name, reference and version counter of each field of the condition.
    """

    shape: torch.Size
    fields: tuple[tuple[str, weakref.ref[Tensor], int], ...]

    @classmethod
    def of(cls, x_t: Tensor, cond: Cond) -> CondKey:
        """Return the key of x_t and a condition."""
        return cls(
            x_t.shape, tuple((name, weakref.ref(value), _version(value)) for name, value in cond.items())
        )

    def matches(self, x_t: Tensor, cond: Cond) -> bool:
        """Return whether x_t has the same shape, and the condition the same tensors, not written to since."""
        given = cond.items()
        return (
            self.shape == x_t.shape
            and [name for name, _ in given] == [name for name, _, _ in self.fields]
            and all(
                ref() is value and version == _version(value)
                for (_, value), (_, ref, version) in zip(given, self.fields, strict=True)
            )
        )


class Reuse(Substitute[UNet]):
    """Forward of a UNet that reuses deep features (DeepCache, section 3.2).

    In every `interval`-th step the whole network is evaluated. The other steps compute only the first
    convolution, `branch` blocks of the way down and the last `branch` + 1 blocks of the way up.

    A step is identified by its t: evaluations at the same t belong to one step (the two branches of
    guidance, the stages of a solver), and each has features of its own. Features are reused only while t
    decreases and the shapes and the tensors of the condition are the same. Another prompt, another run and a
    restart with new noise therefore begin with a full evaluation. With gradients nothing is reused.

    Args:
        net: The UNet.
        interval: Number of steps per full evaluation.
        branch: Number of blocks that are always computed on the way down, at least 0.

    Attributes:
        t: Timesteps of the current step; None before the first.
        steps: Steps since the last full evaluation.
        place: Index of the next evaluation within the step.
        kept: Features, and the key of their inputs, by the index of the evaluation.
    """

    def __init__(self, net: UNet, interval: int, branch: int) -> None:
        super().__init__(net)
        self.interval, self.branch = interval, branch
        self.forget()

    def forget(self) -> None:
        """Discard all features, so that the next evaluation is a full one."""
        self.t: Tensor | None = None
        self.steps = 0
        self.place = 0
        self.kept: dict[int, tuple[Tensor, CondKey]] = {}

    def __getstate__(self) -> dict[str, Any]:
        self.forget()  # a copy has other tensors, which the references in the keys do not follow
        return self.__dict__.copy()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if torch.is_grad_enabled() or self.module.training:
            return self.original_forward(x_t, t, cond)
        self._advance(t)
        features, key = self.kept.get(self.place, (None, None))
        if (
            self.steps
            and features is not None
            and key is not None
            and features.shape[0] == len(x_t)
            and key.matches(x_t, cond)
        ):
            out = self._shallow_evaluation(x_t, t, cond, features)
        else:
            out = self._full_evaluation(x_t, t, cond)
        self.place += 1
        return out

    def _advance(self, t: Tensor) -> None:
        """Update the step and the index of the evaluation for timesteps t (B,)."""
        if self.t is not None and self.t.shape == t.shape and torch.equal(self.t, t):
            return
        fell = self.t is not None and self.t.shape == t.shape and bool((t < self.t).all())
        self.steps = (self.steps + 1) % self.interval if fell else 0
        if self.steps == 0:
            self.kept.clear()
        self.t, self.place = t.clone(), 0

    def _full_evaluation(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the output of the whole network, and keep the input of the first of the last blocks."""
        level, i = up_path(self.module)[-self.branch - 1]
        if self.place >= MOST_EVALUATIONS:
            return self.original_forward(x_t, t, cond)

        def keep(block: nn.Module, args: tuple[Tensor, ...]) -> None:
            skip = skip_widths(self.module)[self.branch]
            # without the channels of the skip connection, which are last
            self.kept[self.place] = args[0][:, :-skip].clone(), CondKey.of(x_t, cond)

        handle = level.resnets[i].register_forward_pre_hook(keep)
        try:
            return self.original_forward(x_t, t, cond)
        finally:
            handle.remove()

    def _shallow_evaluation(self, x_t: Tensor, t: Tensor, cond: Cond, features: Tensor) -> Tensor:
        """Return the output of `UNet.forward` with kept features in place of its deep part."""
        net, context, mask = self.module, cond.context, cond.context_mask
        x = x_t if cond.concat is None else torch.cat([x_t, cond.concat], dim=1)  # (B, C_in, h, w)
        net.check(x, cond)
        emb = net.embed(t, cond, x_t.dtype)  # (B, D)
        x = net.conv_in(x)  # (B, channels[0], h, w)
        skips = [x]
        for level, i in islice(down_path(net), self.branch):
            # (B, channels[level], h', w')
            x = level.downsample(x, emb) if i is None else level.block(i, x, emb, context, mask)
            skips.append(x)
        x = features
        for level, i in up_path(net)[-self.branch - 1 :]:
            # (B, channels[level], h', w')
            x = level.block(i, torch.cat([x, skips.pop()], dim=1), emb, context, mask)
            if i == net.config.blocks and level.upsamplers is not None:
                x = level.upsample(x, emb, skips[-1].shape[-2:])  # (B, channels[level], 2h', 2w')
        return net.conv_out(F.silu(net.conv_norm_out(x)))


def _version(x: Tensor) -> int:
    """Return how often a tensor was written to; 0 for inference tensors, which do not count."""
    return 0 if x.is_inference() else x._version


def down_path(net: UNet) -> list[tuple[UNetLevel, int | None]]:
    """Return the level and the block of each step on the way down; the block of a change of size is None."""
    return [
        (level, i)
        for level in net.down_blocks
        for i in (*range(net.config.blocks), *([None] if level.downsamplers is not None else []))
    ]


def up_path(net: UNet) -> list[tuple[UNetLevel, int]]:
    """Return the level and the index of each block on the way up."""
    return [(level, i) for level in net.up_blocks for i in range(net.config.blocks + 1)]


def skip_widths(net: UNet) -> list[int]:
    """Return the channels of each skip connection, in the order of the way down."""
    channels = net.config.channels
    return [channels[0]] + [channels[list(net.down_blocks).index(level)] for level, _ in down_path(net)]


def reuse_features(pipe: nn.Module, interval: int, branch: int) -> tuple[str, ...]:
    """Let the UNets of a pipeline reuse features; see `Reuse`.

    Args:
        pipe: The pipeline, or a UNet.
        interval: Number of steps per full evaluation; 1 reuses nothing.
        branch: Number of blocks that are always computed on the way down.

    Returns:
        A description of what was done; empty for an interval of 1.

    Raises:
        ValueError: If a number is out of range, or there is no UNet.
    """
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"reuse: expected an integer of 1 (no reuse) or more, got {interval!r}")
    for net in unets(pipe) if interval > 1 else []:
        most = len(up_path(net)) - 1
        if isinstance(branch, bool) or not isinstance(branch, int) or not 0 <= branch <= most:
            raise ValueError(
                f"branch: expected an integer from 0 to {most}, one less than the blocks of the UNet's way"
                f" up, got {branch!r}"
            )
        Reuse(net, interval, branch)
    description = (
        f"reuse: the deep part of the UNet computed in one of {interval} steps, the last {branch + 1} blocks"
        " in all (approximate)"
    )
    return (description,) if interval > 1 else ()
