"""`Controlled`: a UNet with the controls of one call around it.

It belongs to the call. The UNet, which calls share, is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.control.control_net import ControlNet
from ldm.models.layers.attention import Attention, AttentionJoin, joined_attention
from ldm.support.device import COMPUTES_IN

Added = Mapping[str, tuple[Tensor, ...]]  # fields of `Cond`, and what is added to them
ALWAYS = (float("-inf"), float("inf"))  # the interval of all timesteps


class ControlKind(Protocol):
    """What a network that controls a UNet computes in a call.

    Attributes:
        count: Number of the tensors that it prepares.
        factor: Size of a hint divided by that of the latent; None for hints of any size.
        hint_channels: Channels of a hint.
        in_attentions: Whether it acts in ldm's own attention layers.
    """

    @property
    def in_attentions(self) -> bool: ...

    @property
    def count(self) -> int: ...

    @property
    def factor(self) -> int | None: ...

    @property
    def hint_channels(self) -> int: ...

    def prepare(self, hint: Tensor) -> tuple[Tensor, ...]:
        """Return what does not depend on the timestep, for hints (B, C, H, W): tensors (B, ...)."""

    def prepare_without(self, hint: Tensor, prepared: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the same for the unconditional branch of guidance; `prepared` is that of the other."""

    def added(
        self, x_t: Tensor, t: Tensor, cond: Cond, prepared: Sequence[Tensor], *, strength: float, guess: bool
    ) -> Added:
        """Return what is added to fields of the UNet's condition.

        Args:
            x_t: Noisy sample, shape (B, C, h, w).
            t: Timesteps, shape (B,).
            cond: The UNet's condition.
            prepared: The result of `prepare`.
            strength: Factor of the control.
            guess: Whether deeper maps count more (guess mode).
        """

    def joined(self, prepared: Sequence[Tensor], weights: Tensor) -> Mapping[str, AttentionJoin]:
        """Return what joins the UNet's attentions, by their names.

        Args:
            prepared: The result of `prepare`.
            weights: Factor for each sample, shape (B,).
        """


class MapsOnly:
    """A control that prepares the same for both branches, and adds nothing to attentions."""

    in_attentions = False

    def prepare_without(self, hint: Tensor, prepared: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what was prepared."""
        return tuple(prepared)

    def joined(self, prepared: Sequence[Tensor], weights: Tensor) -> Mapping[str, AttentionJoin]:
        """Return nothing."""
        return {}


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlNetKind(MapsOnly):
    """A `ControlNet`, as a `ControlKind`.

    In guess mode map i of n is multiplied by 10^(i/(n − 1) − 1), from 0.1 for the first to 1 for the middle.
    """

    network: ControlNet
    count = 1

    @property
    def factor(self) -> int:
        """Size of a hint divided by that of the latent."""
        return self.network.control.factor

    @property
    def hint_channels(self) -> int:
        """Channels of a hint."""
        return self.network.control.hint_channels

    def prepare(self, hint: Tensor) -> tuple[Tensor, ...]:
        """Return the encoded hint, (B, C, h, w)."""
        return (self.network.controlnet_cond_embedding(hint),)

    def added(
        self, x_t: Tensor, t: Tensor, cond: Cond, prepared: Sequence[Tensor], *, strength: float, guess: bool
    ) -> Added:
        """Return the residuals; the arguments are those of `ControlKind.added`."""
        config = self.network.config
        if config.in_channels != x_t.shape[1] and cond.concat is not None:
            x_t = torch.cat([x_t, cond.concat], dim=1)  # (B, C_in, h, w)
        own = Cond(
            context=cond.context if config.takes_context else None,
            context_mask=cond.context_mask if config.takes_context else None,
            pooled=cond.pooled,
        )
        maps = self.network(x_t, t, own, *prepared)
        if guess and not self.network.control.global_pool:
            weights = [strength * 10 ** (i / (len(maps) - 1) - 1) for i in range(len(maps))]
        else:
            weights = [strength] * len(maps)
        return {"residuals": tuple(w * m for w, m in zip(weights, maps, strict=True))}


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlPart:
    """One control of a call.

    Args:
        kind: What it computes.
        strength: Factor of what it adds.
        guess: See `ControlKind.added`.
        interval: (low, high] of the timesteps, as the network gets them, at which it acts.
    """

    kind: ControlKind
    strength: float
    guess: bool
    interval: tuple[float, float]

    def rows(self, t: Tensor, on: Tensor) -> Tensor:
        """Return for which samples it acts, bool (B,), given timesteps and where it may act, (B,) each."""
        low, high = self.interval
        return on & (t > low) & (t <= high)

    def added(self, x_t: Tensor, t: Tensor, cond: Cond, hints: Sequence[Tensor]) -> Added:
        """Return what is added to fields of the condition, zero for samples for which it does not act.

        Args:
            x_t: Noisy sample, shape (B, C, h, w).
            t: Timesteps, shape (B,).
            cond: The UNet's condition.
            hints: Where it may act, bool (B,), and what was prepared.
        """
        rows = self.rows(t, hints[0])
        prepared = hints[1:]
        if not self.strength or not bool(rows.any()):
            return {}
        if bool(rows.all()):
            return self.kind.added(x_t, t, cond, prepared, strength=self.strength, guess=self.guess)
        found = self.kind.added(
            x_t[rows],
            t[rows],
            cond[rows],
            [each[rows] for each in prepared],
            strength=self.strength,
            guess=self.guess,
        )
        return {name: tuple(_scattered(each, rows) for each in maps) for name, maps in found.items()}

    def joined(self, t: Tensor, hints: Sequence[Tensor]) -> Mapping[str, AttentionJoin]:
        """Return what joins attentions; the arguments are those of `added`."""
        rows = self.rows(t, hints[0])
        if not self.strength or not bool(rows.any()):
            return {}
        return self.kind.joined(hints[1:], self.strength * rows)


def _scattered(values: Tensor, rows: Tensor) -> Tensor:
    """Return values (R, ...) at the R true places of rows (B,), zero elsewhere, (B, ...)."""
    whole = values.new_zeros(len(rows), *values.shape[1:])
    whole[rows] = values
    return whole


class Controlled(nn.Module):
    """The network `net(x_t, t, cond)` with controls, which read `Cond.hints`.

    Args:
        net: The UNet.
        parts: The controls. Each has, in its turn, in `Cond.hints`: where it may act, bool (B,), and what it
            prepared.
    """

    def __init__(self, net: nn.Module, parts: Sequence[ControlPart]) -> None:
        super().__init__()
        self.net = net
        self.parts = tuple(parts)
        if COMPUTES_IN in net.__dict__:  # parameters of 16 bits that are widened
            self.__dict__[COMPUTES_IN] = net.__dict__[COMPUTES_IN]
        self._attentions = {name: part for name, part in net.named_modules() if isinstance(part, Attention)}

    @property
    def config(self) -> Any:  # of any denoising network
        """The configuration of the UNet."""
        return self.net.config

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the raw prediction of the UNet; the arguments are those of `UNet.forward`.

        Raises:
            ValueError: If there are not as many hints as the controls read.
        """
        hints, wanted = cond.hints or (), sum(1 + part.kind.count for part in self.parts)
        if len(hints) != wanted:
            raise ValueError(f"Cond.hints: expected {wanted} tensors for the controls, got {len(hints)}")
        plain, sums = replace(cond, hints=None), dict[str, tuple[Tensor, ...]]()
        joined: dict[Attention, list[AttentionJoin]] = {}
        for part in self.parts:
            own, hints = hints[: 1 + part.kind.count], hints[1 + part.kind.count :]
            for name, maps in part.added(x_t, t, plain, own).items():
                others = sums.get(name)
                if others is not None and len(others) != len(maps):
                    raise ValueError(
                        f"controls: two add {len(others)} and {len(maps)} {name}: expected the same number"
                    )
                sums[name] = maps if others is None else tuple(map(torch.add, others, maps))
            for name, join in part.joined(t, own).items():
                joined.setdefault(self._attentions[name], []).append(join)
        fields: dict[str, Any] = dict(sums)
        with joined_attention(joined):
            return self.net(x_t, t, replace(plain, **fields))


def interval(times: Sequence[float], start: float, end: float) -> tuple[float, float]:
    """Return the timesteps (low, high] of the steps of a grid that lie between two fractions of it.

    Step i of N is taken if start ≤ i/N and (i + 1)/N ≤ end. A timestep between those of two steps belongs to
    the earlier one.

    Args:
        times: Timesteps of the steps, falling or rising.
        start, end: Fractions of the steps, in [0, 1].
    """
    falling = sorted(times, reverse=True)
    n = len(falling)
    taken = [i for i in range(n) if i / n >= start and (i + 1) / n <= end]
    if not taken:
        return float("inf"), float("inf")
    after = taken[-1] + 1
    low = falling[after] if after < n else float("-inf")
    high = falling[taken[0]] if taken[0] else float("inf")
    return low, high
