"""IP-Adapter: parity with diffusers inside a UNet for each kind, parameters and keys at full size."""

from __future__ import annotations

import threading
from typing import Any

import diffusers
import pytest
import torch
from reduced_families import NETWORKS
from shared_weights import TOLERANCE, error
from torch import Tensor, nn

from ldm.catalog.shapes import UNETS, VISIONS
from ldm.diffusion.cond import Cond
from ldm.models.control.controlled import Controlled, ControlPart
from ldm.models.control.ip_adapter import IPAdapter, IPAdapterConfig, IPAdapterKind, cross_attentions
from ldm.models.layers.attention import Attention
from ldm.models.layers.embeddings import vector_condition
from ldm.models.unet_config import UNetConfig
from ldm.support.config import build
from ldm.weights.controls.ip_adapter import attention_widths, ip_adapter_config
from ldm.weights.formats.diffusers_config import unet_config
from ldm.weights.parts import build_network, randomise, shapes_of, to_layout

EVERYWHERE = (float("-inf"), float("inf"))
# the published kinds: UNet, kind, width of what is read, tokens, resampler, parameters
FULL_SIZE: dict[str, tuple[str, Any, int, int, tuple[int, int, int], int]] = {
    "sd1-base": ("sd1", "base", 1024, 4, (768, 4, 12), 22_319_616),
    "sd1-plus": ("sd1", "plus", 1280, 16, (768, 4, 12), 49_087_488),
    "sdxl-bigg": ("sdxl", "base", 1280, 4, (1280, 4, 20), 351_285_248),
    "sdxl-vit-h": ("sdxl", "base", 1024, 4, (1280, 4, 20), 349_188_096),
    "sdxl-plus": ("sdxl", "plus", 1280, 16, (1280, 4, 20), 423_748_864),
}
IDS = {"sd1": [*range(1, 32, 2)], "sdxl": [*range(1, 140, 2)]}


def widths_of(unet: nn.Module) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return attention_widths(
        {name: part.to_q.out_features for name, part in unet.named_modules() if isinstance(part, Attention)}
    )


def full_config(name: str) -> IPAdapterConfig:
    unet, kind, image_dim, tokens, resampler, _ = FULL_SIZE[name]
    _, widths = widths_of(build_network(UNETS[unet]))
    return IPAdapterConfig(
        kind=kind,
        image_dim=image_dim,
        context_dim=UNETS[unet].context_dim or 0,
        tokens=tokens,
        widths=widths,
        resampler=resampler,
    )


def small_config(unet: nn.Module, kind: Any) -> IPAdapterConfig:
    return IPAdapterConfig(
        kind=kind,
        image_dim=24,
        context_dim=unet.config.context_dim,
        tokens=4,
        widths=widths_of(unet)[1],
        resampler=(32, 4, 2),
    )


def peer_unet(unet: Any, adapter: IPAdapter) -> Any:
    """Return diffusers' UNet over the same tensors, with the adapter that its own code converts."""
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(unet_config(unet.config)[1])
    theirs.load_state_dict(to_layout(unet, "diffusers"), assign=True, strict=True)
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in adapter.state_dict().items():
        part, _, name = key.partition(".")
        state[part][name] = value.clone()
    theirs._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    return theirs.eval().requires_grad_(False)


def assert_parity(unet_shape: UNetConfig, make: Any, side: int) -> None:
    unet: Any = randomise(build_network(unet_shape), 1)
    adapter: Any = randomise(build_network(make(unet)), 2)
    g = torch.Generator().manual_seed(0)
    config = adapter.config
    x, t = torch.randn(2, 4, side, side, generator=g), torch.tensor([300.0, 300.0])
    context = torch.randn(2, 7, unet_shape.context_dim or 0, generator=g)
    read = torch.randn(2, *(() if config.kind == "base" else (5,)), config.image_dim, generator=g)
    added: dict[str, Any] = {"image_embeds": [read[:, None]]}
    pooled = None
    if unet_shape.pooled_dim:
        text, sizes = (
            torch.randn(2, unet_shape.pooled_dim - 6 * 256, generator=g),
            torch.tensor([[32.0, 32, 0, 4, 32, 32]]).expand(2, -1),
        )
        pooled = vector_condition(text, sizes)
        added |= {"text_embeds": text, "time_ids": sizes}
    names, _ = widths_of(unet)
    kind = IPAdapterKind(network=adapter, vision=None, attentions=names)  # type: ignore[arg-type]
    part = ControlPart(kind=kind, strength=0.7, guess=False, interval=EVERYWHERE)
    with torch.no_grad():
        hints = (torch.ones(2, dtype=torch.bool), adapter(read))
        ours = Controlled(unet, [part])(x, t, Cond(context=context, pooled=pooled, hints=hints))
        plain = unet(x, t, Cond(context=context, pooled=pooled))
        theirs = peer_unet(unet, adapter)
        for processor in theirs.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [0.7]
        wanted = theirs(x, t, context, added_cond_kwargs=added).sample
    assert error(ours, wanted) < TOLERANCE and error(plain, wanted) > 0.01


@pytest.mark.parametrize("family", ["sd-v1-5", "sdxl-base"])
@pytest.mark.parametrize("kind", ["base", "plus", "full"])
def test_parity_with_diffusers(family: str, kind: str) -> None:
    shape = build(UNetConfig, NETWORKS[family]["unet"])
    assert_parity(shape, lambda unet: small_config(unet, kind), 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_parity_with_diffusers_at_full_size(name: str) -> None:
    assert_parity(UNETS[FULL_SIZE[name][0]], lambda _: full_config(name), 8)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_parameters_and_keys_at_full_size(name: str) -> None:
    config = full_config(name)
    network = build_network(config)
    assert isinstance(network, IPAdapter)
    assert sum(p.numel() for p in network.parameters()) == FULL_SIZE[name][-1]
    shapes = shapes_of(network)
    found = [int(key.split(".")[1]) for key in shapes if key.endswith(".to_k_ip.weight")]
    assert found == IDS[FULL_SIZE[name][0]]
    own = ip_adapter_config(shapes, source="a file")
    assert (own.kind, own.image_dim, own.tokens, own.widths) == (
        config.kind,
        config.image_dim,
        config.tokens,
        config.widths,
    )
    assert config.kind != "plus" or own.resampler == config.resampler
    tower = VISIONS["clip-bigg" if name == "sdxl-bigg" else "clip-h"]
    assert config.image_dim == (tower.embed_dim if config.kind == "base" else tower.width)


def test_order_of_the_attentions_is_down_up_middle() -> None:
    names = ["down_blocks.0.x.attn1", "down_blocks.0.x.attn2", "mid_block.x.attn2", "up_blocks.1.x.attn2"]
    assert cross_attentions(names) == [names[1], names[3], names[2]]


def test_kinds_that_read_identities_are_refused() -> None:
    shapes = {"ip_adapter.1.to_k_ip.weight": (8, 16), "image_proj.proj.0.weight": (8, 8)}
    with pytest.raises(ValueError, match="of the kind FaceID"):
        ip_adapter_config({**shapes, "image_proj.norm.weight": (16,)}, source="a file")
    with pytest.raises(ValueError, match="of no known kind"):
        ip_adapter_config(shapes, source="a file")


def test_other_threads_and_later_calls_are_not_changed() -> None:
    unet: Any = randomise(build_network(build(UNetConfig, NETWORKS["sd-v1-5"]["unet"])), 1)
    adapter: Any = randomise(build_network(small_config(unet, "base")), 2)
    names, _ = widths_of(unet)
    kind = IPAdapterKind(network=adapter, vision=None, attentions=names)  # type: ignore[arg-type]
    part = ControlPart(kind=kind, strength=1.0, guess=False, interval=EVERYWHERE)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 7, 32)
    hints = (torch.ones(1, dtype=torch.bool), adapter(torch.randn(1, 24)))
    found: list[Tensor] = []

    def plain() -> Tensor:
        with torch.no_grad():
            return unet(x, t, Cond(context=context))

    before = plain()

    class Asking(nn.Module):
        """Runs the plain UNet in another thread while the controlled one computes."""

        config = unet.config

        def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            thread = threading.Thread(target=lambda: found.append(plain()))
            thread.start()
            thread.join()
            out: Tensor = unet(x, t, cond)
            return out

    asking = Asking()
    asking.net = unet
    controlled = Controlled(asking, [part])
    controlled._attentions = Controlled(unet, [part])._attentions
    with torch.no_grad():
        changed = controlled(x, t, Cond(context=context, hints=hints))
    assert torch.equal(found[0], before) and torch.equal(plain(), before)
    assert error(changed, before) > 0.01
