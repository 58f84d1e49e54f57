"""The states of frozen text towers, computed once for each caption and kept on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ldm.conditioning.conditioner import Conditioner
from ldm.conditioning.prompt import escape_prompt
from ldm.diffusion.cond import Cond
from ldm.support.progress import progress_bar
from ldm.training.caches.rows import CACHES
from ldm.training.caches.shares import own_share, wait_for_others
from ldm.training.caches.store import TensorStore, fill

AT_ONCE = 32  # captions that the tower reads at a time
POOLED = "/pooled"  # end of the key of a pooled state


class CachedTexts:
    """The conditions of captions, as the text towers give them, from a store.

    The states of a caption are its tokens (L, D) and the pooled text (E,), in float16. A batch is padded to
    its longest caption, and masked if lengths differ.

    Args:
        text: The frozen conditioner, without a draft.
        key: Identifies its weights and conventions.
        captions: All captions that will be read; the empty one is among them.

    Raises:
        ValueError: If there is a draft, whose output depends on the size of the latent.
    """

    def __init__(self, text: Conditioner, key: str, captions: Iterable[str]) -> None:
        if getattr(text, "draft", None) is not None:
            raise ValueError("cached texts: expected a text tower without a draft")
        self.text = text
        self.device = next(next(iter(text.networks().values())).parameters()).device
        self.store = TensorStore(CACHES / f"texts-{hashlib.sha256(key.encode()).hexdigest()[:16]}")
        wanted = sorted({"", *captions})
        missing = [caption for caption in own_share(wanted) if _key(caption) not in self.store]
        if missing:
            fill(self.store, self._computed(missing))
        wait_for_others()
        self.store.refresh()

    @torch.no_grad()
    def _computed(self, captions: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
        # captions of about one length are read together
        ordered = sorted(captions, key=len)
        starts = range(0, len(ordered), AT_ONCE)
        for start in progress_bar(len(starts), iterable=starts, desc=f"compute {self.store.folder.name}"):
            part = ordered[start : start + AT_ONCE]
            cond = self.text([escape_prompt(caption) for caption in part])
            assert cond.context is not None
            found: dict[str, Tensor] = {}
            for i, caption in enumerate(part):
                used = slice(None) if cond.context_mask is None else cond.context_mask[i]
                found[_key(caption)] = cond.context[i][used]
                if cond.pooled is not None:
                    found[_key(caption) + POOLED] = cond.pooled[i]
            yield found

    def __call__(self, captions: Sequence[str]) -> Cond:
        """Return the condition of B captions: context (B, L, D), mask if lengths differ, pooled (B, E)."""
        keys = [_key(caption) for caption in captions]
        states = [torch.from_numpy(self.store[key]).float() for key in keys]  # (L, D) each
        lengths = torch.tensor([len(state) for state in states], device="cpu")
        context = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)  # (B, L, D)
        mask = torch.arange(context.shape[1], device="cpu") < lengths[:, None]
        pooled = None
        if keys[0] + POOLED in self.store:
            pooled = torch.stack([torch.from_numpy(self.store[key + POOLED]).float() for key in keys])
        return Cond(
            context=context.to(self.device),
            context_mask=None if bool(mask.all()) else mask.to(self.device),
            pooled=None if pooled is None else pooled.to(self.device),
        )


def _key(caption: str) -> str:
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:32]
