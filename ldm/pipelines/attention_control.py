"""Prompt-to-Prompt: a picture is changed by its words while the source's attention holds it together (Hertz
et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher

import torch
from torch import Tensor, nn

from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.models.layers.attention import attention_control
from ldm.support.config import nearest

# the words of a prompt, and where in the context their tokens stand
WordPositions = Sequence[tuple[str, Sequence[int]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """How the M tokens of a prompt stand to those of its source: ``taken`` (M, M) mixes the source's
    attention, column j for token j, where ``shared`` (M,) is 1; ``scale`` (M,) is what the attention to each
    token is multiplied by.
    """

    taken: Tensor
    shared: Tensor
    scale: Tensor


def align(
    source: WordPositions, prompt: WordPositions, tokens: int, emphasis: Mapping[str, float]
) -> Alignment:
    """The alignment of two prompts in contexts of M = ``tokens``: words that both have, in order, take the
    attention of the source's (section 3, "adding a new phrase"); so do words that stand in the place of as
    many others ("word swap"), and what is before and behind all words.

    ValueError for an emphasis on a word that the prompt does not have.
    """
    taken, scale = torch.zeros(tokens, tokens), torch.ones(tokens)
    ours, theirs = [word for word, _ in prompt], [word for word, _ in source]
    for tag, i, end, j, other_end in SequenceMatcher(a=theirs, b=ours, autojunk=False).get_opcodes():
        if tag in ("equal", "replace") and end - i == other_end - j:
            for (_, there), (_, here) in zip(source[i:end], prompt[j:other_end], strict=True):
                for k, place in enumerate(here):  # a word of more tokens, or of fewer: in proportion
                    first = k * len(there) // len(here)
                    last = max(first + 1, (k + 1) * len(there) // len(here))
                    taken[list(there[first:last]), place] = 1 / (last - first)
    taken[0, 0] = 1  # the start of text
    end, other_end = (
        1 + max((place for _, places in side for place in places), default=0) for side in (source, prompt)
    )
    for place in range(other_end, tokens):  # the end of text, and padding
        taken[min(place - other_end + end, tokens - 1), place] = 1
    for word, factor in emphasis.items():
        places = [place for own, own_places in prompt if own == word.lower() for place in own_places]
        if not places:
            raise ValueError(f"emphasis: the prompt has no word {word!r}; {nearest(word, ours)}")
        scale[places] = float(factor)
    return Alignment(taken=taken, shared=(taken.sum(0) > 0).float(), scale=scale)


@dataclass(kw_only=True)
class SourceAttention:
    """Attention of pictures (the second half of those that are made) led by that of their sources (the first
    half).

    ``cross``: the share of the run, from its beginning, in which attention to shared words is the source's;
    ``within``: the same of attention between positions. ``progress``: the share that is run.
    """

    alignment: Alignment
    pictures: int
    cross: float
    within: float
    progress: float = field(default=0.0, init=False)

    @contextmanager
    def over(self, network: nn.Module) -> Iterator[None]:
        """Within it, the attention of the network is controlled."""
        with ExitStack() as stack:
            stack.enter_context(attention_control(network, self._words, of="cross"))
            if self.within > 0:
                stack.enter_context(attention_control(network, self._positions, of="self"))
            yield

    def watch(self, fn: DenoiseFn, times: Tensor) -> DenoiseFn:
        """The DenoiseFn, by whose t the progress over a grid's ``times`` (N,) is told."""

        def watched(x_t: Tensor, t: Tensor) -> Denoised:
            self.progress = float((times > float(torch.as_tensor(t).reshape(-1)[0])).double().mean())
            return fn(x_t, t)

        return watched

    def _words(self, name: str, p: Tensor) -> Tensor | None:
        """Attention (B, H, L, M …) to the words, of which the first rows are those with a prompt."""
        n, m = self.pictures, len(self.alignment.shared)
        if bool((self.alignment.scale == 1).all()) and self.progress >= self.cross:
            return None
        a, out = self.alignment, p.clone()
        own = p[n : 2 * n, ..., :m]
        if self.progress < self.cross:
            shared = a.shared.to(p)
            own = shared * (p[:n, ..., :m] @ a.taken.to(p)) + (1 - shared) * own
        out[n : 2 * n, ..., :m] = own * a.scale.to(p)
        return out

    def _positions(self, name: str, p: Tensor) -> Tensor | None:
        """Attention (B, H, L, L) between positions."""
        if self.progress >= self.within:
            return None
        n, out = self.pictures, p.clone()
        out[n : 2 * n] = p[:n]
        return out
