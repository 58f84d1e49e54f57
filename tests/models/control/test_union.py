"""ControlNet Union: parity with diffusers, types by card, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from control_nets import peer_config
from reduced_families import NETWORKS
from shared_weights import TOLERANCE, error

from ldm.catalog.control_cards import CONTROL_CARDS
from ldm.diffusion.cond import Cond
from ldm.models.control.control_net import ControlNetConfig
from ldm.models.control.controlled import Controlled, ControlPart
from ldm.models.control.union import UnionConfig, UnionControlNet, UnionKind
from ldm.models.layers.embeddings import vector_condition
from ldm.models.unet_config import UNetConfig
from ldm.support.config import build
from ldm.weights.controls.building import Target, build_control, control_words
from ldm.weights.controls.files import ControlFile, read_control
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import build_network, randomise, to_layout

UNET = build(UNetConfig, NETWORKS["sdxl-base"]["unet"])
EVERYWHERE = (float("-inf"), float("inf"))


def random_union(types: int = 6) -> UnionControlNet:
    own = ControlNetConfig.of_unet(UNET).unet
    made: Any = randomise(build_network(UnionConfig(unet=own, hint_widths=(8, 16), types=types)), 5)
    return made


def peer_of(network: UnionControlNet) -> Any:
    """Return diffusers' network over the same tensors."""
    config = network.union
    entries = {
        **peer_config(config),
        "num_control_type": config.types,
        "num_trans_channel": config.width,
        "num_proj_channel": config.width,
    }
    with torch.device("meta"):
        theirs = diffusers.ControlNetUnionModel.from_config(entries)
    theirs.load_state_dict(to_layout(network, "diffusers"), assign=True, strict=True)
    return theirs.eval().requires_grad_(False)


def inputs() -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([3.0, 741.0])
    context = torch.randn(2, 7, UNET.context_dim or 1, generator=g)
    text = torch.randn(2, (UNET.pooled_dim or 0) - 6 * 256, generator=g)
    sizes = torch.tensor([[32.0, 32, 0, 4, 32, 32]]).expand(2, -1)
    cond = Cond(context=context, pooled=vector_condition(text, sizes))
    hint = torch.rand(2, 3, 16, 16, generator=g)
    return x, t, cond, {"added_cond_kwargs": {"text_embeds": text, "time_ids": sizes}}, hint


@pytest.mark.parametrize("kind", [0, 3, 5])
def test_parity_with_diffusers(kind: int) -> None:
    ours = random_union()
    x, t, cond, added, hint = inputs()
    chosen = torch.zeros(1, 6)
    chosen[:, kind] = 1
    peer = peer_of(ours)
    with torch.no_grad():
        found = ours(x, t, cond, *UnionKind(network=ours, type=kind).prepare(hint))
        other = ours(x, t, cond, *UnionKind(network=ours, type=(kind + 1) % 6).prepare(hint))
        for i in (slice(0, 1), slice(1, 2)):  # alone, as the peer's attention runs over the batch
            own = {name: value[i] for name, value in added["added_cond_kwargs"].items()}
            theirs = peer(x[i], t[i], cond.context[i], [hint[i]], chosen, [kind], added_cond_kwargs=own)
            wanted = [*theirs.down_block_res_samples, theirs.mid_block_res_sample]
            for mine, each in zip(found, wanted, strict=True):
                assert error(mine[i], each) < TOLERANCE
            assert error(other[-1][i], wanted[-1]) > 1e-3


def test_parity_with_diffusers_of_both_branches_of_guidance() -> None:
    ours = random_union()
    x, t, cond, added, hint = inputs()
    x, t, hint, chosen = (
        x[:1].expand(2, -1, -1, -1),
        t[:1].expand(2),
        hint[:1].expand(2, -1, -1, -1),
        torch.eye(6)[3],
    )
    with torch.no_grad():
        found = ours(x, t, cond, *UnionKind(network=ours, type=3).prepare(hint))
        theirs = peer_of(ours)(x, t, cond.context, [hint], chosen.expand(2, -1), [3], **added)
    for mine, each in zip(found, [*theirs.down_block_res_samples, theirs.mid_block_res_sample], strict=True):
        assert error(mine, each) < TOLERANCE


def target() -> Target:
    return Target(model="tiny", network=UNET, factor=2, dtype=torch.float32)


def written(path: Path, types: int = 6) -> ControlFile:
    write_safetensors(path, to_layout(random_union(types), "diffusers"))
    return read_control(path)


def test_a_file_is_read_and_its_type_is_that_of_the_card(tmp_path: Path) -> None:
    file = written(tmp_path / "union.safetensors")
    assert control_words(file) == "ControlNet Union"
    for name, number in (("openpose", 0), ("depth", 1), ("scribble", 2), ("canny", 3), ("normal", 4)):
        built = build_control(file, target(), CONTROL_CARDS[name])
        assert isinstance(built.kind, UnionKind) and built.kind.type == number
    for name, tensor in built.network.state_dict().items():
        assert torch.equal(tensor, random_union().state_dict()[name])


def test_a_type_that_it_has_not_is_refused_by_name(tmp_path: Path) -> None:
    file = written(tmp_path / "union.safetensors")
    for name in ("image", "tile"):
        with pytest.raises(ValueError, match=f"of 6 types of hints, card '{name}'.*one of .*canny"):
            build_control(file, target(), CONTROL_CARDS[name])
    promax = written(tmp_path / "promax.safetensors", types=8)
    assert build_control(promax, target(), CONTROL_CARDS["tile"]).kind.type == 6


def test_it_acts_around_a_unet_as_a_control() -> None:
    network = random_union()
    net: Any = randomise(build_network(UNET), 1)
    kind = UnionKind(network=network, type=3)
    x, t, cond, _, hint = inputs()
    part = ControlPart(kind=kind, strength=0.5, guess=False, interval=EVERYWHERE)
    hints = (torch.ones(2, dtype=torch.bool), *kind.prepare(hint))
    with torch.no_grad():
        found = Controlled(net, [part])(x, t, replace(cond, hints=hints))
        maps = network(x, t, cond, *kind.prepare(hint))
        wanted = net(x, t, replace(cond, residuals=tuple(0.5 * each for each in maps)))
    assert error(found, wanted) < TOLERANCE
    with pytest.raises(ValueError, match="types: expected the shape"):
        network(x, t, cond, kind.prepare(hint)[0])
