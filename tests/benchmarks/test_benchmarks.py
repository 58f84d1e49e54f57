"""Test what the speed benchmarks compute from their measurements."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest


def args(**options):
    return SimpleNamespace(**{"threads": 1, "clock": "wall", "json": None, **options})


def test_implementations_alternate_and_the_first_run_is_discarded():
    from common import measure

    order = []
    seconds = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 4 and [len(runs) for runs in seconds.values()] == [3, 3]


def test_a_report_has_ratios_of_medians_and_states_which_bars_are_met(tmp_path, capsys):
    from common import report
    from report import table

    seconds = {"ldm": [3.0, 1.0, 2.0], "diffusers": [4.0, 4.0, 1.0], "openvino": [2.0, 1.9, 1.5]}
    path = tmp_path / "unet.json"
    report("UNet", {"dtype": "bf16"}, seconds, args(json=path), bars={"diffusers": 0.75, "openvino": 1.0})
    shown = capsys.readouterr().out
    assert "0.500    bar 0.75: met" in shown and "1.053    bar 1.0: NOT met" in shown
    result = json.loads(path.read_text(encoding="utf-8"))
    assert (
        result["ratios"] == {"diffusers": 0.5, "openvino": pytest.approx(2 / 1.9)}
        and result["where"]["threads"] == 1
    )
    assert "| UNet: dtype bf16 | 2 s (1–3) | diffusers: 4 s (1–4) | 0.50 | 0.75 (met) |" in table([result])


def test_quick_sets_options_and_those_after_it_count():
    import common

    made = common.parser("a test")
    common.add_quick(made, repeats=1, threads=1)
    assert (made.parse_args([]).repeats, made.parse_args([]).quick) == (7, False)
    quick = made.parse_args(["--quick", "--threads", "3"])
    assert (quick.repeats, quick.threads, quick.quick) == (1, 3, True)
    assert made.parse_args(["--threads", "3", "--quick"]).threads == 1
    with pytest.raises(ValueError, match="sizes"):
        common.add_quick(common.parser("a test"), sizes=[1])


def test_ratios_of_adapters_are_those_of_their_bars():
    from adapters import ratios

    own = {"first_seconds": 3.0, "seconds": 1.0, "model_mb": 200.0, "added_mb": 10.0}
    found = ratios(
        {
            "ldm": own,
            "diffusers": {**own, "seconds": 4.0},
            "step": {"plain": 2.0, "on the fly": 2.1},
        }
    )
    assert [ratio for ratio, _ in found.values()] == pytest.approx([1.05, 1.0, 0.25, 1.05])
    assert [bar for _, bar in found.values()] == [1.10, 0.5, 0.5, 1.10]
    assert ratios({}) == {}


def test_slope_is_the_exponent_of_a_power_law():
    from scaling import slope

    sizes = [256.0, 512.0, 1024.0]
    assert slope(sizes, [0.3 * v**1.7 for v in sizes]) == pytest.approx(1.7)


def test_the_time_of_an_image_is_split_by_the_slope_between_steps():
    from few_steps import split

    assert split({10: 130.0, 2: 50.0, 1: 40.0}, 7.0) == [
        (130.0, 100.0, 7.0, 23.0),
        (50.0, 20.0, 7.0, 23.0),
        (40.0, 10.0, 7.0, 23.0),
    ]


def test_the_profile_counts_the_multiplications_of_every_operator():
    import torch
    from pairs import unet_inputs
    from profile_unet import Clock

    import ldm
    from ldm.models.unet import UNet, UNetConfig

    net = UNet(
        UNetConfig(channels=(8, 16), depth=(1, 0), blocks=1, heads=1, context_dim=8, mid_depth=0)
    ).requires_grad_(False)
    work = {}
    for name in ("plain", "optimised"):
        if name == "optimised":
            ldm.optimize(net, kernels=False)
        clock = Clock(lambda: 0.0)
        clock.watch(net)
        given, _ = unet_inputs(net, 2, 8, 5, torch.float32)
        with torch.no_grad():
            net(*given)
        work[name] = {
            kind: sum(row[2] for (k, _), row in clock.rows.items() if k == kind) for kind, _ in clock.rows
        }
        for part in net.modules():
            part.__dict__.pop("forward", None), part.__dict__.pop("product", None)
    # once on the way down, twice on the way up: 64 positions, width 8
    assert work["plain"]["self-attention"] == 3 * 4 * 2 * 64 * 64 * 8
    assert work["plain"]["cross-attention"] == 3 * 4 * 2 * 64 * 5 * 8
    assert work["optimised"]["upsampling"] == pytest.approx(work["plain"]["upsampling"] * 4 / 9)
    assert {k: v for k, v in work["plain"].items() if k in ("linear", "convolution 3×3")} == {
        k: v for k, v in work["optimised"].items() if k in ("linear", "convolution 3×3")
    }
