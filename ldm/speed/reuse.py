"""Reuse of a denoiser's deep features across sampling steps: DeepCache (Ma et al. 2023), Δ-DiT (Chen et al.
2024).

It changes the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.dit import DiT
from ldm.models.layers.modules import M
from ldm.models.unet import UNet, with_residuals
from ldm.models.unet_encoder import UNetLevel
from ldm.speed.networks import reusing_networks
from ldm.speed.packed import Packed
from ldm.speed.substitute import Substitute
from ldm.support.derived import kept_for_call, version

FROM_CONTROLS = ("features.", "residuals.")  # fields of `Cond` that are new in every step
MOST_EVALUATIONS = 16  # evaluations of a step whose features `Reuse` keeps


class CondKey(NamedTuple):
    """What identifies the inputs of an evaluation.

    What controls add is new in every step, as x_t is, and does not count.

    Attributes:
        shape: Shape of x_t.
        fields: Name, tensor and version counter of each other field of the condition.
    """

    shape: torch.Size
    fields: tuple[tuple[str, Tensor, int], ...]

    @classmethod
    def of(cls, x_t: Tensor, cond: Cond) -> CondKey:
        """Return the key of x_t and a condition."""
        return cls(x_t.shape, tuple((name, value, version(value)) for name, value in lasting(cond)))

    def matches(self, x_t: Tensor, cond: Cond) -> bool:
        """Return whether x_t has the same shape, and the condition the same tensors, not written to since.

        A tensor that is computed again in every step, as a decoder of image embeddings does, is the same if
        its values are.
        """
        given = lasting(cond)
        return (
            self.shape == x_t.shape
            and [name for name, _ in given] == [name for name, _, _ in self.fields]
            and all(
                written == version(kept) and (kept is value or torch.equal(kept, value))
                for (_, value), (_, kept, written) in zip(given, self.fields, strict=True)
            )
        )


def lasting(cond: Cond) -> list[tuple[str, Tensor]]:
    """Return the entries of a condition that are the same in every step."""
    return [(name, value) for name, value in cond.items() if not name.startswith(FROM_CONTROLS)]


@dataclass
class Progress:
    """How far a sampling run has come, and the features that it keeps.

    Attributes:
        t: Timesteps of the current step; None before the first.
        steps: Steps since the last full evaluation.
        place: Index of the next evaluation within the step.
        kept: Features, and the key of their inputs, by the index of the evaluation.
    """

    t: Tensor | None = None
    steps: int = 0
    place: int = 0
    kept: dict[int, tuple[Tensor, CondKey]] = field(default_factory=dict)

    def advance(self, t: Tensor, interval: int) -> None:
        """Update the step and the index of the evaluation for timesteps t (B,)."""
        if self.t is not None and self.t.shape == t.shape and torch.equal(self.t, t):
            return
        fell = self.t is not None and self.t.shape == t.shape and bool((t < self.t).all())
        self.steps = (self.steps + 1) % interval if fell else 0
        if self.steps == 0:
            self.kept.clear()
        self.t, self.place = t.clone(), 0

    def features(self, x_t: Tensor, cond: Cond) -> Tensor | None:
        """Return the features that may be reused for x_t and a condition; None: the evaluation is full."""
        features, key = self.kept.get(self.place, (None, None))
        if (
            self.steps
            and features is not None
            and key is not None
            and features.shape[0] == len(x_t)
            and key.matches(x_t, cond)
        ):
            return features
        return None


class Reuse(Substitute[M]):
    """Forward of a network that reuses what its deep part computes.

    In every `interval`-th step the whole network is evaluated. The other steps compute only its shallow part.

    A step is identified by its t: evaluations at the same t belong to one step (the two branches of
    guidance, the stages of a solver), and each has features of its own. Features are reused only while t
    decreases and the shapes and the tensors of the condition are the same. Another prompt, another run and a
    restart with new noise therefore begin with a full evaluation. With gradients nothing is reused.

    Each call of a pipeline has its own features, and outside of such calls each thread
    (`ldm.support.calls`).

    Args:
        net: The network.
        interval: Number of steps per full evaluation.
        branch: Number of blocks at the network's beginning that are always computed, at least 0.
    """

    def __init__(self, net: M, interval: int, branch: int) -> None:
        super().__init__(net)
        self.interval, self.branch = interval, branch

    @property
    def first_layer(self) -> nn.Module:
        """The network's first layer, which states whether its weights are read from a file."""
        raise NotImplementedError

    @property
    def progress(self) -> Progress:
        """The progress of this call's run, which begins again if a parameter changes."""
        read = self.first_layer.read if isinstance(self.first_layer, Packed) else None
        return kept_for_call(self, [*self.module.parameters()], Progress, read=read)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if torch.is_grad_enabled() or self.module.training:
            return self.original_forward(x_t, t, cond)
        progress = self.progress
        progress.advance(t, self.interval)
        features = progress.features(x_t, cond)
        if features is not None:
            out = self._shallow_evaluation(x_t, t, cond, features)
        elif progress.place < MOST_EVALUATIONS:
            out, features = self._full_evaluation(x_t, t, cond)
            progress.kept[progress.place] = features, CondKey.of(x_t, cond)
        else:
            out = self.original_forward(x_t, t, cond)
        progress.place += 1
        return out

    def _full_evaluation(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Return the output of the whole network, and what the shallow evaluations reuse."""
        raise NotImplementedError

    def _shallow_evaluation(self, x_t: Tensor, t: Tensor, cond: Cond, features: Tensor) -> Tensor:
        """Return the output of the network with kept features in place of its deep part."""
        raise NotImplementedError


class DiTReuse(Reuse[DiT]):
    """Forward of a diffusion transformer that reuses what its middle blocks add to the tokens (Δ-DiT).

    The steps in between compute the first `branch` blocks, the last `branch` + 1, and all that is outside of
    blocks.
    """

    @property
    def first_layer(self) -> nn.Module:
        """The layer that embeds the patches."""
        return self.module.embed_in

    def _full_evaluation(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Return the output of the whole network, and what the middle blocks add to the tokens."""
        net, (first, middle, last) = self.module, self._parts()
        cells = net.cells(x_t, cond)
        x = net.tokens(cells)
        emb = net.embed(t, cond, x.dtype)
        before = net.pass_blocks(x, emb, cond, first)
        behind = net.pass_blocks(before, emb, cond, middle)
        return net.predict(net.pass_blocks(behind, emb, cond, last), cells), behind - before

    def _shallow_evaluation(self, x_t: Tensor, t: Tensor, cond: Cond, features: Tensor) -> Tensor:
        """Return the output of the network with a kept sum in place of its middle blocks."""
        net, (first, _, last) = self.module, self._parts()
        cells = net.cells(x_t, cond)
        x = net.tokens(cells)
        emb = net.embed(t, cond, x.dtype)
        behind = net.pass_blocks(x, emb, cond, first) + features
        return net.predict(net.pass_blocks(behind, emb, cond, last), cells)

    def _parts(self) -> tuple[range, range, range]:
        """Return the numbers of the first, the middle and the last blocks."""
        n, first = len(self.module.blocks), self.branch
        return range(first), range(first, n - first - 1), range(n - first - 1, n)


class UNetReuse(Reuse[UNet]):
    """Forward of a UNet that reuses deep features (DeepCache, section 3.2).

    The steps in between compute the first convolution, `branch` blocks of the way down and the last
    `branch` + 1 blocks of the way up.
    """

    @property
    def first_layer(self) -> nn.Module:
        """The first convolution."""
        return self.module.conv_in

    def _full_evaluation(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Return the output of the whole network, and the input of the first of the last blocks."""
        up = up_path(self.module)
        x, emb, skips = self._way_down(x_t, t, cond)
        x = self.module.mid_block(x, emb, cond.context, cond.context_mask)  # (B, channels[-1], h', w')
        x, skips = self.module.with_additions(x, cond), with_residuals(skips, cond)
        first = len(up) - self.branch - 1
        features = self._way_up(x, emb, cond, skips, up[:first])
        return self._output(self._way_up(features, emb, cond, skips, up[first:])), features

    def _shallow_evaluation(self, x_t: Tensor, t: Tensor, cond: Cond, features: Tensor) -> Tensor:
        """Return the output of the network with kept features in place of its deep part."""
        _, emb, skips = self._way_down(x_t, t, cond, self.branch)
        up = up_path(self.module)[-self.branch - 1 :]
        return self._output(self._way_up(features, emb, cond, with_residuals(skips, cond), up))

    # `UNet.forward` in parts, which the two evaluations share

    def _way_down(
        self, x_t: Tensor, t: Tensor, cond: Cond, blocks: int | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the map behind the first blocks of the way down, the embedding and the skips."""
        net = self.module
        x = x_t if cond.concat is None else torch.cat([x_t, cond.concat], dim=1)  # (B, C_in, h, w)
        net.check(x, cond)
        emb = net.embed(t, cond, x_t.dtype)  # (B, D)
        x = net.conv_in(x)  # (B, channels[0], h, w)
        x, skips = net.way_down(x, emb, cond, blocks)
        return x, emb, skips

    def _way_up(
        self, x: Tensor, emb: Tensor, cond: Cond, skips: list[Tensor], blocks: list[tuple[UNetLevel, int]]
    ) -> Tensor:
        """Return the map x behind some blocks of the way up; their skips are removed from the list."""
        for level, i in blocks:
            # (B, channels[level], h', w')
            x = level.block(i, torch.cat([x, skips.pop()], dim=1), emb, cond.context, cond.context_mask)
            if i == self.module.config.blocks and level.upsamplers is not None:
                h, w = skips[-1].shape[-2:]
                x = level.upsample(x, emb, (h, w))  # (B, channels[level], 2h', 2w')
        return x

    def _output(self, x: Tensor) -> Tensor:
        """Return the prediction (B, C_out, h, w) of the last map."""
        return self.module.conv_out(F.silu(self.module.conv_norm_out(x)))


def up_path(net: UNet) -> list[tuple[UNetLevel, int]]:
    """Return the level and the index of each block on the way up."""
    return [(level, i) for level in net.up_blocks for i in range(net.config.blocks + 1)]


def reuse_features(pipe: nn.Module, interval: int, branch: int) -> tuple[str, ...]:
    """Let the denoisers of a pipeline reuse features; see `Reuse`.

    Args:
        pipe: The pipeline, or a UNet or diffusion transformer.
        interval: Number of steps per full evaluation; 1 reuses nothing.
        branch: Number of blocks that are always computed at the network's beginning.

    Returns:
        A description of what was done; empty for an interval of 1.

    Raises:
        ValueError: If a number is out of range, or there is no such network.
    """
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"reuse: expected an integer of 1 (no reuse) or more, got {interval!r}")
    if interval == 1:
        return ()
    networks = reusing_networks(pipe)
    for net in networks:
        most = len(up_path(net)) - 1 if isinstance(net, UNet) else (len(net.blocks) - 2) // 2
        if isinstance(branch, bool) or not isinstance(branch, int) or not 0 <= branch <= most:
            why = (
                "one less than the blocks of the UNet's way up"
                if isinstance(net, UNet)
                else f"so that one of the transformer's {len(net.blocks)} blocks is reused"
            )
            raise ValueError(f"branch: expected an integer from 0 to {most}, {why}, got {branch!r}")
    for net in networks:
        if isinstance(net, UNet):
            UNetReuse(net, interval, branch)
        else:
            DiTReuse(net, interval, branch)
    return (
        f"reuse: the deep part of the denoiser computed in one of {interval} steps, the last"
        f" {branch + 1} blocks in all (approximate)",
    )
