"""ControlNet-LLLite of pipelines: parity with hooks of plain operators on diffusers' UNet, places, refusals.

The reference follows the format: before a projection, x ← x + s·up(relu(mid([c, relu(down x)]))).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reduced_families
import torch
import torch.nn.functional as F
from control_nets import lines, write_png
from diffusers_pipelines import differ, diffusers_network
from reduced_families import NETWORKS, SDXL
from torch import Tensor, nn

import ldm
from ldm.diffusion.cond import Cond
from ldm.models.control.controlled import ALWAYS, Controlled, ControlPart
from ldm.registry.inspection import inspect
from ldm.registry.replaying import replay
from ldm.weights.controls.lllite import lllite_config, lllite_places
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import build_network

CALL: dict[str, Any] = {"steps": 4, "seed": 3, "sampler": "ddim", "progress": False}
# three levels of two blocks, numbered as those of Stable Diffusion XL
XL = {
    **NETWORKS["sdxl-base"],
    "unet": {**SDXL, "channels": [32, 64, 96], "depth": [0, 2, 2], "blocks": 2},
}
TRANSFORMERS = {  # the name in files: that of diffusers, width, depth of the hint's reduction
    "input_blocks_4_1": ("down_blocks.1.attentions.0", 64, 2),
    "input_blocks_5_1": ("down_blocks.1.attentions.1", 64, 2),
    "input_blocks_7_1": ("down_blocks.2.attentions.0", 96, 3),
    "input_blocks_8_1": ("down_blocks.2.attentions.1", 96, 3),
    "middle_block_1": ("mid_block.attentions.0", 96, 3),
}
PROJECTIONS = ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn2_to_q")
SIDE = 8  # of the latent
STRIDES = {2: (4, 4), 3: (4, 4, 2)}
EMBED, HIDDEN = 8, 6


def names() -> Iterator[tuple[str, str, int, int]]:
    """Yield each network's name in files, the name of its layer in diffusers, width and depth."""
    for stem, (place, width, depth) in TRANSFORMERS.items():
        for block in range(2):
            for projection in PROJECTIONS:
                attention, _, to = projection.partition("_")
                yield (
                    f"lllite_unet_{stem}_transformer_blocks_{block}_{projection}",
                    f"{place}.transformer_blocks.{block}.{attention}.{to}",
                    width,
                    depth,
                )


def random_file(seed: int = 1) -> dict[str, Tensor]:
    """Return the tensors of a file whose networks are random."""
    draw = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        inner = max(1, torch.Size(shape[1:]).numel())
        state[f"{name}.weight"] = torch.randn(*shape, generator=draw) * inner**-0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=draw)

    for name, _, width, depth in names():
        strides = STRIDES[depth]
        channels = (3, *[EMBED // 2] * (len(strides) - 1), EMBED)
        for i, stride in enumerate(strides):
            put(f"{name}.conditioning1.{2 * i}", channels[i + 1], channels[i], stride, stride)
        put(f"{name}.down.0", HIDDEN, width)
        put(f"{name}.mid.0", HIDDEN, EMBED + HIDDEN)
        put(f"{name}.up.0", width, HIDDEN)
    return state


def reference_hooks(network: nn.Module, state: dict[str, Tensor], hint: Tensor, strength: float) -> list[Any]:
    """Let the layers of a UNet with diffusers' names compute what the file states; return the hooks."""
    layers, hooks = dict(network.named_modules()), []
    for name, place, _, depth in names():

        def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name, depth: int = depth) -> Any:
            def own(part: str, x: Tensor) -> Tensor:
                return F.linear(x, state[f"{name}.{part}.0.weight"], state[f"{name}.{part}.0.bias"])

            c = (hint - 0.5) / 0.5
            for i, stride in enumerate(STRIDES[depth]):
                weight, bias = (state[f"{name}.conditioning1.{2 * i}.{leaf}"] for leaf in ("weight", "bias"))
                c = F.conv2d(F.relu(c) if i else c, weight, bias, stride=stride)
            x = args[0]
            c = c.flatten(2).transpose(1, 2).expand(len(x), -1, -1)
            added = own("up", F.relu(own("mid", torch.cat([c, F.relu(own("down", x))], dim=2))))
            return (x + strength * added, *args[1:])

        hooks.append(layers[place].register_forward_pre_hook(hook))
    return hooks


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    made = reduced_families.load(reduced_families.register("sdxl-base", tmp_path, networks=XL).name)
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "canny-lllite.safetensors", random_file())
    return tmp_path / "canny-lllite.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
def test_outputs_equal_those_of_plain_operators_on_diffusers_unet(
    pipe: Any, path: Path, strength: float
) -> None:
    unet, loaded = pipe.networks()["unet"], pipe.controls.load(path)
    assert loaded.what == "ControlNet-LLLite" and len(loaded.network) == len(list(names())) == 40
    x, t = torch.randn(2, 4, SIDE, SIDE), torch.tensor([700.0, 20.0])
    context, pooled = torch.randn(2, 7, 80), torch.randn(2, unet.config.pooled_dim)
    hint = torch.rand(1, 3, 8 * SIDE, 8 * SIDE)
    cond = Cond(context=context, pooled=pooled)
    plain = unet(x, t, cond)
    part = ControlPart(kind=loaded.kind, strength=strength, guess=False, interval=ALWAYS)
    hints = (torch.tensor([True, True]), loaded.kind.prepare(hint)[0].expand(2, -1, -1, -1))
    own = Controlled(unet, [part])(x, t, Cond(context=context, pooled=pooled, hints=hints))
    hooks = reference_hooks(unet, random_file(), hint, strength)
    wanted = unet(x, t, cond)
    for hook in hooks:
        hook.remove()
    peer = diffusers_network(unet)
    reference_hooks(peer, random_file(), hint, strength)
    # diffusers embeds text and sizes itself; the vector is given to its last layer but one
    peer.add_time_proj.forward = lambda _: pooled[:, 24:].reshape(-1)
    theirs = peer(
        x,
        t,
        context,
        added_cond_kwargs={"text_embeds": pooled[:, :24], "time_ids": torch.zeros(2, 6)},
    ).sample
    rms = float(theirs.square().mean().sqrt())
    assert float((plain - theirs).abs().max()) > 1e-2 * rms
    for each in (own, wanted):
        assert float((each - theirs).square().mean().sqrt()) < 1e-5 * rms
    off = Controlled(unet, [part])(
        x, t, Cond(context=context, pooled=pooled, hints=(torch.tensor([True, False]), hints[1]))
    )
    # the batch has another size inside the control
    assert torch.equal(off[1], plain[1]) or float((off[1] - plain[1]).abs().max()) < 1e-5 * rms
    assert float((off[0] - own[0]).abs().max()) < 1e-4 * rms


def test_images(pipe: Any, path: Path, tmp_path: Path) -> None:
    hint = lines(32)
    size: dict[str, Any] = {"height": 32, "width": 32}
    plain = pipe.text_to_image("a cat", **CALL, **size).tensor
    pipe.controls.load(path, name="a")
    pipe.controls.load(path, name="b")
    image = write_png(tmp_path / "hint.png", hint)
    made = pipe.text_to_image("a cat", controls=[ldm.Control("a", image, end=0.5)], **CALL, **size)
    unet = pipe.networks()["unet"]
    enlarged = F.interpolate(hint, (128, 128), mode="bicubic", antialias=True).clamp(0, 1)
    hooks = reference_hooks(unet, random_file(), enlarged, 1.0)

    def stop(i: int, *_: Any) -> None:
        if i == 1:
            for hook in hooks:
                hook.remove()

    wanted = pipe.text_to_image("a cat", on_step=stop, **CALL, **size).tensor
    assert float((made.tensor - wanted).abs().max()) < 1 / 255 and differ(made.tensor, plain)
    again = replay(made.recipe, weights="random", controls=path.parent)
    assert torch.equal(again.tensor, made.tensor)
    both = pipe.text_to_image("a cat", controls=[("a", image), ("b", image, 0.5)], **CALL, **size).tensor
    assert differ(both, made.tensor)
    pipe.controls.remove("a")
    pipe.controls.remove("b")
    assert torch.equal(pipe.text_to_image("a cat", **CALL, **size).tensor, plain)


def test_windows_and_optimized_pipelines(pipe: Any, path: Path) -> None:
    pipe.controls.load(path, name="a")
    hint = torch.cat([lines(32), lines(32, 1)], dim=-1)
    call: dict[str, Any] = {"controls": [("a", hint)], "height": 32, "width": 64, **CALL}
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = pipe.text_to_image("a cat", **call).tensor
    ldm.optimize(pipe)
    assert float((pipe.text_to_image("a cat", **call).tensor - plain).abs().max()) < 1e-3
    wider = pipe.outpaint("a cat", image, right=32, window=32, controls=[("a", hint)], **CALL)
    assert wider.tensor.shape[-2:] == (32, 64)


def test_what_does_not_fit_is_refused(pipe: Any, path: Path, tmp_path: Path) -> None:
    def refused(change: Any, message: str) -> None:
        state = random_file()
        change(state)
        bad = tmp_path / "bad.safetensors"
        write_safetensors(bad, state)
        with pytest.raises(ValueError, match=message):
            pipe.controls.load(bad)
        assert not len(pipe.controls)

    first = next(names())[0]
    refused(lambda s: s.pop(f"{first}.up.0.bias"), "up.0.bias")
    refused(lambda s: s.update({"other.weight": torch.zeros(2)}), "other.weight")
    refused(lambda s: s.pop(f"{first}.down.0.weight"), "expected down, mid, up")
    refused(lambda s: s.update({f"{first}.mid.0.bias": torch.full((HIDDEN,), torch.nan)}), "finite|NaN")
    refused(lambda s: s.update({f"{first}.down.0.weight": torch.zeros(HIDDEN, 64, 1, 1)}), "convolution")

    def renamed(state: dict[str, Tensor], old: str, new: str) -> None:
        for key in [key for key in state if old in key]:
            state[key.replace(old, new)] = state.pop(key)

    refused(lambda s: renamed(s, "input_blocks_4_1", "input_blocks_44_1"), "made for Stable Diffusion XL")
    refused(lambda s: renamed(s, "input_blocks_4_1", "output_blocks_0_1"), "64 channels, the UNet has one of")
    refused(lambda s: renamed(s, "input_blocks_8_1", "output_blocks_3_1"), "has one of 64")
    refused(lambda s: renamed(s, "attn2_to_q", "attn2_to_out_0"), "expected to_q, to_k, to_v")
    small = reduced_families.load(reduced_families.register("sd-v1-5", tmp_path).name)
    with pytest.raises(ValueError, match="was made for Stable Diffusion XL"):
        small.controls.load(path)


def test_inspect(path: Path) -> None:
    text = inspect(path, nan=True).text()
    assert "ControlNet-LLLite" in text and "Stable Diffusion XL" in text and "no NaN" in text
    assert "40 networks before projections" in text and "canny: hints are edges" in text
    assert "it does not fit sdxl-base" in text  # the widths are reduced


def test_places_in_the_full_unet(tmp_path: Path) -> None:
    """Kohya's default: attn1's three projections and attn2's queries, on the way down and in the middle."""
    from ldm.catalog.lookup import find_card

    config: Any = find_card("sdxl-base")[0].shapes()["unet"]
    widths = {"input_blocks_4_1": 640, "input_blocks_5_1": 640, "input_blocks_7_1": 1280}
    widths |= {"input_blocks_8_1": 1280, "middle_block_1": 1280}
    shapes: dict[str, tuple[int, ...]] = {}
    for stem, width in widths.items():
        for block in range(2 if width == 640 else 10):
            for projection in PROJECTIONS:
                name = f"lllite_unet_{stem}_transformer_blocks_{block}_{projection}"
                shapes |= {f"{name}.down.0.weight": (64, width), f"{name}.mid.0.weight": (64, 96)}
                shapes |= {f"{name}.up.0.weight": (width, 64)}
                strides = STRIDES[2 if width == 640 else 3]
                for i, stride in enumerate(strides):
                    out = 32 if i == len(strides) - 1 else 16
                    shapes[f"{name}.conditioning1.{2 * i}.weight"] = (out, 16, stride, stride)
    made = lllite_config(shapes, source=tmp_path)
    places = lllite_places(made, build_network(config), source=tmp_path)
    assert len(places) == 136 == len(set(places.values()))
    first = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k"
    assert places[first] == ("down_blocks.1.attentions.0.transformer_blocks.0.attn1", "to_k")
