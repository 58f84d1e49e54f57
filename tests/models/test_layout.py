"""Layouts: states and back, and exemplars where a layout has them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.models.layout import ThingLayout, layout_of_state, layout_state, multiplied, place_exemplars


def layout_of(*instances: tuple[float, float, float, float], owner: list[int]) -> ThingLayout:
    return ThingLayout(places=torch.tensor([instances]), owner=torch.tensor([owner]))


TWO = layout_of((0.25, 0.5, 0.4, 5.0), (0.75, 0.4, 0.5, -3.0), (0.0, 0.0, 0.0, 0.0), owner=[1, 0, -1])


def smooth_images(slots: int = 1, side: int = 64) -> Tensor:
    """Return opaque images that vary smoothly, (1, K, 4, S, S)."""
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    one = torch.stack([x, y, (x + y) / 2, torch.ones_like(x)])
    return one.expand(1, slots, 4, side, side)


def test_a_state_is_read_as_its_layout():
    state = layout_state(TWO, 2)
    assert state.shape == (1, 6, 1, 3)
    again = layout_of_state(state, 2)
    assert torch.equal(again.owner, TWO.owner)
    torch.testing.assert_close(again.places[0, :2], TWO.places[0, :2])
    assert abs(float(state[0, :4].mean())) < 2  # standardized


def test_every_thing_has_an_instance_and_others_have_none():
    state = layout_state(TWO, 2)
    state[0, 4:] = torch.tensor([[[-0.2, -0.9, -0.5]], [[-0.8, -0.3, -0.1]]])
    assert layout_of_state(state, 2).owner.tolist() == [[0, -1, 1]]
    assert layout_of_state(state, 1).owner.tolist() == [[0, -1, -1]]
    assert layout_of_state(state, 0).owner.tolist() == [[-1, -1, -1]]


def test_an_exemplar_that_fills_the_canvas_is_itself():
    image = torch.rand(1, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    placed = place_exemplars(image, layout_of((0.5, 0.5, 1.0, 0.0), owner=[0]), (32, 32))
    torch.testing.assert_close(placed, image)


@pytest.mark.parametrize(("side", "tilt"), [(0.5, 0.0), (0.3, 0.0), (0.6, 8.0), (0.24, -20.0)])
def test_a_point_of_the_canvas_shows_the_point_of_the_exemplar_that_lies_there(side, tilt):
    h, w = 96, 128
    x, y = 0.4, 0.6
    placed = place_exemplars(smooth_images(), layout_of((x, y, side, tilt), owner=[0]), (h, w))[0, 0]
    angle = math.radians(tilt)
    for u, v in ((0.5, 0.5), (0.3, 0.6), (0.7, 0.35)):
        # from the centre: to the right and upwards, turned counterclockwise
        right, up = (u - 0.5) * side * h, (0.5 - v) * side * h
        column = x * w + right * math.cos(angle) - up * math.sin(angle)
        row = y * h - (right * math.sin(angle) + up * math.cos(angle))
        seen = placed[:, int(row), int(column)]
        nearest = 1.5 / (side * h)  # of pixels to points, as a fraction of the exemplar
        assert abs(float(seen[0]) - u) < nearest and abs(float(seen[1]) - v) < nearest
    assert abs(float(placed[3].sum()) / (side * h) ** 2 - 1) < 0.02


def test_instances_of_a_thing_share_its_slot_and_absent_ones_are_not_drawn():
    places = ((0.25, 0.25, 0.4, 0.0), (0.75, 0.75, 0.4, 0.0), (0.5, 0.5, 0.9, 0.0))
    placed = place_exemplars(smooth_images(2), layout_of(*places, owner=[1, 1, -1]), (64, 64))[0]
    assert not placed[0].any()
    assert abs(float(placed[1, 3].sum()) / 64**2 - 2 * 0.16) < 0.01
    nothing = place_exemplars(smooth_images(2), layout_of(*places, owner=[-1, -1, -1]), (64, 64))
    assert not nothing.any()


def test_a_shrunk_exemplar_is_not_aliased():
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    image = torch.stack([board.float()] * 3 + [torch.ones(64, 64)])[None, None]
    placed = place_exemplars(image, layout_of((0.5, 0.5, 1.0, 0.0), owner=[0]), (16, 16))
    torch.testing.assert_close(placed[0, 0, :3], torch.full((3, 16, 16), 0.5))


def test_a_layout_does_not_depend_on_its_batch():
    images = torch.rand(3, 2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    layout = ThingLayout(places=TWO.places.repeat(3, 1, 1), owner=TWO.owner.repeat(3, 1))
    layout.places[1, :, 0] += 0.1
    together = place_exemplars(multiplied(images), layout, (32, 32))
    for i in range(3):
        part = slice(i, i + 1)
        assert torch.equal(place_exemplars(multiplied(images[part]), layout[part], (32, 32))[0], together[i])
