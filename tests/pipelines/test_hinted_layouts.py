"""Layouts that agree with a hint of edges, on a library of plain shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_exemplars import NAMES, STYLES, tiny_conditioner
from torch import Tensor

from ldm.catalog.control_cards import CONTROL_CARDS, control_card
from ldm.conditioning.exemplar_library import Exemplar, ExemplarLibrary, write_exemplar
from ldm.conditioning.exemplars import ExemplarConditioner, PlacedThings
from ldm.diffusion.cond import Cond
from ldm.pipelines.control.control_use import Control, ControlUse
from ldm.pipelines.control.hinted_layouts import (
    SLOPE,
    blurred,
    edges,
    hinted_condition,
    hinted_conditions,
)
from ldm.pipelines.layouts import displaced

SIDE, SIZE = 32, (16, 16)  # of an exemplar in pixels; of the latent, whose canvas has 64×64 pixels


def shape_of(name: str, style: str) -> Tensor:
    """Return an opaque box whose sides depend on the name and the style, (4, S, S)."""
    image = torch.zeros(4, SIDE, SIDE)
    up, across = 3 + 3 * NAMES.index(name), 3 + 4 * STYLES.index(style)
    image[:, up : SIDE - up, across : SIDE - across] = 1
    return image


@pytest.fixture(scope="module")
def net() -> ExemplarConditioner:
    made = tiny_conditioner()
    images = [
        Exemplar(name=name, style=style, content=write_exemplar(shape_of(name, style)))
        for name in NAMES
        for style in STYLES
    ]
    made.library = ExemplarLibrary(images, {}, size=SIDE)
    return made


def canvas_of(cond: Cond) -> Tensor:
    assert cond.exemplars is not None
    return cond.exemplars


def shown(cond: Cond) -> Tensor:
    """Return the opacity of all things together, as edges do not say whose they are."""
    return canvas_of(cond)[:, :, 3].amax(1)


def lines_of(cond: Cond) -> Tensor:
    """Return the edges of a condition's canvas, (1, 1, H, W) of 0 and 1."""
    return (edges(canvas_of(cond).flatten(1, 2)) > 0.5).float()


def hidden(net: ExemplarConditioner, prompt: str) -> Cond:
    """Return the condition of a layout that the prior draws, displaced."""
    read = net.read(prompt)
    things = displaced(net.draw_things([read], [1234])[0], 0.05, 5, 0)
    return net.condition(read, [things], SIZE)


@pytest.mark.parametrize(
    ("prompt", "left"), [("a fluent cat", 0.3), ("a cat", 0.3), ("a cat and a dog", 0.5)]
)
def test_the_layout_agrees_with_the_hint(net: ExemplarConditioner, prompt: str, left: float) -> None:
    wanted = hidden(net, prompt)
    for seed in (1, 5):  # whose own layouts are other ones
        own = net([prompt], SIZE, seeds=[seed])
        found = hinted_condition(net, prompt, seed, lines_of(wanted), SIZE)
        errors = [(shown(each) - shown(wanted)).square().mean() for each in (own, found)]
        assert errors[1] < left * errors[0]


def test_without_things_or_lines_the_condition_is_the_seeds_own(net: ExemplarConditioner) -> None:
    lines = lines_of(hidden(net, "a cat"))
    for prompt, hint in (("on a blue background", lines), ("a cat", torch.zeros_like(lines))):
        found, own = hinted_condition(net, prompt, 3, hint, SIZE), net([prompt], SIZE, seeds=[3])
        assert torch.equal(canvas_of(found), canvas_of(own)) and torch.equal(found.context, own.context)


def use(hint: Tensor, card: str = "canny", **options: Any) -> ControlUse:
    loaded: Any = SimpleNamespace(card=CONTROL_CARDS[card])
    return ControlUse(option=Control("edges", hint, **options), loaded=loaded, hint=hint)


def call(*controls: ControlUse, texts: tuple[str, ...] = ("a cat",), seeds: tuple[int, ...] = (7,)) -> Any:
    return SimpleNamespace(controls=controls, texts=texts, seeds=seeds)


def test_a_layout_does_not_depend_on_the_batch(net: ExemplarConditioner) -> None:
    hints = torch.cat([lines_of(hidden(net, prompt)) for prompt in ("a cat", "a dog")])
    texts, seeds = ("a cat", "a dog"), (7, 8)
    both = hinted_conditions(net, call(use(hints.expand(-1, 3, -1, -1)), texts=texts, seeds=seeds), SIZE)
    assert both is not None
    for i in range(2):
        one = use(hints[i : i + 1].expand(-1, 3, -1, -1))
        alone = hinted_conditions(net, call(one, texts=texts[i : i + 1], seeds=seeds[i : i + 1]), SIZE)
        assert alone is not None and torch.equal(canvas_of(alone)[0], canvas_of(both)[i])


def test_a_hint_for_all_images_and_the_sum_of_several_hints(net: ExemplarConditioner) -> None:
    lines = lines_of(hidden(net, "a cat"))
    left, right = lines.clone(), lines.clone()
    left[..., 32:], right[..., :32] = 0, 0
    texts, seeds = ("a cat", "a cat"), (7, 7)
    whole = hinted_conditions(net, call(use(lines), texts=texts, seeds=seeds), SIZE)
    halves = hinted_conditions(net, call(use(left), use(right), texts=texts, seeds=seeds), SIZE)
    assert whole is not None and halves is not None
    assert torch.equal(canvas_of(whole), canvas_of(halves))
    assert torch.equal(canvas_of(whole)[0], canvas_of(whole)[1])


@pytest.mark.parametrize(
    ("card", "options"),
    [("tile", {}), ("openpose", {}), ("canny", {"strength": 0}), ("canny", {"start": 0.5})],
)
def test_other_hints_leave_the_layout_to_the_seed(
    net: ExemplarConditioner, card: str, options: dict[str, Any]
) -> None:
    lines = lines_of(hidden(net, "a cat"))
    assert hinted_conditions(net, call(use(lines, card, **options)), SIZE) is None
    assert hinted_conditions(net, call(), SIZE) is None


def test_cards_with_edges_have_lines_and_follow_what_a_training_states() -> None:
    assert {card.name for card in CONTROL_CARDS.values() if card.edges} == {
        "canny",
        "softedge",
        "scribble",
        "lineart",
    }
    assert all(card.lines for card in CONTROL_CARDS.values() if card.edges)
    assert control_card(None, "mine.safetensors").name == "image"
    assert control_card(None, "mine.safetensors", "soft_edge").name == "softedge"
    assert control_card(None, "depth.safetensors", "files").name == "depth"
    assert control_card("tile", "mine.safetensors", "canny").name == "tile"


def test_a_step_is_an_edge_and_a_plane_is_none() -> None:
    image = torch.ones(1, 2, 9, 9)
    assert torch.equal(edges(image)[..., 2:-2, 2:-2], torch.zeros(1, 1, 5, 5))
    image[..., 5:] = 0  # the slope of each channel is 1/2 on both sides
    wanted = 0.5 / (0.5 + SLOPE**2)
    torch.testing.assert_close(edges(image)[0, 0, 4, 4:6], torch.full((2,), wanted))
    assert float(edges(image)[0, 0, 4, 7]) == 0


def test_a_blur_is_a_gaussian() -> None:
    image = torch.zeros(1, 1, 33, 33)
    image[..., 16, 16] = 1
    found, sigma = blurred(image, 2.0)[0, 0], 2.0
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    x = torch.arange(33) - 16.0
    assert float((found.sum(0) * x.square()).sum()) == pytest.approx(sigma**2, rel=0.03)  # cut off at 3 sigma
    torch.testing.assert_close(found, found.T)


def test_placed_things_of_a_prompt_are_those_that_it_names(net: ExemplarConditioner) -> None:
    """The exemplar that agrees with the hint is found where the prompt leaves it open."""
    read = net.read("a cat")
    things = net.draw_things([read], [0])[0]
    flat = PlacedThings(
        images=torch.stack([shape_of("cat", "flat"), torch.zeros(4, SIDE, SIDE)])[None], layout=things.layout
    )
    wanted = net.condition(read, [flat], SIZE)
    found = hinted_condition(net, "a cat", 3, lines_of(wanted), SIZE)
    assert float(F.mse_loss(canvas_of(found), canvas_of(wanted))) < 0.02
