"""Layouts that fit an image, with a denoiser that shows exemplars where they lie."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_exemplars import CELL, tiny_conditioner
from torch import Tensor, nn

from ldm.conditioning.exemplars import ExemplarConditioner, PlacedThings
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.layout import ThingLayout
from ldm.pipelines.layouts import LayoutFit, displaced, fitted_condition, framed

SIZE = (4, 4)


class Shown(nn.Module):
    """A network whose prediction of x0 is the canvas, averaged over cells."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.exemplars is not None
        return F.avg_pool2d(cond.exemplars.sum(1), CELL).to(x_t)


def denoiser() -> Denoiser:
    return Denoiser(Shown(), NoiseSchedule.make("cosine", 100), "x0")


def latent_of(cond: Cond) -> Tensor:
    assert cond.exemplars is not None
    return F.avg_pool2d(cond.exemplars.sum(1), CELL)


def hidden(net: ExemplarConditioner, prompt: str, size: tuple[int, int] = SIZE) -> tuple[Tensor, ThingLayout]:
    """Return the latent of a layout that the prior draws, displaced, and the layout."""
    read = net.read(prompt)
    things = displaced(net.draw_things([read], [1234])[0], 0.03, 5, 0)
    return latent_of(net.condition(read, [things], size)), things.layout


@pytest.mark.parametrize("prompt", ["a fluent cat", "a cat and a dog"])
def test_the_fit_explains_the_image_better_than_the_seed(prompt):
    net = tiny_conditioner()
    known, _ = hidden(net, prompt)
    hole = torch.zeros(1, 1, *SIZE)
    for seed in (1, 5):  # whose own layouts are other ones
        own = latent_of(net([prompt], SIZE, seeds=[seed]))
        fit = latent_of(fitted_condition(LayoutFit(text=net, denoiser=denoiser()), prompt, seed, known, hole))
        assert (fit - known).square().mean() < 0.2 * (own - known).square().mean()


def test_what_is_not_known_does_not_count():
    net = tiny_conditioner()
    known, _ = hidden(net, "a fluent cat")
    hole = torch.zeros(1, 1, *SIZE)
    hole[..., 2:] = 1
    other = torch.where(hole > 0, known + 5, known)
    fits = [
        fitted_condition(LayoutFit(text=net, denoiser=denoiser()), "a fluent cat", 3, each, hole)
        for each in (known, other)
    ]
    assert fits[0].exemplars is not None and fits[1].exemplars is not None
    assert torch.equal(fits[0].exemplars, fits[1].exemplars)


def test_without_things_or_knowledge_the_condition_is_the_seeds_own():
    net = tiny_conditioner()
    known = torch.rand(1, 4, *SIZE)
    for prompt, hole in (
        ("on a blue background", torch.zeros(1, 1, *SIZE)),
        ("a cat", torch.ones(1, 1, *SIZE)),
    ):
        fit, own = (
            fitted_condition(LayoutFit(text=net, denoiser=denoiser()), prompt, 3, known, hole),
            net([prompt], SIZE, seeds=[3]),
        )
        assert torch.equal(fit.exemplars, own.exemplars) and torch.equal(fit.context, own.context)


def test_a_layout_lies_where_a_longer_canvas_is_known():
    places = torch.tensor([[[0.5, 0.25, 0.8, 3.0]]])
    things = PlacedThings(
        images=torch.zeros(1, 1, 4, 8, 8), layout=ThingLayout(places=places, owner=torch.zeros(1, 1))
    )
    hole = torch.ones(1, 1, 4, 12)
    hole[..., 8:] = 0  # known on the right
    framed_places = framed(things, hole).layout.places
    torch.testing.assert_close(framed_places, torch.tensor([[[10 / 12, 0.25, 0.8, 3.0]]]))
    torch.testing.assert_close(framed(things, torch.zeros(1, 1, 4, 4)).layout.places, places)
