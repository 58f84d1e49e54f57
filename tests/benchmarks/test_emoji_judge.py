"""Test the judge of single things: what it must and must not tolerate; and the figures of emoji_quality."""

import emoji_judge
import emoji_quality
import numpy as np
import pytest
import torch
from emoji_judge import EmojiJudge
from scene_fit import FINALISTS, seen_background

from ldm.data import PALETTE, Placement, Scene, held_out_background, plain_scene, render_batch


def images(data, compositions, size=64):
    return torch.from_numpy(render_batch(compositions, data.images, size)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def judge(drawn):
    return EmojiJudge(drawn)


@pytest.mark.parametrize("background", [None, "black", "yellow"])
def test_images_of_the_data_set_are_judged_correct(drawn, judge, background):
    made = [plain_scene(drawn.index, i, background) for i in range(18)]
    for i, verdict in enumerate(
        judge(images(drawn, made), [drawn.index[i].name for i in range(18)], [background] * 18)
    ):
        assert (verdict.rank, verdict.nearest) == (0, drawn.index[i].name)
        assert verdict.error < 0.02 and verdict.background_right


PLACES = ((0.5, 0.5, 0.9, 0.0), (0.3, 0.65, 0.5, 6.0), (0.62, 0.4, 0.7, -5.0), (0.28, 0.28, 0.44, 4.0))


def placed(drawn, row, where, background):
    """Return a scene of an image at a place, of a side and with a tilt in degrees."""
    x, y, side, tilt = where
    placement = Placement(thing=0, row=row, x=x, y=y, side=side, tilt=tilt)
    return Scene(facts=plain_scene(drawn.index, row, background).facts, placements=(placement,))


def test_place_size_tilt_and_noise_are_tolerated_and_other_names_are_not(drawn, judge):
    torch.manual_seed(0)
    for row in range(18):
        name = drawn.index[row].name
        made = images(drawn, [placed(drawn, row, where, "green") for where in PLACES], 128)
        noisy = (made + 0.05 * torch.randn_like(made)).clamp(0, 1)
        for shown, most in ((made, 0.02), (noisy, 0.3)):
            verdicts = judge(shown, [name] * 4, ["green"] * 4)
            assert all(verdict.rank == 0 and verdict.background_right for verdict in verdicts)
            assert all(verdict.nearest == name and verdict.error < most for verdict in verdicts)
        others = [other for other in drawn.index.names("noto") if other != name][:4]
        assert all(verdict.rank > 0 for verdict in judge(made, others, ["green"] * 4))


def test_another_object_is_a_miss_and_another_style_a_hit(drawn, judge):
    shown = images(drawn, [plain_scene(drawn.index, drawn.find("red-disc", "twemoji"))] * 2)
    hit, miss = judge(shown, ["red-disc", "green-bar"], [None, None])
    assert hit.rank == 0 and hit.nearest_style == "twemoji"
    assert miss.rank > 0 and miss.nearest == "red-disc"


def test_the_rank_counts_the_nearer_images_of_other_names(drawn, judge):
    """A mixture of two things is nearer to all styles of the one that has the larger share."""
    parts = images(drawn, [plain_scene(drawn.index, drawn.find(name)) for name in ("red-disc", "old-cross")])
    mixed = (0.95 * parts[0] + 0.05 * parts[1])[None]
    first, second = judge(mixed.expand(2, -1, -1, -1), ["red-disc", "old-cross"], [None, None])
    assert first.rank == 0 and 3 <= second.rank <= FINALISTS


def test_an_image_that_shows_nothing_is_a_miss(judge):
    (verdict,) = judge(torch.ones(1, 3, 128, 128), ["ring"], [None])
    assert (verdict.rank, verdict.nearest, verdict.error) == (FINALISTS, None, 1.0)
    assert verdict.background_right


def test_the_verdict_does_not_depend_on_the_image_size(drawn, judge):
    made = [plain_scene(drawn.index, drawn.find("old-cross"), "red")]
    large = torch.nn.functional.interpolate(images(drawn, made), scale_factor=4)
    small = images(drawn, made, 32)
    assert [judge(shown, ["old-cross"], ["red"])[0].rank for shown in (large, small)] == [0, 0]


@pytest.mark.parametrize("name", PALETTE)
def test_each_background_colour_is_seen_under_noise(name):
    torch.manual_seed(3)
    image = (torch.tensor(PALETTE[name]).view(3, 1, 1) / 255).expand(3, 128, 128).clone()
    image[:, 10:118, 10:118] = torch.rand(3, 108, 108)
    image[:, :10, :10] = 0.5  # one corner that the object covers
    assert seen_background((image + 0.03 * torch.randn_like(image)).clamp(0, 1))[0] == name


def test_wrong_input_is_refused(judge):
    with pytest.raises(ValueError, match="B names and backgrounds"):
        judge(torch.rand(2, 3, 64, 64), ["ring"], [None])
    with pytest.raises(ValueError, match="no-such"):
        judge(torch.rand(1, 3, 64, 64), ["no-such"], [None])
    with pytest.raises(ValueError, match=r"expected \(B, 3, S, S\)"):
        judge(torch.rand(1, 3, 64, 32), ["ring"], [None])


def test_mean_psnr():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert emoji_quality.mean_psnr(a, b) == pytest.approx(30.0, abs=1e-4)  # the mean of 20 and 40 dB


def test_mean_gradient():
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) * 0.1
    assert emoji_quality.mean_gradient(ramp) == pytest.approx(0.1, abs=1e-6)
    both = ramp + ramp.transpose(-1, -2)
    assert emoji_quality.mean_gradient(both) == pytest.approx(0.1 * 2**0.5, abs=1e-6)
    assert emoji_quality.mean_gradient(torch.rand(1, 3, 1, 1).expand(2, 3, 8, 8)) == 0


def test_scenes_are_drawn_from_the_training_set_or_held_out(many):
    data = emoji_judge.EmojiData(images=np.zeros((len(many), 2, 2, 4), np.uint8), index=many, manifest={})
    seen = emoji_quality.draw_training(data, 100, np.random.default_rng(0), ["noto", "fluent"])
    unseen = emoji_quality.draw_held_out_backgrounds(data, 100, np.random.default_rng(0), ["noto", "fluent"])
    held = [held_out_background(*one) for one in zip(*emoji_quality.asked([*seen, *unseen]), strict=True)]
    assert held == [False] * 100 + [True] * 100
    rows = [c.rows()[0] for c in (*seen, *unseen)]
    assert sum(c.facts.background is not None for c in seen) == 50 and len(set(rows[:100])) == 100
    assert not any(many[row].held_out for row in rows)
    assert {many[row].style for row in rows} == {"noto", "fluent"}
    chosen = emoji_quality.draw_held_out_images(data, np.random.default_rng(0))
    assert [c.rows()[0] for c in chosen] == many.held_out.tolist()
    one = emoji_quality.draw_held_out_images(data, np.random.default_rng(0), ["noto"])
    assert {many[c.rows()[0]].style for c in one} == {"noto"} and len(one) < len(chosen)
