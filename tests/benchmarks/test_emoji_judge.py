"""Test the judge: its arithmetic against plain loops, and the changes that it must and must not tolerate."""

import emoji_judge
import emoji_quality
import numpy as np
import pytest
import torch
from emoji_judge import EmojiJudge, background_of, least_mse, shifted_and_scaled

from ldm.data import PALETTE, held_out_background, plain_scene, render_batch


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
        assert (verdict.rank, verdict.nearest, verdict.nearest_style) == (
            0,
            drawn.index[i].name,
            drawn.index[i].style,
        )
        # 8-bit rounding has a mean squared error of 1/255² / 12 = 1.3e-6
        assert verdict.mse < 1e-5 and verdict.background_right


def test_shifts_scales_and_noise_are_tolerated(drawn, judge):
    torch.manual_seed(0)
    made = [
        plain_scene(drawn.index, drawn.find(name), "green") for name in ("red-disc", "blue-box", "old-cross")
    ]
    clean = images(drawn, made, 64)
    moved = clean.roll((3, -3), (2, 3))
    names = ["red-disc", "blue-box", "old-cross"]
    assert all(verdict.mse < 1e-5 for verdict in judge(moved, names, ["green"] * 3))
    # a larger shift than is tolerated
    assert all(verdict.mse > 1e-3 for verdict in judge(clean.roll((8, 8), (2, 3)), names, ["green"] * 3))
    noisy = (moved + 0.1 * torch.randn_like(moved)).clamp(0, 1)
    assert [verdict.rank for verdict in judge(noisy, names, ["green"] * 3)] == [0, 0, 0]


def test_another_object_is_a_miss_and_another_style_a_hit(drawn, judge):
    shown = images(drawn, [plain_scene(drawn.index, drawn.find("red-disc", "twemoji"))] * 2)
    hit, miss = judge(shown, ["red-disc", "green-bar"], [None, None])
    assert hit.rank == 0 and hit.nearest_style == "twemoji"
    assert miss.rank > 0 and miss.nearest == "red-disc"


def test_pruning_does_not_change_the_verdict(drawn, judge):
    """Compare with the full gallery at full size, for images that resemble none of it."""
    torch.manual_seed(1)
    shown = torch.nn.functional.interpolate(torch.rand(6, 3, 8, 8), size=(64, 64), mode="bilinear")
    names = list(drawn.index.names("noto"))
    gallery = judge._gallery("pink")
    pink = torch.tensor(PALETTE["pink"]).view(3, 1, 1) / 255
    composed = images(drawn, [plain_scene(drawn.index, i, "pink") for i in range(18)])
    assert torch.allclose(gallery + pink, composed, atol=1 / 255)
    for image, name, verdict in zip(shown, names, judge(shown, names, ["pink"] * 6), strict=True):
        copies = shifted_and_scaled(image - pink)
        distance = torch.stack(
            [(copies - candidate).square().flatten(1).mean(1).min() for candidate in gallery]
        )
        own = min(distance[i] for i, row in enumerate(drawn.index) if row.name == name)
        assert verdict.rank == int((distance < own - 1e-7).sum())
        assert (
            verdict.mse == pytest.approx(float(distance.min()), rel=1e-4)
            and verdict.nearest == drawn.index[int(distance.argmin())].name
        )


def test_least_mse_is_the_mean_squared_error():
    torch.manual_seed(2)
    a, b = torch.rand(5, 3, 8, 8), torch.rand(4, 3, 8, 8)
    expected = torch.stack([(a - candidate).square().flatten(1).mean(1).min() for candidate in b])
    assert torch.allclose(least_mse(a, b), expected, atol=1e-6)


def test_copies_are_padded_with_the_background():
    """The background is subtracted, so the padding is 0; the copy of scale 1 without shift is the image."""
    image = torch.ones(3, 64, 64)
    copies = shifted_and_scaled(image).unflatten(0, (5, 7, 7))
    assert torch.equal(copies[2, 3, 3], image)
    assert (
        copies[2, 0, 0, :, :3].eq(0).all()
        and copies[2, 0, 0, :, :, :3].eq(0).all()
        and copies[2, 0, 0, :, 3:, 3:].eq(1).all()
    )
    assert copies[0, 3, 3, 0].sum() == pytest.approx((0.9 * 64) ** 2, rel=0.01)  # scale 0.9


def test_the_verdict_does_not_depend_on_the_image_size(drawn, judge):
    made = [plain_scene(drawn.index, drawn.find("old-cross"), "red")]
    large = torch.nn.functional.interpolate(images(drawn, made), scale_factor=2)
    small = images(drawn, made, 32)
    assert [judge(shown, ["old-cross"], ["red"])[0].rank for shown in (large, small)] == [0, 0]


@pytest.mark.parametrize("name", PALETTE)
def test_ground_of_finds_each_background_colour_under_noise(name):
    torch.manual_seed(3)
    image = (torch.tensor(PALETTE[name]).view(3, 1, 1) / 255).expand(3, 128, 128).clone()
    image[:, 10:118, 10:118] = torch.rand(3, 108, 108)
    image[:, :10, :10] = 0.5  # one corner that the object covers
    assert background_of((image + 0.03 * torch.randn_like(image)).clamp(0, 1)) == name


def test_wrong_input_is_refused(judge):
    with pytest.raises(ValueError, match="B names and backgrounds"):
        judge(torch.rand(2, 3, 64, 64), ["ring"], [None])
    with pytest.raises(ValueError, match="no-such"):
        judge(torch.rand(1, 3, 64, 64), ["no-such"], [None])


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
