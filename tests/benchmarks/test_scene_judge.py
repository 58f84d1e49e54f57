"""Test the judge of scenes: its search against plain sums, and what it must and must not accept."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scene_fit import SceneFit, seen_background, smooth
from scene_gallery import SceneGallery, rgb
from scene_judge import SceneJudge, extra_area, relation_of
from scene_search import GRID, correlate, gains, peaks, pyramid, refine, sample

from ldm.data import PALETTE, Facts, Placement, Scene, Thing, draw_layout, render


@pytest.fixture(scope="module")
def judge(drawn):
    return SceneJudge(drawn)


def thing(name, **more):
    return Thing(name=name, **more)


def scene_of(drawn, facts, seed=0):
    return draw_layout(facts, drawn.index, np.random.default_rng(seed))


def image_of(drawn, facts, seed=0, size=128):
    return render(scene_of(drawn, facts, seed), drawn.images, size)


PAIR = (thing("red-disc"), thing("blue-box"))
RIGHT = [
    Facts(things=(thing("cat-face"),)),
    Facts(things=(thing("ring", style="twemoji"),), background="blue"),
    Facts(things=(thing("old-cross"),), small=True),
    Facts(things=(thing("cat-face", colour="purple"),), background="yellow"),
    *(Facts(things=(thing("ring"),), place=place) for place in ("centre", "top left", "bottom", "right")),
    *(Facts(things=(thing("green-bar"),), count=count, background="pink") for count in (2, 3, 4)),
    *(Facts(things=PAIR, relation=relation) for relation in ("and", "beside", "left", "right", "above")),
    Facts(things=(thing("ring", colour="green"), thing("cat-face", colour="blue")), relation="below"),
]


@pytest.mark.parametrize("facts", RIGHT, ids=str)
def test_scenes_of_the_data_are_right(drawn, judge, facts):
    for seed in range(2):
        scene = scene_of(drawn, facts, seed)
        verdict = judge(render(scene, drawn.images, 128), facts)
        assert verdict.faults == () and verdict.is_right
        assert verdict.background == (facts.background or "white")
        # the places are found to a pixel, and the images themselves
        expected = sorted(scene.placements, key=lambda place: (place.thing, place.x, place.y))
        found = sorted(
            (p.placement for p in verdict.parts), key=lambda place: (place.thing, place.x, place.y)
        )
        for one, other in zip(found, expected, strict=True):
            assert (one.thing, one.row) == (other.thing, other.row)
            assert math.hypot(one.x - other.x, one.y - other.y) < 1 / 128
            assert abs(one.side - other.side) < 0.03


@pytest.mark.parametrize("size", [64, 96, 256])
def test_other_sizes_are_judged(drawn, judge, size):
    facts = RIGHT[-1]
    assert judge(image_of(drawn, facts, size=size), facts).is_right


def test_noise_is_tolerated(drawn, judge):
    rng = np.random.default_rng(0)
    for facts in RIGHT[::3]:
        image = image_of(drawn, facts, 1)
        noisy = (image + rng.normal(0, 6, image.shape)).round().clip(0, 255).astype(np.uint8)
        assert judge(noisy, facts).faults == ()


def changed(facts, **changes):
    return dataclasses.replace(facts, **changes)


COUNTED, COLOURED = RIGHT[9], RIGHT[-1]
LEFT = Facts(things=PAIR, relation="left")
WRONG = [
    (RIGHT[0], changed(RIGHT[0], background="red"), "background"),
    (RIGHT[0], changed(RIGHT[0], things=(thing("green-bar"),)), "absent"),
    (RIGHT[0], changed(RIGHT[0], small=True), "size"),
    (RIGHT[0], changed(RIGHT[0], things=(thing("cat-face", colour="blue"),)), "colour"),
    (RIGHT[3], changed(RIGHT[3], things=(thing("cat-face", colour="green"),)), "colour"),
    (RIGHT[5], changed(RIGHT[5], place="bottom right"), "place"),
    (COUNTED, changed(COUNTED, count=4), "absent"),
    (COUNTED, changed(COUNTED, count=2), "extra"),
    (COUNTED, changed(COUNTED, count=1), "extra"),
    (LEFT, changed(LEFT, relation="right"), "relation"),
    (LEFT, changed(LEFT, relation="above"), "relation"),
    (LEFT, Facts(things=(PAIR[0],)), "extra"),
    (LEFT, changed(LEFT, things=(PAIR[0], thing("cat-face"))), "absent"),
    (
        COLOURED,
        changed(COLOURED, things=(thing("ring", colour="blue"), thing("cat-face", colour="green"))),
        "colour",
    ),
]


@pytest.mark.parametrize(
    ("shown", "asked", "kind"), WRONG, ids=[f"{kind}-{i}" for i, (*_, kind) in enumerate(WRONG)]
)
def test_faults_are_named(drawn, judge, shown, asked, kind):
    for seed in range(2):
        faults = judge(image_of(drawn, shown, seed), asked).faults
        assert kind in [fault.partition(":")[0] for fault in faults], faults


def test_another_style_is_wrong_only_if_one_is_asked_for(drawn, judge):
    shown = Facts(things=(thing("blue-box", style="noto"),))
    image = image_of(drawn, shown)
    assert judge(image, Facts(things=(thing("blue-box"),))).is_right
    verdict = judge(image, Facts(things=(thing("blue-box", style="twemoji"),)))
    assert verdict.faults == ("name: blue-box (noto) is nearer than blue-box",)


def test_a_thing_beside_the_one_asked_for_and_an_empty_image_are_wrong(drawn, judge):
    empty = np.full((128, 128, 3), 255, np.uint8)
    verdict = judge(empty, RIGHT[0])
    assert verdict.faults == ("absent: 0 of 1 places found",) and verdict.parts == ()
    cross = Facts(things=(thing("old-cross"),), small=True, place="top left")
    spoiled = image_of(drawn, cross)
    assert judge(spoiled, cross).is_right
    spoiled[80:120, 80:120] = 120
    assert [fault[:5] for fault in judge(spoiled, cross).faults] == ["extra"]


def test_wrong_arguments_are_refused(drawn, judge):
    with pytest.raises(ValueError, match="expected uint8"):
        judge(np.zeros((128, 128, 3)), RIGHT[0])
    with pytest.raises(ValueError, match="expected uint8"):
        judge(np.zeros((128, 64, 3), np.uint8), RIGHT[0])
    with pytest.raises(ValueError, match="side 60"):
        judge(np.zeros((60, 60, 3), np.uint8), RIGHT[0])
    with pytest.raises(ValueError, match="'unheard'"):
        judge(np.zeros((64, 64, 3), np.uint8), Facts(things=(thing("unheard"),)))


def test_relations_go_by_the_larger_distance():
    assert [relation_of(*d) for d in ((3, 1), (-3, 1), (1, 3), (1, -3))] == [
        "left",
        "right",
        "above",
        "below",
    ]


@pytest.mark.parametrize("colour", PALETTE)
def test_the_background_is_read_along_the_border(colour):
    image = rgb(colour).view(3, 1, 1).expand(3, 64, 64).clone()
    image[:, 10:64, 20:44] = 0.3  # touches the border
    image[:, :, :] += 0.02
    name, level = seen_background(image)
    assert name == colour and (level - rgb(colour)).abs().max() < 0.021


def test_smooth_keeps_constants_and_weights_neighbours():
    point = torch.zeros(3, 5, 5)
    point[1, 2, 2] = 16
    assert smooth(point)[1, 1:4, 1:4].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert torch.equal(smooth(torch.full((3, 4, 4), 0.5)), torch.full((3, 4, 4), 0.5))


def test_gains_are_the_decrease_of_the_sum_of_squares():
    torch.manual_seed(0)
    image, template = torch.randn(3, 32, 32), torch.randn(1, 3, 16, 16)
    pose = torch.tensor([[0.5, 0.25, 0.5, 0.0]])  # columns 8 to 23, rows 0 to 15
    after = image.clone()
    after[:, 0:16, 8:24] -= template[0]
    expected = (image.square().sum() - after.square().sum()) / 32**2
    seen = sample(pyramid(image, 1), pose, 16)
    assert torch.allclose(seen[0], image[:, 0:16, 8:24], atol=1e-5)
    assert gains(seen, template, pose).item() == pytest.approx(expected.item(), rel=1e-4)


def test_correlations_are_gains_at_every_pixel():
    torch.manual_seed(1)
    image = torch.randn(3, GRID, GRID)
    templates = torch.nn.functional.interpolate(torch.randn(2, 3, 4, 4), size=(36, 36), mode="bilinear")
    found, kinds = correlate(image, templates, (0.8, 0.95), (0.0, 0.1))
    assert found.shape == (8, GRID, GRID)
    assert kinds[5].tolist() == pytest.approx([1, 0.8, 0.1])
    for k in (0, 3, 5):
        which, side, tilt = kinds[k]
        pose = torch.tensor([[16.5 / GRID, 15.5 / GRID, side, tilt]])
        fine = templates[which.long()][None]
        seen = sample([image], pose, 36)
        # one interpolates the image, the other the template
        assert found[k, 15, 16].item() == pytest.approx(gains(seen, fine, pose).item(), rel=0.2)


def test_a_planted_template_is_found_and_refined(drawn):
    gallery = SceneGallery(drawn)
    row = drawn.find("cat-face", "fluent")
    true = torch.tensor([[0.41, 0.57, 0.66, math.radians(5)]])
    place = Placement(thing=0, row=row, x=0.41, y=0.57, side=0.66, tilt=5)
    facts = Facts(things=(thing("cat-face"),), background="gray")
    pixels = render(Scene(facts=facts, placements=(place,)), drawn.images, 128)
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255 - rgb("gray").view(3, 1, 1)
    small = gallery.small([row], None, "gray")
    coarse = torch.nn.functional.interpolate(image[None], size=(GRID, GRID), mode="area")[0]
    poses, which = peaks(*correlate(coarse, small, (0.6, 0.7), (0.0, 0.1)), 1)
    assert which.tolist() == [0] and (poses - true)[:, :2].abs().max() < 1 / GRID
    energy = image.square().sum() / 128**2
    refined, gain = refine(pyramid(image), small, poses, 5)
    assert (refined - true).abs().max() < 0.01 and gain.item() == pytest.approx(energy.item(), rel=0.05)
    assert gain.item() > refine(pyramid(image), small, poses, 0)[1].item()


def test_coarse_gains_are_those_of_the_templates(drawn):
    gallery = SceneGallery(drawn)
    shown, sides = torch.rand(4, 3, 12, 12), torch.tensor([0.3, 0.5, 0.7, 0.9])
    rows = range(len(drawn))
    for colour, background in ((None, "white"), ("blue", "orange")):
        found = gallery.coarse_gains(shown, sides, colour, background)
        templates = torch.nn.functional.avg_pool2d(gallery.small(rows, colour, background), 3)
        for k in range(4):
            poses = torch.tensor([[0.5, 0.5, sides[k].item(), 0.0]]).expand(len(rows), -1)
            expected = gains(shown[k].expand(len(rows), -1, -1, -1), templates, poses)
            assert torch.allclose(found[k], expected, atol=1e-5)


def test_the_area_outside_things_is_measured(drawn):
    gallery, row = SceneGallery(drawn), drawn.find("blue-box")
    facts = Facts(things=(thing("blue-box"),))
    place = Placement(thing=0, row=row, x=0.25, y=0.25, side=0.5)
    pixels = render(Scene(facts=facts, placements=(place,)), drawn.images, 128)
    pixels[90:110, 90:110] = 0
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 1
    fit = SceneFit(gallery, image, "white", facts)
    box = 56**2  # pixels of the box: radius 28 of 64
    assert extra_area(fit) == pytest.approx(20**2 / box, rel=0.15)
