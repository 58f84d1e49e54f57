"""Prompt-to-Prompt: an image is changed by words while its source's attention is kept (Hertz et al. 2022)."""

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
from ldm.support.defaults import as_tensor

# the words of a prompt, and the positions of their tokens in the context
WordPositions = Sequence[tuple[str, Sequence[int]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """How the M tokens of a prompt correspond to those of its source.

    Attributes:
        taken: Mixing matrix (M, M) of the source's attention: column j is for token j.
        shared: (M,) 1 for tokens whose attention is taken from the source, else 0.
        scale: (M,) factor of the attention to each token.
    """

    taken: Tensor
    shared: Tensor
    scale: Tensor


def align(
    source: WordPositions, prompt: WordPositions, tokens: int, emphasis: Mapping[str, float]
) -> Alignment:
    """Align two prompts.

    Words that both have, in order, take the source's attention (section 3, "adding a new phrase"). So do
    words that stand in the place of as many others ("word swap"), and the tokens before and after all words.

    Args:
        source: Words of the source's prompt.
        prompt: Words of the prompt.
        tokens: M, the length of the context.
        emphasis: Factors of the attention to words of the prompt.

    Raises:
        ValueError: If the prompt does not have a word of `emphasis`.
    """
    taken = torch.zeros(tokens, tokens, device="cpu", dtype=torch.float32)
    scale = torch.ones(tokens, device="cpu", dtype=torch.float32)
    words, source_words = [word for word, _ in prompt], [word for word, _ in source]
    for tag, i, end, j, other_end in SequenceMatcher(a=source_words, b=words, autojunk=False).get_opcodes():
        if tag not in ("equal", "replace") or end - i != other_end - j:
            continue
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
            raise ValueError(f"emphasis: the prompt has no word {word!r}; {nearest(word, words)}")
        scale[places] = float(factor)
    return Alignment(taken=taken, shared=(taken.sum(0) > 0).float(), scale=scale)


@dataclass(kw_only=True)
class SourceAttention:
    """Attention of images led by that of their sources, in a batch with the sources first.

    Attributes:
        alignment: How the tokens correspond.
        count: Number of images.
        cross: Share of the run, from its start, in which attention to shared words is the source's.
        within: Share of the run in which attention between positions is the source's.
        progress: Share that has been run.
    """

    alignment: Alignment
    count: int
    cross: float
    within: float
    progress: float = field(default=0.0, init=False)

    @contextmanager
    def over(self, network: nn.Module) -> Iterator[None]:
        """Within it, the attention of the network is controlled."""
        with ExitStack() as stack:
            stack.enter_context(attention_control(network, self._cross_attention, of="cross"))
            if self.within > 0:
                stack.enter_context(attention_control(network, self._self_attention, of="self"))
            yield

    def watch(self, fn: DenoiseFn, times: Tensor) -> DenoiseFn:
        """Return the DenoiseFn that also notes the progress over a grid's `times` (N,)."""

        def watched(x_t: Tensor, t: Tensor) -> Denoised:
            self.progress = float((times > float(as_tensor(t).reshape(-1)[0])).double().mean())
            return fn(x_t, t)

        return watched

    def _cross_attention(self, name: str, p: Tensor) -> Tensor | None:
        """Change attention (B, H, L, M …) to words; the first rows of the batch are the conditional ones."""
        n, m = self.count, len(self.alignment.shared)
        if bool((self.alignment.scale == 1).all()) and self.progress >= self.cross:
            return None
        a, out = self.alignment, p.clone()
        own = p[n : 2 * n, ..., :m]
        if self.progress < self.cross:
            shared = a.shared.to(p)
            own = shared * (p[:n, ..., :m] @ a.taken.to(p)) + (1 - shared) * own
        out[n : 2 * n, ..., :m] = own * a.scale.to(p)
        return out

    def _self_attention(self, name: str, p: Tensor) -> Tensor | None:
        """Replace attention (B, H, L, L) between positions by the source's."""
        if self.progress >= self.within:
            return None
        n, out = self.count, p.clone()
        out[n : 2 * n] = p[:n]
        return out
