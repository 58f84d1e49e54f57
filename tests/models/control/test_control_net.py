"""ControlNet: what it adds, parity with diffusers in both layouts, and its parameters at full size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from control_nets import peer_of, random_control_net, reduced_config
from reduced_families import NETWORKS
from shared_weights import TOLERANCE, error

from ldm.catalog.shapes import UNETS
from ldm.diffusion.cond import Cond
from ldm.models.control.control_net import ControlNet, ControlNetConfig
from ldm.models.control.controlled import Controlled, ControlNetKind, ControlPart, interval
from ldm.models.layers.embeddings import vector_condition
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig
from ldm.support.config import build
from ldm.weights.controls.control_net import control_net_config, control_net_layout
from ldm.weights.keymap import file_shapes
from ldm.weights.parts import build_network, part_table, randomise, shapes_of

FAMILIES = {"sd1": "sd-v1-5", "sd2": "sd-v2-1", "sdxl": "sdxl-base"}
EVERYWHERE = (float("-inf"), float("inf"))
# parameters of the published networks, of which the hint's encoder has 1,086,480
COUNTS = {"sd1": 361_279_120, "sd2": 364_228_240, "sdxl": 1_251_014_160}
ZERO_CONVOLUTIONS = {"sd1": 12, "sd2": 12, "sdxl": 9}


def small_unet(family: str) -> UNetConfig:
    return build(UNetConfig, NETWORKS[FAMILIES[family]]["unet"])


def inputs(config: ControlNetConfig, batch: int = 2, side: int = 8) -> tuple[Any, ...]:
    """Return x_t, t, the condition, the same for diffusers, and a hint."""
    g = torch.Generator().manual_seed(1)
    unet = config.unet
    x, t = torch.randn(batch, unet.in_channels, side, side, generator=g), torch.tensor([3.0, 741.0])[:batch]
    context = torch.randn(batch, 7, unet.context_dim or 1, generator=g)
    hint = torch.rand(batch, config.hint_channels, side * config.factor, side * config.factor, generator=g)
    if unet.pooled_dim is None:
        return x, t, Cond(context=context), {}, hint
    text = torch.randn(batch, unet.pooled_dim - 6 * 256, generator=g)
    sizes = torch.tensor([[32.0, 32, 0, 4, 32, 32]]).expand(batch, -1)
    cond = Cond(context=context, pooled=vector_condition(text, sizes))
    return x, t, cond, {"added_cond_kwargs": {"text_embeds": text, "time_ids": sizes}}, hint


def assert_parity(config: ControlNetConfig, *, side: int = 8, batch: int = 2) -> None:
    ours = random_control_net(config)
    x, t, cond, added, hint = inputs(config, batch, side)
    with torch.no_grad():
        found = ours(x, t, cond, ours.controlnet_cond_embedding(hint))
        theirs = peer_of(ours)(x, t, cond.context, hint, **added)
    wanted = [*theirs.down_block_res_samples, theirs.mid_block_res_sample]
    assert len(found) == len(wanted)
    for mine, peer in zip(found, wanted, strict=True):
        assert error(mine, peer) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("global_pool", [False, True])
def test_parity_with_diffusers(family: str, global_pool: bool) -> None:
    assert_parity(reduced_config(small_unet(family), global_pool=global_pool))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_diffusers_at_full_size(family: str) -> None:
    assert_parity(ControlNetConfig.of_unet(UNETS[family]), batch=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_keys_at_full_size(family: str) -> None:
    """Both layouts have the keys of the published files, and show the shape that they were made from."""
    config = ControlNetConfig.of_unet(UNETS[family])
    network = build_network(config)
    assert isinstance(network, ControlNet)
    assert sum(p.numel() for p in network.parameters()) == COUNTS[family]
    assert sum(p.numel() for p in network.controlnet_cond_embedding.parameters()) == 1_086_480
    ours = shapes_of(network)
    original = file_shapes(part_table(network, "original", ()), ours)
    assert sum(key.startswith("zero_convs.") for key in original) == 2 * ZERO_CONVOLUTIONS[family]
    hint = sorted(int(key.split(".")[1]) for key in original if key.startswith("input_hint_block."))
    assert hint == sorted([0, 2, 4, 6, 8, 10, 12, 14] * 2)
    assert original["middle_block_out.0.weight"] == (1280, 1280, 1, 1)
    for layout, shapes in (("diffusers", ours), ("original", original)):
        assert control_net_layout(shapes) == layout
        assert control_net_config(shapes, layout, UNETS[family]) == config  # type: ignore[arg-type]


def test_a_copy_of_a_unet_adds_nothing_before_training() -> None:
    unet = randomise(build_network(small_unet("sd1")))
    assert isinstance(unet, UNet)
    made = ControlNet.copy_of(unet, hint_widths=(8, 16))
    x, t, cond, _, hint = inputs(made.control)
    with torch.no_grad():
        assert all(not bool(each.any()) for each in made(x, t, cond, made.controlnet_cond_embedding(hint)))
    own, theirs = made.state_dict(), unet.state_dict()
    shared = [name for name in own if name in theirs]
    assert len(shared) == len(own) - len([name for name in own if name.startswith("controlnet_")])
    assert all(torch.equal(own[name], theirs[name]) for name in shared)
    assert own["conv_in.weight"].data_ptr() != theirs["conv_in.weight"].data_ptr()


def test_a_copy_reads_the_channels_that_the_unet_reads() -> None:
    shape = replace(small_unet("sd1"), in_channels=7)
    made = ControlNet.copy_of(UNet(shape), hint_widths=(8, 16))
    kind = ControlNetKind(network=made)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 7, 32)
    cond = Cond(context=context, concat=torch.randn(1, 3, 8, 8))
    with torch.no_grad():
        prepared = kind.prepare(torch.rand(1, 3, 16, 16))
        found = kind.added(x, t, cond, prepared, strength=1.0, guess=False)["residuals"]
    assert made.conv_in.weight.shape[1] == 7 and len(found) == len(shape.skips) + 1


def part(network: ControlNet, **changes: Any) -> ControlPart:
    options = {"strength": 1.0, "guess": False, "interval": EVERYWHERE, **changes}
    return ControlPart(kind=ControlNetKind(network=network), **options)


def with_hints(cond: Cond, *hints: torch.Tensor, on: list[bool] | None = None) -> Cond:
    where = torch.tensor(on or [True, True])
    return Cond.of({**dict(cond.items()), **{f"hints.{i}": h for i, h in enumerate((where, *hints))}})


def test_strength_interval_and_rows() -> None:
    """Strength 0 and other timesteps are the plain UNet; a row that is off is as in a batch without it."""
    unet: Any = randomise(build_network(small_unet("sd1")))
    network = random_control_net(reduced_config(small_unet("sd1")))
    x, t, cond, _, hint = inputs(network.control)
    prepared = ControlNetKind(network=network).prepare(hint)
    with torch.no_grad():
        plain = unet(x, t, cond)
        full = Controlled(unet, [part(network)])(x, t, with_hints(cond, *prepared))
        assert error(full, plain) > 0.01
        for changes in ({"strength": 0.0}, {"interval": (800.0, 999.0)}):
            assert torch.equal(
                Controlled(unet, [part(network, **changes)])(x, t, with_hints(cond, *prepared)), plain
            )
        late = Controlled(unet, [part(network, interval=(100.0, 999.0))])(x, t, with_hints(cond, *prepared))
        assert torch.allclose(late[0], plain[0], atol=1e-5) and torch.allclose(late[1], full[1], atol=1e-5)
        half = Controlled(unet, [part(network)])(x, t, with_hints(cond, *prepared, on=[False, True]))
        assert torch.allclose(half, late, atol=1e-5)
        twice = Controlled(unet, [part(network), part(network)])
        both = Cond.of(
            {
                **dict(cond.items()),
                **{f"hints.{i}": h for i, h in enumerate(2 * with_hints(cond, *prepared).hints)},
            }  # type: ignore[operator]
        )
        doubled = Controlled(unet, [part(network, strength=2.0)])(x, t, with_hints(cond, *prepared))
        assert torch.allclose(twice(x, t, both), doubled, atol=1e-4)
        with pytest.raises(ValueError, match="Cond.hints: expected 2 tensors"):
            Controlled(unet, [part(network)])(x, t, cond)
        with pytest.raises(ValueError, match="takes no Cond.hints"):
            unet(x, t, with_hints(cond, *prepared))


def test_guess_mode_weighs_maps_from_a_tenth_to_one() -> None:
    network = random_control_net(reduced_config(small_unet("sd1")))
    x, t, cond, _, hint = inputs(network.control)
    kind = ControlNetKind(network=network)
    with torch.no_grad():
        plain = kind.added(x, t, cond, kind.prepare(hint), strength=1.0, guess=False)["residuals"]
        found = kind.added(x, t, cond, kind.prepare(hint), strength=1.0, guess=True)["residuals"]
    weights = torch.logspace(-1, 0, len(plain))
    for mine, own, weight in zip(found, plain, weights, strict=True):
        assert torch.allclose(mine, own * weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [(0.0, 1.0, [0, 1, 2, 3, 4]), (0.0, 0.6, [0, 1, 2]), (0.4, 1.0, [2, 3, 4]), (0.5, 0.59, [])],
)
def test_the_interval_takes_the_steps_of_diffusers(start: float, end: float, steps: list[int]) -> None:
    times = [901.0, 701.0, 501.0, 301.0, 101.0]
    low, high = interval(times, start, end)
    assert [i for i, t in enumerate(times) if low < t <= high] == steps
    keeps = [1.0 - float(i / 5 < start or (i + 1) / 5 > end) for i in range(5)]  # of its pipelines
    assert [i for i, keep in enumerate(keeps) if keep] == steps


def test_residuals_of_another_number_are_refused() -> None:
    unet: Any = randomise(build_network(small_unet("sd1")))
    x, t, cond, _, _ = inputs(reduced_config(small_unet("sd1")))
    with pytest.raises(ValueError, match="this UNet takes 5 maps, got 1"):
        unet(x, t, Cond.of({**dict(cond.items()), "residuals.0": x}))
