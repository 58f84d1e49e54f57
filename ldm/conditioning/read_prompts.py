"""Prompts as a model with exemplars has read them, and how long they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ldm.conditioning.things import Lexicon, Mention, ReadText
from ldm.diffusion.cond import Cond
from ldm.models.layout import ThingLayout
from ldm.support.calls import current_call, own_state
from ldm.support.derived import Derived

REMEMBERED = 256
"""Number of prompts beyond which `PromptMemory` forgets the first ones, at the beginning of a call."""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """One alternative of a prompt: its share, and what each of its spans says."""

    share: float
    spans: tuple[ReadText, ...]

    @property
    def mentions(self) -> tuple[Mention, ...]:
        """The things that it names, in the order of their slots."""
        return self.spans[-1].mentions


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadPrompt:
    """A prompt as a model with exemplars reads it.

    Attributes:
        alternatives: What it says; several in a blend.
        text: The context of its text, (1, M, D), with its mask.
    """

    alternatives: tuple[Alternative, ...]
    text: Cond

    @property
    def things(self) -> int:
        """The number of things that it names, the largest of a blend's alternatives."""
        return max(len(alternative.mentions) for alternative in self.alternatives)

    @property
    def tokens(self) -> int:
        """M, the number of tokens of the context."""
        assert self.text.context is not None
        return self.text.context.shape[1]


class ReadInCall:
    """What a call of a pipeline has read and drawn.

    Attributes:
        read: Prompts, by their text.
        layouts: Layouts, by the prompt and the seed.
    """

    def __init__(self) -> None:
        self.read: dict[str, ReadPrompt] = {}
        self.layouts: dict[tuple[ReadPrompt, int], ThingLayout] = {}

    @classmethod
    def of(cls, owner: nn.Module) -> ReadInCall:
        """Return that of the call that runs in this thread; outside of calls, nothing is kept."""
        return cls() if current_call() is None else own_state(owner, cls)


class _Kept(NamedTuple):
    """Prompts that were read with one state of the weights, one lexicon, and one number of threads."""

    weights: object
    lexicon: Lexicon
    threads: int
    read: dict[str, ReadPrompt]


class PromptMemory:
    """Keeps the prompts that calls have read for later calls, for those who repeat them.

    A prompt is read again if the weights of the text tower, the library's words or the number of threads have
    changed since, and at every call while hooks are attached to the tower, as adapters and watchers are.
    """

    def __init__(self) -> None:
        self._weights: Derived[object] = Derived()
        self._kept: _Kept | None = None

    def lend(self, owner: nn.Module, tower: nn.Module, lexicon: Lexicon) -> None:
        """Give the call that runs in this thread what was read, and keep what it will read.

        Args:
            owner: The conditioner.
            tower: The text tower, on which what was read depends.
            lexicon: What a prompt may consist of.
        """
        if any(part._forward_hooks or part._forward_pre_hooks for part in tower.modules()):
            return
        weights = self._weights.of([*tower.parameters(), *tower.buffers()], object)
        threads, kept = torch.get_num_threads(), self._kept
        if (
            kept is None
            or kept.weights is not weights
            or kept.lexicon is not lexicon
            or kept.threads != threads
        ):
            kept = _Kept(weights, lexicon, threads, {})
        elif len(kept.read) > REMEMBERED:  # a new table, as another thread may use the old one
            kept = kept._replace(read=dict(list(kept.read.items())[-REMEMBERED // 2 :]))
        self._kept = kept
        ReadInCall.of(owner).read = kept.read
