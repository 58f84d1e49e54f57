"""Several drawings sampled in one batch, each with exactly the images that it has alone.

Every random number is a function of (seed, sample, step), so an image depends on its batch only through the
rounding of matrix products, whose kernels are chosen by the size of the batch. `Together` therefore makes the
conditions of each drawing separately, and compares an evaluation of the network, and the decoding, in the
batch and for each drawing alone, as they are and with sums that cancel (`ldm.models.layers.rounding`), once
for every combination of sizes. Where a bit differs, the drawings with texts of one length are compared alone,
and where it differs again, the drawings are sampled, or decoded, one after another.
The layouts of models with exemplars, whose bits do not depend on the batch, are drawn for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.read_prompts import PromptMemory
from ldm.diffusion.cond import Cond
from ldm.diffusion.constraints import keep_known
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.images.result import Images
from ldm.models.layers.rounding import Cancelling
from ldm.pipelines.call import Call
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.protocol import Begun
from ldm.pipelines.stages.stage import Stage
from ldm.pipelines.tasks.deferred import Deferred
from ldm.pipelines.unclip import UnCLIP
from ldm.support.calls import interruptible, separate_call

_T = TypeVar("_T")
DrawingResult = Images | Exception  # of a drawing
DECODED_AT_ONCE = 1 << 20
"""Largest number of pixels that are decoded at once; of larger images it saves no time, and costs memory."""


class Unwanted(Exception):
    """A drawing is not wanted any more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One drawing of a batch, ready to be sampled."""

    drawing: Deferred
    begun: Begun

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.begun.x)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of tokens of the conditional and the unconditional context; 0 without one."""
        contexts = (cond.context for cond in self.begun.pair)
        return tuple(0 if context is None else context.shape[1] for context in contexts)

    @property
    def kind(self) -> tuple[object, ...]:
        """What decides how the network is evaluated, besides the number of images and of tokens."""
        request, over = self.drawing.request, self.begun.over
        conditioned = 0 if over.guidance == 0 else 1 if over.guidance == 1 else None
        return tuple(self.begun.x.shape[1:]), request.window, request.image_guidance, conditioned


class Together:
    """Draws what is asked of a latent diffusion model, or of an unCLIP model's decoder, in one batch.

    Args:
        pipe: The model.
        exact: Whether drawings are sampled one after another where the batch would round differently.
            Default: True.
    """

    def __init__(self, pipe: LatentDiffusion | UnCLIP, *, exact: bool = True) -> None:
        self.pipe, self.exact = pipe, exact
        self._compared: dict[tuple[object, ...], bool] = {}
        self._prompts = PromptMemory()

    @torch.no_grad()
    def draw(
        self,
        drawings: Sequence[Deferred],
        wanted: Callable[[int], bool] = lambda _: True,
        ready: Callable[[Mapping[int, DrawingResult]], object] = lambda _: None,
    ) -> list[DrawingResult]:
        """Return the images of each drawing, as its task returns them alone.

        Args:
            drawings: Drawings of one task. Their calls differ only in prompts, negative prompts and seeds,
                their requests only in the values of tensors.
            wanted: Whether drawing i is still wanted; asked at every evaluation of the network. The rows of
                one that is not are no longer computed. Default: all are.
            ready: Called with the results of drawings, by their places, as soon as they are there: once with
                all of a batch, or with those of one after another. Default: nothing.

        Returns:
            The images of each, or the error that it ends with, `Unwanted` for one that is not wanted.
        """
        found: dict[int, DrawingResult] = {}

        def add(outcomes: Mapping[int, DrawingResult]) -> None:
            if outcomes:
                found.update(outcomes)
                ready(outcomes)

        if len(drawings) == 1 or not all(map(is_plain, drawings)):
            for i, drawing in enumerate(drawings):
                add({i: attempt(partial(self._draw_alone, drawing), partial(wanted, i))})
            return [found[i] for i in range(len(drawings))]
        with separate_call(self.pipe):
            self._draw_layouts(drawings)
            parts = dict[int, Part]()
            for i, drawing in enumerate(drawings):
                part = attempt(partial(self._part, drawing), partial(wanted, i))
                if isinstance(part, Part):
                    parts[i] = part
                else:
                    add({i: part})
            for group in self._groups(parts):
                add(self._sample({i: parts[i] for i in group}, wanted))
        return [found[i] for i in range(len(drawings))]

    def _draw_alone(self, drawing: Deferred) -> Images:
        return drawing.finished(self.pipe.draw(drawing.call, drawing.request))

    def _draw_layouts(self, drawings: Sequence[Deferred]) -> None:
        """Draw the layouts of all prompts, which this call keeps; prompts of earlier calls are known."""
        text = self.pipe.text if isinstance(self.pipe, LatentDiffusion) else None
        if not isinstance(text, ExemplarConditioner):
            return
        self._prompts.lend(text, text.text, text.lexicon)
        try:
            own = [text.read_each(drawing.call.texts, drawing.call.seeds) for drawing in drawings]
        except ValueError:  # which the drawing that it concerns ends with
            return
        text.layouts([one for read, _ in own for one in read], [seed for _, seeds in own for seed in seeds])

    def _groups(self, parts: Mapping[int, Part]) -> list[tuple[int, ...]]:
        """Return the drawings that are sampled in one batch: all, those of one length of text, or each."""
        own, alike = list(parts.values()), defaultdict[tuple[int, ...], dict[int, Part]](dict)
        if can_join(own) and self._same(self.pipe.stage, own):
            return [tuple(parts)]
        for i, part in parts.items():
            alike[part.lengths][i] = part
        if len(alike) == 1:
            return [(i,) for i in parts]
        return [group for fewer in alike.values() for group in self._groups(fewer)]

    def _part(self, drawing: Deferred) -> Part:
        """Return a drawing with its conditions and its first state; watchers see that its call begins."""
        self._announce(drawing.call)
        return Part(drawing=drawing, begun=self.pipe.begin(drawing.call, drawing.request))

    def _announce(self, call: Call) -> None:
        for watcher in self.pipe.watchers:
            watcher.begin(call)

    def _sample(self, parts: Mapping[int, Part], wanted: Callable[[int], bool]) -> dict[int, DrawingResult]:
        """Return the results of parts that are sampled in one batch."""
        pipe, stage, own = self.pipe, self.pipe.stage, list(parts.values())
        call = joined_call(own)
        self._announce(call if len(own) > 1 else own[0].drawing.call)
        try:
            x = stage.solve(call, self._denoise(stage, parts, wanted), joined_states(own), pipe.hooks)
            pixels = self._decoded(own, x)
        except Unwanted:
            return {i: Unwanted() for i in parts}  # without a traceback, whose frames would keep the tensors
        except Exception as error:
            return dict.fromkeys(parts, error)
        return {
            i: attempt(partial(self._complete, part, state, made), partial(wanted, i))
            for (i, part), state, made in zip(parts.items(), split_states(x, own), pixels, strict=True)
        }

    def _decoded(self, parts: Sequence[Part], x: Tensor) -> Sequence[Tensor | None]:
        """Return the images of the last states (B, C, h, w) of each part; None where it is decoded alone."""
        decode, call = self.pipe.stage.images.decode, parts[0].begun.call
        if len(x) * call.height * call.width <= DECODED_AT_ONCE and self._equal(
            [("decoded", part.n, *x.shape) for part in parts],
            [part.n for part in parts],
            partial(decoded_rows, decode, x),
            [partial(decoded_rows, decode, state) for state in split_states(x, parts)],
        ):
            return split_states(decode(x), parts)
        return [None] * len(parts)

    def _complete(self, part: Part, state: Tensor, pixels: Tensor | None) -> Images:
        self._announce(part.drawing.call)
        pixels = self.pipe.stage.images.decode(state) if pixels is None else pixels
        images = self.pipe.complete(part.begun.call, pixels, part.drawing.request)
        return part.drawing.finished(images)

    def _denoise(self, stage: Stage, parts: Mapping[int, Part], wanted: Callable[[int], bool]) -> DenoiseFn:
        """Return the guided denoiser of a batch, which skips the rows of drawings that are not wanted."""
        everything = tuple(parts)
        rows = torch.arange(sum(part.n for part in parts.values()), device=stage.device)
        places = dict(zip(parts, rows.split([part.n for part in parts.values()]), strict=True))
        made = {everything: constrained_batch(stage, list(parts.values()))}

        def denoise(x: Tensor, t: Tensor) -> Denoised:
            kept = tuple(i for i in everything if wanted(i))
            if not kept:
                raise Unwanted
            if kept not in made:
                fewer = [parts[i] for i in kept]
                worth = 2 * sum(part.n for part in fewer) <= len(rows)  # a comparison takes a few evaluations
                same = self._same(stage, fewer, compare=worth)
                made[kept] = constrained_batch(stage, fewer) if same else made[everything]
            if made[kept] is made[everything]:
                return made[everything](x, t)
            index = torch.cat([places[i] for i in kept])
            d = made[kept](x[index], t if t.ndim == 0 else t[index])
            frac = None if d.var_frac is None else spread(d.var_frac, index, x)
            return Denoised(spread(d.x0, index, x), spread(d.eps, index, x), frac)

        return denoise

    def _same(self, stage: Stage, parts: Sequence[Part], *, compare: bool = True) -> bool:
        """Return whether the network gives each drawing the same bits in a batch as alone.

        Args:
            stage: What is sampled.
            parts: The drawings.
            compare: Whether to compare what was not compared before; False takes it as different.
        """
        total = sum(part.n for part in parts)
        longest = tuple(max(each) for each in zip(*(part.lengths for part in parts), strict=True))
        return self._equal(
            [(part.n, part.lengths, total, longest, part.kind) for part in parts],
            [part.n for part in parts],
            partial(raw_outputs, stage, parts),
            [partial(raw_outputs, stage, [part]) for part in parts],
            compare=compare,
        )

    def _equal(
        self,
        keys: Sequence[tuple[object, ...]],
        sizes: Sequence[int],
        together: Callable[[], list[Tensor]],
        alone: Sequence[Callable[[], list[Tensor]]],
        *,
        compare: bool = True,
    ) -> bool:
        """Return whether drawings have the same bits in a batch as alone.

        Args:
            keys: What decides it, for each drawing; one of each that is new is compared.
            sizes: Number of images of each.
            together: Computes outputs (K, B, ...) of the batch.
            alone: Compute those of each drawing, (K, n, ...).
            compare: See `_same`.
        """
        if not self.exact or len(keys) == 1:
            return True
        new = {key: i for i, key in enumerate(keys) if key not in self._compared}
        for way in (nullcontext, Cancelling) if new and compare else ():
            with way():
                rows = [out.split(list(sizes), dim=1) for out in together()]
                for key, i in new.items():
                    own = alone[i]()
                    same = [torch.equal(both[i], one) for both, one in zip(rows, own, strict=False)]
                    equal = all(same) and len(rows) == len(own)
                    self._compared[key] = equal and self._compared.get(key, True)
        return all(self._compared.get(key, False) for key in keys)


def attempt(work: Callable[[], _T], wanted: Callable[[], bool]) -> _T | Exception:
    """Return the result of the work on a drawing, or its error; it ends where the drawing is not wanted."""

    def check(done: int, total: int) -> None:
        if not wanted():
            raise Unwanted

    try:
        check(0, 0)
        with interruptible(check):
            return work()
    except Unwanted:
        return Unwanted()
    except Exception as error:
        return error


def is_plain(drawing: Deferred) -> bool:
    """Return whether a drawing is sampled at all, and nothing of its steps is kept."""
    request = drawing.request
    return not drawing.call.keep_steps and (request.given is None or request.strength > 0)


def guided_batch(stage: Stage, parts: Sequence[Part]) -> DenoiseFn:
    """Return the guided denoiser of several drawings in one batch."""
    conds, unconds = ([part.begun.pair[k] for part in parts] for k in (0, 1))
    pair = parts[0].begun.pair if len(parts) == 1 else (Cond.cat(conds), Cond.cat(unconds))
    request = parts[0].drawing.request
    return stage.guided(
        joined_call(parts), pair, window=request.window, image_guidance=request.image_guidance
    )


class Recorded(nn.Module):
    """A network whose outputs are kept.

    Attributes:
        outputs: What it has returned, in order.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.config = net, net.config
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return what the network returns."""
        out: Tensor = self.net(x, t, cond)
        self.outputs.append(out)
        return out


def raw_outputs(stage: Stage, parts: Sequence[Part]) -> list[Tensor]:
    """Return all that the network gives in the first evaluation of a batch of B images.

    Each tensor has shape (K, B, C, h, w) for K conditions. It is what the network returns: x0 may be clamped.
    """
    own = stage.denoiser
    net = Recorded(own.net)
    denoiser = Denoiser(net, own.schedule, own.prediction, learned_var=own.learned_var, quantize=own.quantize)
    x, t = joined_states(parts), parts[0].begun.over.grid.t[0]
    guided_batch(replace(stage, denoiser=denoiser), parts)(x, t)
    return [out.unflatten(0, (-1, len(x))) for out in net.outputs]


def constrained_batch(stage: Stage, parts: Sequence[Part]) -> DenoiseFn:
    """Return `guided_batch`, which keeps the known part of each state."""
    fn = guided_batch(stage, parts)
    given = [(part.drawing.request.known, part.n) for part in parts]
    pairs = [
        [value.expand(n, *value.shape[1:]) for value in known] for known, n in given if known is not None
    ]
    if not pairs:
        return fn
    latents, holes = (torch.cat(values) for values in zip(*pairs, strict=True))
    return keep_known(fn, stage.denoiser.schedule, latents, holes)


def can_join(parts: Sequence[Part]) -> bool:
    """Return whether the states and conditions of drawings have the fields and shapes of one batch."""
    shapes = {
        (part.kind, part.drawing.request.known is None, tuple(part.begun.over.grid.t.tolist()))
        for part in parts
    }
    return len(shapes) == 1 and all(Cond.can_cat([part.begun.pair[k] for part in parts]) for k in (0, 1))


def split_states(x: Tensor, parts: Sequence[Part]) -> Sequence[Tensor]:
    """Return the rows of each drawing."""
    return x.split([part.n for part in parts])


def decoded_rows(decode: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Return decoded states as the outputs that are compared, (1, B, 3, H, W)."""
    return [decode(x)[None]]


def joined_states(parts: Sequence[Part]) -> Tensor:
    """Return the first states of several drawings as one batch."""
    return torch.cat([part.begun.x for part in parts])


def joined_call(parts: Sequence[Part]) -> Call:
    """Return the calls of several drawings as one; all options but prompts and seeds are the first's."""
    calls = [part.begun.over for part in parts]
    if len(calls) == 1:
        return calls[0]
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
