"""Editing by words: an image of one prompt is changed into what another says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.denoiser import denoise_both
from ldm.diffusion.guidance import lerp
from ldm.diffusion.interfaces import Denoised, DenoiseFn
from ldm.images.pixels import ImageInput
from ldm.images.result import Images
from ldm.pipelines.call import Call
from ldm.pipelines.checks import check_emphasis, check_unit_interval
from ldm.pipelines.conditions import expanded_pair
from ldm.pipelines.prompt_to_prompt import SourceAttention, align
from ldm.pipelines.protocol import LatentPipeline, Request
from ldm.pipelines.tasks.inversion import draw_inverted, invert

CROSS, WITHIN = 0.8, 0.4  # shares of the run in which attention is the source's, without an image


@dataclass(frozen=True, kw_only=True)
class Lead:
    """How attention of the source leads that of the edited image (Prompt-to-Prompt, Hertz et al. 2022).

    Attributes:
        source: Prompt that describes the source.
        cross: Share of the run, from its start, in which attention to shared words is the source's.
        within: Share of the run in which attention between positions is the source's.
        emphasis: Factors of the attention to words of the prompt.
        given: Whether the source is a given image, which is not guided.
    """

    source: str
    cross: float
    within: float
    emphasis: Mapping[str, float]
    given: bool

    @classmethod
    def settle(
        cls,
        source: str,
        cross: float | None,
        within: float | None,
        emphasis: Mapping[str, float] | None,
        *,
        given: bool,
    ) -> Lead:
        """Return the lead of an edit; shares that are None take their defaults. See `edit`."""
        cross = CROSS * (not given) if cross is None else cross
        within = WITHIN * (not given) if within is None else within
        check_unit_interval(cross=cross, within=within)
        factors = check_emphasis({} if emphasis is None else emphasis)
        return cls(source=source, cross=cross, within=within, emphasis=factors, given=given)

    @property
    def facts(self) -> dict[str, Any]:
        """The lead as a recipe states it."""
        return {
            "source": self.source,
            "cross": self.cross,
            "within": self.within,
            "emphasis": dict(self.emphasis),
        }


@torch.no_grad()
def edit(
    pipe: LatentPipeline,
    source: str,
    prompt: str,
    *,
    image: ImageInput | None = None,
    cross: float | None = None,
    within: float | None = None,
    emphasis: Mapping[str, float] | None = None,
    strength: float = 0.8,
    exact: bool = True,
    iterations: int = 4,
    **options: Any,
) -> Images:
    """Change an image that `source` describes into what `prompt` says.

    Without an image, the source is what the seed makes of `source`. With one, the image is inverted under
    `source` without guidance, and sampled from there under `prompt`. Attention holds the image together
    (Prompt-to-Prompt, Hertz et al. 2022).

    Args:
        source: Prompt that describes the source.
        prompt: Prompt that describes the result.
        image: The image to edit; see `ldm.images.pixels.to_pixels`. Default: what the seed makes of `source`.
        cross: Share of the run in which attention to the words that both prompts have, or that stand in each
            other's place, is the source's. Default: 0.8 without an image, else 0.
        within: Share of the run in which attention between positions is the source's. Default: 0.4 without an
            image, else 0.
        emphasis: Factors of the attention to words of `prompt`, by word.
        strength: With an image, the part of the grid that is inverted, in (0, 1]; less keeps more of it.
        exact, iterations: How an image is inverted, as in `reconstruct`.
        options: Options of `text_to_image`; with an image there are 50 steps by default.

    Raises:
        ValueError: If a share is outside [0, 1], a word is not in the prompt, or attention cannot be
            controlled in this model.
    """
    lead = Lead.settle(source, cross, within, emphasis, given=image is not None)
    if image is None:
        return _edit_seed(pipe, prompt, lead, options)
    inverted = invert(
        pipe,
        image,
        source=source,
        prompt=prompt,
        exact=exact,
        iterations=iterations,
        strength=strength,
        **options,
    )
    call, facts = inverted.call, {**lead.facts, "strength": strength, "exact": exact}
    if not (lead.cross or lead.within or lead.emphasis):
        pair = pipe.paired(call, Request(task="edit"))
        return draw_inverted(pipe, "edit", inverted, pipe.stage.guided(call, pair), facts)
    with led_by_source(pipe, call, lead, inverted.tracks[0]) as (_, denoise):
        doubled = replace(inverted, tracks=[torch.cat([x, x]) for x in inverted.tracks])
        return draw_inverted(pipe, "edit", doubled, denoise, facts)


def _edit_seed(pipe: LatentPipeline, prompt: str, lead: Lead, options: Mapping[str, Any]) -> Images:
    """Edit what the seed makes of the source."""
    stage = pipe.stage
    call, x = stage.begin(pipe.settle(prompt, **options))
    with led_by_source(pipe, call, lead, x) as (pair, denoise):
        x = stage.solve(pair, denoise, torch.cat([x, x]))[len(x) :]
    return pipe.finish_images(call, stage.images.decode(x), Request(task="edit", facts=lead.facts))


@contextmanager
def led_by_source(
    pipe: LatentPipeline, call: Call, lead: Lead, x: Tensor
) -> Iterator[tuple[Call, DenoiseFn]]:
    """Within it, attention of the call's images is led by that of their sources.

    Args:
        pipe: The pipeline.
        call: The call of B images.
        lead: How attention is led.
        x: States (B, C, h, w), for their size.

    Yields:
        The call of 2·B images, the sources first, and its guided denoiser.
    """
    stage, n = pipe.stage, len(call.seeds)
    if call.controls:
        raise ValueError(
            "controls: an edit with attention of the source takes none; expected cross=0, within=0"
        )
    if not hasattr(pipe.text, "places"):
        raise ValueError(
            f"{stage.name!r} does not read words that can be found again, so attention cannot be"
            " controlled: cross=0, within=0"
        )
    if len(set(call.prompts)) > 1:
        raise ValueError(f"prompt: expected one text to change the source into, got {list(call.prompts)}")
    negative = call.negative if isinstance(call.negative, str) else call.negative * 2
    prompts = (lead.source,) * n + call.texts
    pair = replace(call, prompts=prompts, negative=negative, seeds=call.seeds * 2)
    cond, uncond = expanded_pair(pipe.conditions(pair, (x.shape[-2], x.shape[-1])), 2 * n)
    assert cond.context is not None
    places = pipe.text.places(lead.source), pipe.text.places(call.texts[0])
    alignment = align(*places, cond.context.shape[1], lead.emphasis)
    control = SourceAttention(alignment=alignment, count=n, cross=lead.cross, within=lead.within)
    scale = torch.full((2 * n, 1, 1, 1), call.guidance, device=stage.device, dtype=torch.float32)
    if lead.given:
        scale[:n] = 1.0
    denoiser = stage.quantized(call)

    def fn(x_t: Tensor, t: Tensor) -> Denoised:
        with_words, without = denoise_both(denoiser, x_t, t, cond, uncond)
        return lerp(without, with_words, scale.to(x_t.dtype))

    with control.over(denoiser.net):
        yield pair, control.watch(fn, call.grid.t)
