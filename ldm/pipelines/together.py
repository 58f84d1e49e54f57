"""Several calls drawn in one batch, each with exactly the images that it gives alone.

Every random number is a function of (seed, sample, step), so an image depends on its batch only through the
rounding of matrix products, whose kernels are chosen by the size of the batch. `Together` therefore makes the
conditions of each call and decodes its images separately, and compares the first evaluation of the network in
the batch with that of each call alone, once for every combination of sizes. Where a bit differs, the calls
are drawn one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.images.result import Images
from ldm.pipelines.call import Call
from ldm.pipelines.conditions import Pair
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.protocol import Request
from ldm.pipelines.stages.stage import Stage
from ldm.support.calls import interruptible, separate_call

REQUEST = Request(task="text_to_image")


class Unwanted(Exception):
    """No image of a run is wanted any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One call of a batch: its conditions, and its first state (B, C, h, w)."""

    call: Call
    pair: Pair
    x: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of tokens of the conditional and the unconditional context; 0 without one."""
        contexts = (cond.context for cond in self.pair)
        return tuple(0 if context is None else context.shape[1] for context in contexts)


class Together:
    """Draws text-to-image calls of a latent diffusion model in one batch.

    Args:
        pipe: The model.
        exact: Whether calls are drawn one after another where the batch would round differently. Default:
            True.
    """

    def __init__(self, pipe: LatentDiffusion, *, exact: bool = True) -> None:
        self.pipe, self.exact = pipe, exact
        self._compared: dict[tuple[object, ...], bool] = {}

    @torch.no_grad()
    def draw(
        self,
        calls: Sequence[Call],
        wanted: Callable[[int], bool] = lambda _: True,
        ready: Callable[[Mapping[int, Images | None]], object] = lambda _: None,
    ) -> list[Images | None]:
        """Return the images of each call, as `LatentDiffusion.draw` returns them for it.

        Args:
            calls: Calls of `text_to_image` that differ only in prompts, negative prompts and seeds.
            wanted: Whether call i is still wanted; asked at every evaluation of the network. The rows of one
                that is not are no longer computed. Default: all are.
            ready: Called with the results of calls, by their places, as soon as they are there: once with all
                of a batch, or with those of one call after another. Default: nothing.

        Returns:
            The images, None for a call that is not wanted at the end.
        """
        pipe, stage = self.pipe, self.pipe.stage
        if len(calls) == 1:
            return self._draw_alone(calls, wanted, ready)
        with separate_call(pipe):
            parts = [
                Part(call=call, pair=pipe.paired(call, REQUEST), x=stage.begin(call)[1]) for call in calls
            ]
            if not can_join(parts) or not self._same(stage, parts):
                return self._draw_alone(calls, wanted, ready)
            whole = joined_call(calls)
            for watcher in pipe.watchers:
                watcher.begin(whole)
            denoise = self._denoise(stage, parts, wanted)
            try:
                x = stage.solve(whole, denoise, joined_states(parts), pipe.hooks)
            except Unwanted:
                made: list[Images | None] = [None for _ in calls]
            else:
                states = x.split([len(part.x) for part in parts])
                made = [
                    pipe.finish_images(call, pipe.decode(states[i]), REQUEST) if wanted(i) else None
                    for i, call in enumerate(calls)
                ]
            ready(dict(enumerate(made)))
            return made

    def _draw_alone(
        self,
        calls: Sequence[Call],
        wanted: Callable[[int], bool],
        ready: Callable[[Mapping[int, Images | None]], object],
    ) -> list[Images | None]:
        """Return the images of calls that are drawn one after another; see `draw`."""
        made: list[Images | None] = []
        for i, call in enumerate(calls):

            def check(done: int, total: int, i: int = i) -> None:
                if not wanted(i):
                    raise Unwanted

            try:
                with interruptible(check):
                    made.append(self.pipe.draw(call, REQUEST) if wanted(i) else None)
            except Unwanted:
                made.append(None)
            ready({i: made[i]})
        return made

    def _denoise(self, stage: Stage, parts: Sequence[Part], wanted: Callable[[int], bool]) -> DenoiseFn:
        """Return the guided denoiser of a batch, which skips the rows of calls that are not wanted."""
        everything = tuple(range(len(parts)))
        rows = torch.arange(sum(len(part.x) for part in parts), device=stage.device).split(
            [len(part.x) for part in parts]
        )
        made = {everything: guided_batch(stage, parts)}

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            kept = tuple(i for i in everything if wanted(i))
            if not kept:
                raise Unwanted
            if kept not in made:
                fewer = [parts[i] for i in kept]
                made[kept] = guided_batch(stage, fewer) if self._same(stage, fewer) else made[everything]
            if made[kept] is made[everything]:
                return made[everything](x, t)
            index = torch.cat([rows[i] for i in kept])
            d = made[kept](x[index], t if t.ndim == 0 else t[index])
            frac = None if d.var_frac is None else spread(d.var_frac, index, x)
            return Denoised(spread(d.x0, index, x), spread(d.eps, index, x), frac)

        return denoise

    def _same(self, stage: Stage, parts: Sequence[Part]) -> bool:
        """Return whether the network gives each call the same bits in a batch as alone."""
        if not self.exact or len(parts) == 1:
            return True
        total = sum(len(part.x) for part in parts)
        longest = tuple(max(each) for each in zip(*(part.lengths for part in parts), strict=True))
        keys = [(len(part.x), part.lengths, total, longest, part.x.shape[-2:]) for part in parts]
        if any(key not in self._compared for key in keys):
            t = parts[0].call.grid.t[0]
            both = guided_batch(stage, parts)(joined_states(parts), t).x0.split([len(p.x) for p in parts])
            for key, part, x0 in zip(keys, parts, both, strict=True):
                if key in self._compared:
                    continue
                alone = stage.guided(part.call, part.pair)(part.x, t).x0
                self._compared[key] = torch.equal(x0, alone)
        return all(self._compared[key] for key in keys)


def guided_batch(stage: Stage, parts: Sequence[Part]) -> DenoiseFn:
    """Return the guided denoiser of several calls in one batch."""
    if len(parts) == 1:
        return stage.guided(parts[0].call, parts[0].pair)
    pair = Cond.cat([part.pair[0] for part in parts]), Cond.cat([part.pair[1] for part in parts])
    return stage.guided(joined_call([part.call for part in parts]), pair)


def can_join(parts: Sequence[Part]) -> bool:
    """Return whether the conditions of calls have the fields and shapes of one batch."""
    return all(Cond.can_cat([part.pair[k] for part in parts]) for k in (0, 1))


def joined_states(parts: Sequence[Part]) -> Tensor:
    """Return the first states of several calls as one batch."""
    return torch.cat([part.x for part in parts])


def joined_call(calls: Sequence[Call]) -> Call:
    """Return several calls as one; all options but prompts and seeds are those of the first."""
    negatives = [
        call.negatives if len(call.negatives) > 1 else call.negatives * len(call.seeds) for call in calls
    ]
    return replace(
        calls[0],
        prompts=tuple(prompt for call in calls for prompt in call.texts),
        negative=tuple(text for each in negatives for text in each),
        seeds=tuple(seed for call in calls for seed in call.seeds),
        n=1,
    )


def spread(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Return rows (K, *S) at their places in a batch of zeros, of the shape of `like` (B, *S)."""
    return values.new_zeros(len(like), *values.shape[1:]).index_copy(0, index, values)
