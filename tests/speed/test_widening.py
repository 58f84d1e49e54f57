"""Parameters of 16 bits on a processor that does not multiply them: the result is that of rounded weights."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import UNETS, inputs, make, rms
from tiny_latent_diffusion import tiny_model
from torch import nn

import ldm
from ldm.models.clip.config import TextConfig, VisionConfig
from ldm.models.clip.towers import TextTower, VisionTower
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.speed import packed, widening
from ldm.speed.kernels import build
from ldm.support.device import computing_dtype
from ldm.weights.parts import randomise

NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_bf16(monkeypatch):
    """Take the processor for one without bfloat16, and use Winograd's convolution for small maps."""
    monkeypatch.setattr(widening, "fast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(packed, "WIDE", 16)
    monkeypatch.setattr(packed, "POSITIONS", 1)


def rounded(net, dtype):
    """Return a copy whose parameters are rounded to a dtype, in float32."""
    return copy.deepcopy(net).to(dtype).float()


@torch.no_grad()
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("kernels", "memory"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_computes_as_with_rounded_weights(name, kernels, memory, dtype):
    plain, args = make(UNETS[name]), inputs(UNETS[name], torch.float32)
    narrow = copy.deepcopy(plain).to(dtype)
    before = {key: value.clone() for key, value in narrow.state_dict().items()}
    ldm.optimize(narrow, kernels=kernels, memory=memory)
    assert computing_dtype(narrow) == torch.float32
    got, expected = narrow(*args), rounded(plain, dtype)(*args)
    assert got.dtype == torch.float32 and rms(got, expected) < 1e-5
    assert rms(expected, plain(*args)) > 1e-4  # the rounding of the weights is seen
    assert {p.dtype for p in narrow.parameters()} == {dtype}
    after = narrow.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert any("widened" in line for line in narrow.optimizations)


@torch.no_grad()
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_classes_towers_and_autoencoders_compute_as_with_rounded_weights(dtype):
    ids = torch.tensor([[1, 5, 6, 2, 0], [1, 4, 2, 0, 0]])
    small = {"width": 16, "layers": 2, "heads": 2, "embed_dim": 8, "activation": "gelu"}
    text = randomise(TextTower(TextConfig(vocab_size=20, context_length=5, bos_id=1, eot_id=2, **small)))
    vision = randomise(VisionTower(VisionConfig(image_size=8, patch_size=4, **small)))
    classes = randomise(
        ldm.models.unet.UNet(UNetConfig(channels=(16, 32), depth=(0, 0), mid_depth=0, blocks=1, classes=5))
    )
    vae = make(VAEConfig(channels=(16, 32), blocks=1))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = ldm.Cond(pooled=torch.tensor([1, 4]))
    runs = [
        (text, lambda net: net(ids, pooled=True).pooled),
        (text, lambda net: net(ids).tokens),
        (vision, lambda net: net(noise[:, :3].float()).pooled),
        (classes, lambda net: net(noise, torch.tensor([5.0, 600.0]), cond)),
        (vae, lambda net: net.decode(noise)),
        (vae, lambda net: net.encode(net.decode(noise)).mode()),
    ]
    for net, run in runs:
        fast = ldm.optimize(copy.deepcopy(net).to(dtype))
        assert rms(run(fast), run(rounded(net, dtype))) < 1e-5
        assert rms(run(fast), run(net)) > 1e-5


@torch.no_grad()
def test_an_image_is_that_of_the_rounded_weights():
    pipe = tiny_model()
    narrow = copy.deepcopy(pipe).to(torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    ldm.optimize(narrow)
    assert narrow.dtype == torch.float32 and next(narrow.parameters()).dtype == torch.bfloat16
    expected = rounded(pipe, torch.bfloat16).text_to_image("a red apple", seed=3, progress=False).tensor
    for one in (narrow, copy.deepcopy(narrow), ldm.optimize(narrow, memory=True), ldm.optimize(narrow)):
        image = one.text_to_image("a red apple", seed=3, progress=False)
        assert (image.tensor - expected).abs().max() < 1e-4
        assert (image.recipe["dtype"], image.recipe["computed_in"]) == ("bfloat16", "float32")
    parts = [part for part in narrow.modules() if isinstance(part, nn.LayerNorm)]
    assert parts and all(type(part) is widening.WideLayerNorm for part in parts)
    widening.undo_widening(narrow)
    assert narrow.dtype == torch.bfloat16 and all(type(part) is nn.LayerNorm for part in parts)


def test_gradients_are_those_of_rounded_weights():
    config = UNETS["sd"]
    plain, args = make(config), inputs(config, torch.float32)
    wide, narrow = rounded(plain, torch.bfloat16), ldm.optimize(copy.deepcopy(plain).to(torch.bfloat16))
    for net in (wide, narrow):
        net.requires_grad_()
        net(*args).square().mean().backward()
    for (name, a), b in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert b.grad.dtype == torch.bfloat16
        assert (a.grad - b.grad.float()).abs().max() <= 0.01 * a.grad.abs().max() + 1e-6, name


@torch.no_grad()
def test_a_changed_weight_and_a_moved_network_count():
    plain, args = make(UNETS["sd"]), inputs(UNETS["sd"], torch.float32)
    fast = ldm.optimize(copy.deepcopy(plain).to(torch.bfloat16))
    fast(*args)
    for net in (plain, fast):
        net.conv_in.weight.data.mul_(0.5)
        net.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(2)
    assert rms(fast(*args), rounded(plain, torch.bfloat16)(*args)) < 1e-5
    assert rms(fast.float()(*args), rounded(plain, torch.bfloat16)(*args)) < 1e-5


@torch.no_grad()
def test_nothing_changes_where_the_processor_multiplies_the_dtype(monkeypatch):
    monkeypatch.setattr(widening, "fast_dtype", lambda device: torch.bfloat16)
    fast = ldm.optimize(make(UNETS["sd"]).to(torch.bfloat16))
    assert computing_dtype(fast) == torch.bfloat16
    assert not any("widened" in line for line in fast.optimizations)
    half = ldm.optimize(make(UNETS["sd"]).to(torch.float16))
    assert computing_dtype(half) == torch.float32


def test_no_copy_of_the_weights_is_kept():
    """Without a reader of the weights there is nothing derived from them."""
    if not build.library():
        pytest.skip("no kernels")
    fast, args = ldm.optimize(make(UNETS["sd"]).to(torch.bfloat16)), inputs(UNETS["sd"], torch.float32)
    with torch.no_grad():
        fast(*args)
    kept = [
        value.value
        for part in fast.modules()
        for value in vars(part).values()
        if type(value).__name__ == "Derived"
    ]
    assert all(value is None for value in kept)
