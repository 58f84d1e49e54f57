"""T2I-Adapter: parity with diffusers in both layouts, parameters at full size, and where maps are added."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from control_nets import adapter_peer
from shared_weights import TOLERANCE, error

from ldm.catalog.shapes import UNETS
from ldm.diffusion.cond import Cond
from ldm.models.control.t2i_adapter import T2IAdapter, T2IAdapterConfig, T2IAdapterKind
from ldm.models.unet_config import UNetConfig
from ldm.weights.controls.t2i_adapter import t2i_adapter_config, t2i_adapter_layout, t2i_family
from ldm.weights.keymap import file_shapes
from ldm.weights.parts import build_network, part_table, randomise, shapes_of

ONCE = (False, False, True, False)
# the published kinds: configuration, UNet, number of parameters, keys in a file
FULL_SIZE: dict[str, tuple[T2IAdapterConfig, str, int]] = {
    "full": (T2IAdapterConfig(), "sd1", 77_369_280),
    "gray": (T2IAdapterConfig(hint_channels=1), "sd1", 77_000_640),
    "xl": (T2IAdapterConfig(unshuffle=16, halved=ONCE), "sdxl", 79_028_160),
    "light": (T2IAdapterConfig(light=True, blocks=4), "sd1", 18_689_200),
}
SMALL = {
    "full": T2IAdapterConfig(unshuffle=2, channels=(8, 16, 16, 24)),
    "gray": T2IAdapterConfig(hint_channels=1, unshuffle=2, channels=(8, 16, 16, 24)),
    "xl": T2IAdapterConfig(unshuffle=4, channels=(8, 16, 16, 16), halved=ONCE),
    "light": T2IAdapterConfig(unshuffle=2, channels=(8, 16, 24, 24), light=True, blocks=3),
}


def assert_parity(config: T2IAdapterConfig, side: int) -> None:
    ours: Any = randomise(build_network(config), 3)
    hint = torch.rand(2, config.hint_channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = ours(hint), adapter_peer(ours)(hint)
    assert len(found) == len(wanted) == len(config.channels)
    for mine, peer in zip(found, wanted, strict=True):
        assert mine.shape == peer.shape and error(mine, peer) < TOLERANCE


@pytest.mark.parametrize("kind", SMALL)
def test_parity_with_diffusers(kind: str) -> None:
    assert_parity(SMALL[kind], 48)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL_SIZE)
def test_parity_with_diffusers_at_full_size(kind: str) -> None:
    assert_parity(FULL_SIZE[kind][0], 128)


@pytest.mark.parametrize("kind", FULL_SIZE)
def test_parameters_and_keys_at_full_size(kind: str) -> None:
    config, unet, count = FULL_SIZE[kind]
    network = build_network(config)
    assert isinstance(network, T2IAdapter)
    assert sum(p.numel() for p in network.parameters()) == count
    ours = shapes_of(network)
    original = file_shapes(part_table(network, "original", ()), ours)
    bodies = {int(key.split(".")[1]) for key in original if key.startswith("body.")}
    assert bodies == set(range(4 if config.light else 8))
    assert ("conv_in.weight" in original) is not config.light
    assert ("body.0.body.0.block1.weight" in original) is config.light
    for layout, shapes in (("diffusers", ours), ("original", original)):
        assert t2i_adapter_layout(shapes) == layout
        assert t2i_adapter_config(shapes, layout, UNETS[unet]) == config  # type: ignore[arg-type]
        assert t2i_family(shapes) == ("Stable Diffusion XL" if kind == "xl" else "Stable Diffusion 1 or 2")


@pytest.mark.parametrize("depth", [(1, 0), (0, 1)])
def test_maps_are_added_where_diffusers_adds_them(depth: tuple[int, int]) -> None:
    """With attention a level adds before its downsampler, without behind it; a third map is the middle's."""
    config = UNetConfig(channels=(32, 64), depth=depth, mid_depth=1, blocks=1, heads=4, context_dim=16)
    from ldm.weights.formats.diffusers_config import unet_config
    from ldm.weights.parts import to_layout

    ours: Any = randomise(build_network(config))
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(unet_config(config)[1])
    theirs.load_state_dict(to_layout(ours, "diffusers"), assign=True)
    g = torch.Generator().manual_seed(0)
    x, t, context = (
        torch.randn(1, 4, 8, 8, generator=g),
        torch.tensor([50.0]),
        torch.randn(1, 5, 16, generator=g),
    )
    first = 8 if depth[0] else 4
    maps = [torch.randn(1, 32, first, first, generator=g), torch.randn(1, 64, 4, 4, generator=g)]
    maps += [torch.randn(1, 64, 4, 4, generator=g)] if not depth[0] else []
    with torch.no_grad():
        found = ours(x, t, Cond(context=context, features=tuple(maps)))
        peer = theirs.eval()(
            x, t, context, down_intrablock_additional_residuals=[each.clone() for each in maps]
        ).sample
        plain = ours(x, t, Cond(context=context))
    assert error(found, peer) < TOLERANCE and error(plain, peer) > 0.01
    with pytest.raises(ValueError, match="this UNet takes 2 maps, or one more for its middle, got 1"):
        ours(x, t, Cond(context=context, features=tuple(maps[:1])))


def test_kind_scales_maps_and_states_its_hint() -> None:
    for name, factor in (("full", 2), ("xl", 2), ("light", 2)):
        network: Any = randomise(build_network(SMALL[name]))
        kind = T2IAdapterKind(network=network)
        assert (kind.factor, kind.count, kind.hint_channels) == (factor, 4, 3)
        hint = torch.rand(1, 3, 48, 48)
        prepared = kind.prepare(hint)
        x = torch.zeros(1, 4, 24, 24)
        found = kind.added(x, torch.zeros(1), Cond(), prepared, strength=0.5, guess=False)["features"]
        assert all(torch.equal(mine, 0.5 * own) for mine, own in zip(found, prepared, strict=True))
    with pytest.raises(ValueError, match="takes multiples of 2"):
        network(torch.rand(1, 3, 47, 48))
