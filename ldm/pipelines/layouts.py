"""Layouts of exemplars that fit what is known of an image.

Without an image, a seed draws the layout of a prompt's things from the prior p(layout | text). Given an
image, the posterior is p(layout | text)·p(image | layout, text). Candidates are drawn from the prior, and the
denoiser's squared error at noised states measures how well each of them explains the image (after Li et al.
2023, "Your diffusion model is secretly a zero-shot classifier"). The best ones are displaced and compared
again, by ever less. Exemplars that the prompt leaves open are chosen in the same way. A decoder of tokens
measures by the probability of the known tokens (`ldm.pipelines.dalle.token_fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.conditioning.exemplars import ExemplarConditioner, PlacedThings
from ldm.conditioning.read_prompts import ReadPrompt
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import keyed_normal
from ldm.models.layout import ThingLayout
from ldm.pipelines.call import Call
from ldm.pipelines.drafts import window_start
from ldm.pipelines.protocol import Known, Request

CANDIDATES, BEST = 32, 4
ROUNDS = (0.04, 0.015, 0.006, 0.002)  # displacements, as fractions of the canvas
TIMES = (0.4, 0.65)  # noise levels at which candidates are compared, as fractions of the training timesteps
FIRST_DRAW = 1 << 61
"""The number of the first draw that belongs to the fit, among the keyed draws of a seed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExemplarFit:
    """What layouts are fitted with.

    Attributes:
        text: The conditioner.
        vector: The image embedding (E,) that is a condition too, of a decoder of unCLIP. Default: None.
    """

    text: ExemplarConditioner
    vector: Tensor | None = None

    def condition(self, read: ReadPrompt, things: Sequence[PlacedThings], size: tuple[int, int]) -> Cond:
        """Return the conditions of a prompt with B choices of what it leaves open."""
        cond = self.text.condition(read, things, size)
        return cond if self.vector is None else replace(cond, image_emb=self.vector.expand(len(things), -1))

    def errors(self, cond: Cond, seed: int, known: Tensor, hole: Tensor) -> Tensor:
        """Return how badly each of B conditions explains the known part of an image, (B,) float32.

        Args:
            cond: The conditions.
            seed: Seed of random numbers.
            known: What is known, (1, C, h, w).
            hole: 1 where it is not known, else 0, (1, 1, h, w).
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class LayoutFit(ExemplarFit):
    """A fit by the squared error of a denoiser at noised states.

    Attributes:
        denoiser: The denoiser.
    """

    denoiser: Denoiser

    def errors(self, cond: Cond, seed: int, known: Tensor, hole: Tensor) -> Tensor:
        """Return the errors of B conditions; see `ExemplarFit.errors`."""
        assert cond.exemplars is not None
        denoiser, count = self.denoiser, len(cond.exemplars)
        errors = torch.zeros(count, dtype=torch.float32, device=known.device)
        for k, time in enumerate(TIMES):
            t = torch.tensor(round(time * (len(denoiser.schedule) - 1)), device=known.device)
            eps = keyed_normal(seed, FIRST_DRAW + k, known.shape[1:]).to(known)[None]
            x_t = denoiser.schedule.add_noise(known, t.expand(1), eps).expand(count, *known.shape[1:])
            wrong = (denoiser(x_t, t, cond).x0 - known).square() * (1 - hole)
            errors += wrong.flatten(1).sum(1)
        return errors


def known_of(request: Request, encode: Callable[[Tensor], Tensor]) -> Known | None:
    """Return what a request knows of the images, in the space of the states; None if it knows nothing."""
    known = request.draft or request.known
    if known is None and request.given is not None and request.strength < 1:
        latent = encode(request.given)
        known = Known(latent, torch.zeros_like(latent[:1, :1]))
    return known


def fitted_conditions(
    text: ExemplarConditioner, denoiser: Denoiser, call: Call, known: Known, vectors: Tensor | None = None
) -> Cond:
    """Return the conditions of a call's B prompts, each in the layout that fits the known part of its image.

    Args:
        text: The conditioner.
        denoiser: The denoiser.
        call: The call.
        known: What is known of the images.
        vectors: Image embeddings (B, E), which are conditions too, of a decoder of unCLIP. Default: None.
    """
    conds = []
    for i, (prompt, seed) in enumerate(zip(call.texts, call.seeds, strict=True)):
        latent, hole = (value[i : i + 1] if len(value) > 1 else value for value in known)
        fit = LayoutFit(text=text, denoiser=denoiser, vector=None if vectors is None else vectors[i])
        conds.append(fitted_condition(fit, prompt, seed, latent, hole))
    return Cond.cat(conds)


@torch.no_grad()
def fitted_condition(fit: ExemplarFit, prompt: str, seed: int, known: Tensor, hole: Tensor) -> Cond:
    """Return the condition of a prompt, in the layout that fits the known part of a latent best.

    Args:
        fit: What layouts are fitted with.
        prompt: The prompt.
        seed: Seed of the candidates.
        known: Latent, or tokens, (1, C, h, w).
        hole: 1 where it is not known, else 0, (1, 1, h, w).

    Returns:
        A condition of batch size 1. Where the prompt names nothing, or nothing is known, it is the seed's.
    """
    text, vector = fit.text, fit.vector
    read = text.read(prompt) if vector is None else text.read_seen(prompt, vector)
    size = (known.shape[-2], known.shape[-1])

    def draw(seeds: Sequence[int]) -> list[PlacedThings]:
        return text.draw_things([read] * len(seeds), seeds, None if vector is None else [vector] * len(seeds))

    if not read.things or bool(hole.all()):
        return fit.condition(read, draw([seed]), size)
    drawn = draw([seed, *(derived_seed(seed, i) for i in range(1, CANDIDATES))])
    best = _best(fit, read, [framed(things, hole) for things in drawn], seed, known, hole)
    for number, spread in enumerate(ROUNDS):
        tried = [
            displaced(things, spread, seed, (number * BEST + i) * CANDIDATES + j)
            for i, things in enumerate(best)
            for j in range(CANDIDATES // BEST)
        ]
        best = _best(fit, read, [*best, *tried], seed, known, hole)
    return fit.condition(read, best[:1], size)


def _best(
    fit: ExemplarFit,
    read: ReadPrompt,
    things: Sequence[PlacedThings],
    seed: int,
    known: Tensor,
    hole: Tensor,
) -> list[PlacedThings]:
    """Return the candidates of the least error over the known part, the best first."""
    cond = fit.condition(read, things, (known.shape[-2], known.shape[-1]))
    errors = fit.errors(cond, seed, known, hole)
    return [things[i] for i in errors.argsort()[:BEST].tolist()]


def framed(things: PlacedThings, hole: Tensor) -> PlacedThings:
    """Return things of a square canvas on the part of a longer one that the known part lies in.

    Args:
        things: The things.
        hole: 1 where the latent is not known, else 0, (1, 1, h, w).
    """
    h, w = hole.shape[-2:]
    tile = min(h, w)
    known = (hole == 0)[0, 0]
    top, left = window_start(known.any(dim=1), tile), window_start(known.any(dim=0), tile)
    x, y, side, tilt = things.layout.places.unbind(-1)
    places = torch.stack([(left + x * tile) / w, (top + y * tile) / h, side, tilt], dim=-1)
    return replace(things, layout=ThingLayout(places=places, owner=things.layout.owner))


def displaced(things: PlacedThings, spread: float, seed: int, draw: int) -> PlacedThings:
    """Return things with random displacements: `spread` times the canvas, their size, and a radian."""
    layout = things.layout
    drawn = spread * keyed_normal(seed, FIRST_DRAW + len(TIMES) + draw, layout.places.shape[1:])
    dx, dy, larger, turned = drawn.to(layout.places).unbind(-1)  # (M,) each
    x, y, side, tilt = layout.places.unbind(-1)  # (1, M) each
    places = torch.stack([x + dx, y + dy, side * (1 + larger), tilt + turned.rad2deg()], dim=-1)
    return replace(things, layout=ThingLayout(places=places, owner=layout.owner))


def derived_seed(seed: int, number: int) -> int:
    """Return another seed, a function of a seed and a number."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % (1 << 63)
