"""The training of views: placements as maps, and the losses in closed form."""

from __future__ import annotations

import math

import numpy as np
import torch
from einops import rearrange

from ldm.data import PALETTE, EmojiData, Mix, Placement, render, sample_scene
from ldm.data.facts import Facts, Thing
from ldm.data.layout import Scene
from ldm.diffusion.cond import Cond
from ldm.models.dit import DiT, DiTConfig
from ldm.models.exemplars import multiplied
from ldm.models.views import Sight, exemplar_planes, sample_patches, token_centres
from ldm.training.draws import Draws
from ldm.training.losses.sights import record_sights, sight_losses, wanted_sights


def test_the_wanted_sights_show_what_the_scene_shows(folder):
    """Composed by the wanted sights over the background, exemplars are the rendered image within 25 dB."""
    data = EmojiData.open(folder)
    size, rng = data.images.shape[1], np.random.default_rng(0)
    side = size // 8
    mix = Mix(two=0.4, count=0.3, colour=0)
    for _ in range(30):
        scene = sample_scene(rng, data.index, mix)
        order = list(range(len(scene.facts.things)))
        images = np.stack([data.images[scene.rows(thing)[0]] for thing in order])
        pixels = multiplied(torch.from_numpy(images).movedim(-1, 1).float() / 255)[None]
        maps, touched = wanted_sights([scene], [order], side, len(order))
        found = Sight(maps=maps, shown=touched.float() * 100 - 50)
        patches = sample_patches(found, exemplar_planes(pixels), side, side, 8)
        seen = rearrange(patches[0], "(h w) c y x -> (h y) (w x) c", h=side)
        background = torch.tensor(PALETTE[scene.facts.background or "white"]) / 255
        made = seen[..., :3] + (1 - seen[..., 3:]) * background
        wanted = torch.from_numpy(render(scene, data.images, size)).float() / 255
        assert -10 * math.log10(float((made - wanted).square().mean())) > 25


def scene_of(*placements: Placement) -> Scene:
    thing = Thing(name="cat")
    return Scene(facts=Facts(things=(thing,), count=len(placements)), placements=placements)


def test_a_token_draws_the_nearest_of_several():
    left = Placement(thing=0, row=0, x=0.25, y=0.5, side=0.5)
    right = Placement(thing=0, row=0, x=0.75, y=0.5, side=0.5)
    maps, touched = wanted_sights([scene_of(left, right), None], [[0], []], 4, 2)
    centres = token_centres(4, 4)
    middle = torch.where(centres[:, 0] < 0.5, 0.25, 0.75)
    rows = (centres[:, 1] > 0.25) & (centres[:, 1] < 0.75)
    assert torch.allclose(maps[0, rows, 0, 0], 0.5 + ((centres[:, 0] - middle) / 0.5)[rows])
    assert torch.allclose(maps[0, :, 0, 2], torch.tensor(2.0))
    assert torch.equal(touched[0, :, 0], rows)
    assert not touched[0, :, 1].any() and not touched[1].any()


def test_the_losses_in_closed_form():
    maps, touched = torch.zeros(1, 2, 1, 4), torch.tensor([[[True], [False]]])
    found = Sight(maps=torch.tensor([[[[0.5, 0.0, 0.0, 0.02]], [[9.0] * 4]]]), shown=torch.zeros(1, 2, 1))
    losses = sight_losses([found, found], maps, touched, 4, Draws(0, range(len(maps))))
    # u: |4 · 0.5| − 0.05; b: 0.02² / (2 · 0.1)
    assert torch.allclose(losses["where"], torch.tensor((1.95 + 0.002) / 4))
    assert torch.allclose(losses["shown"], torch.tensor(math.log(2)))
    none = sight_losses([found], maps, torch.zeros_like(touched), 4, Draws(0, range(len(maps))))
    assert float(none["where"]) == 0


def test_sights_are_recorded_in_order_and_only_in_the_context():
    shape = {"in_channels": 3, "out_channels": 3, "width": 8, "head_dim": 8, "context_dim": 6}
    net = DiT(DiTConfig(**shape, depth=3, views=(0, 2), cell=2))
    cond = Cond(context=torch.zeros(1, 1, 6), exemplars=torch.zeros(1, 2, 4, 8, 8))
    x, t = torch.zeros(1, 3, 4, 4), torch.zeros(1)
    net.views[1].look.proj_out.bias.data.fill_(3.0)
    with record_sights(net) as sights:
        net(x, t, cond)
    net(x, t, cond)
    assert [sight.shown[0, 0, 0].item() for sight in sights] == [0.0, 0.0, 3.0, 3.0]
