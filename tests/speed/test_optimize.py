"""`ldm.optimize` changes how networks compute, and not what."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_latent_diffusion import tiny_model
from torch import nn

import ldm
from ldm.diffusion.cond import Cond
from ldm.models.layers.attention import attention_control
from ldm.models.layers.resblock import ResBlock, Upsample
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.speed import optimization as module
from ldm.speed import packed
from ldm.speed.kernels.build import NoKernels, library
from ldm.speed.packed import ContextLinear, FoldedUpsample, PackedConv2d
from ldm.speed.strips import Map, StripDecoder
from ldm.weights.parts import randomise

BARS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
UNETS = {
    "sd": UNetConfig(channels=(32, 64), depth=(1, 1), blocks=1, heads=4, context_dim=24),
    "linear": UNetConfig(
        channels=(32, 64),
        depth=(0, 2),
        blocks=1,
        heads=None,
        head_dim=8,
        context_dim=24,
        linear_projection=True,
        pooled_dim=12,
    ),
    "decoder": UNetConfig(
        channels=(32, 64),
        depth=(0, 1),
        blocks=1,
        heads=None,
        head_dim=8,
        context_dim=24,
        attention="block",
        scale_shift=True,
        resample="resblock",
    ),
}


def rms(a, b):
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().std())


def has_kernels():
    try:
        return bool(library())
    except NoKernels:
        return False


def without_kernels(monkeypatch):
    def native():
        raise NoKernels("a test")

    monkeypatch.setattr(module, "Native", native)


def small_maps_by_winograd(monkeypatch):
    """As if narrow and small maps were worth it."""
    monkeypatch.setattr(packed, "WIDE", 16)
    monkeypatch.setattr(packed, "POSITIONS", 1)


def make(config, dtype=torch.float32):
    with torch.device("meta"):
        net = UNet(config) if isinstance(config, UNetConfig) else AutoencoderKL(config)
    return randomise(net, dtype=dtype)


def inputs(config, dtype, batch=2):
    g = torch.Generator().manual_seed(5)
    pooled = torch.randn(batch, config.pooled_dim, generator=g).to(dtype) if config.pooled_dim else None
    cond = Cond(
        context=torch.randn(batch, 7, 24, generator=g).to(dtype),
        context_mask=torch.arange(7).expand(batch, 7) < 5,
        pooled=pooled,
    )
    return torch.randn(batch, 4, 12, 10, generator=g).to(dtype), torch.tensor([10.0, 700.0])[:batch], cond


@torch.no_grad()
@pytest.mark.parametrize(("kernels", "winograd"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_computes_the_same(monkeypatch, name, kernels, winograd):
    if winograd:
        small_maps_by_winograd(monkeypatch)
    config = UNETS[name]
    plain = make(config)
    x, t, cond = inputs(config, torch.float32)
    expected = plain(x, t, cond)
    fast = ldm.optimize(copy.deepcopy(plain), kernels=kernels)
    assert rms(fast(x, t, cond), expected) < BARS[torch.float32]
    half = ldm.optimize(copy.deepcopy(plain).to(torch.bfloat16), kernels=kernels)
    went = [
        part for part in fast.modules() if isinstance(part, PackedConv2d) and part.transformed is not None
    ]
    assert bool(went) == (kernels and winograd and has_kernels())
    assert half is ldm.optimize(half)  # once more changes nothing
    own = rms(copy.deepcopy(plain).to(torch.bfloat16)(*inputs(config, torch.bfloat16)), expected)
    assert rms(half(*inputs(config, torch.bfloat16)), expected) < max(
        BARS[torch.bfloat16], 1.2 * own
    )  # no more than bfloat16 itself costs


@torch.no_grad()
@pytest.mark.parametrize("winograd", [False, True])
def test_an_optimised_network_saves_loads_copies_and_moves_as_before(monkeypatch, winograd):
    if winograd:
        small_maps_by_winograd(monkeypatch)
    plain = make(UNETS["sd"])
    fast = ldm.optimize(copy.deepcopy(plain))
    args = inputs(UNETS["sd"], torch.float32)
    expected = fast(*args)
    assert isinstance(fast.conv_in, PackedConv2d) and fast.conv_in.packed is not None
    assert any(
        isinstance(part, PackedConv2d) and part.transformed is not None for part in fast.modules()
    ) == (winograd and has_kernels())
    state = fast.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(copy.deepcopy(fast)(*args), expected)
    assert torch.equal(fast.double().float()(*args), expected)
    other = {key: 0.5 * value for key, value in state.items()}
    fast.load_state_dict(other)
    plain.load_state_dict(other)
    assert rms(fast(*args), plain(*args)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("before", [False, True])
def test_memory_can_be_had_after_a_run_left_again_and_converted_under(before):
    """Weights that lie elsewhere than in the file are none that may be let leave memory."""
    plain = make(UNETS["sd"])
    args = inputs(UNETS["sd"], torch.float32)
    expected, fast = plain(*args), ldm.optimize(copy.deepcopy(plain))
    if before:
        fast(*args)  # packs
    ldm.optimize(fast, memory=True)
    for _ in range(2):
        assert rms(fast(*args), expected) < 1e-5
    storage = fast.conv_in.spilled.storage
    assert fast.conv_in.weight.untyped_storage().data_ptr() == storage.data_ptr()
    fast.double().float()
    for _ in range(2):
        assert rms(fast(*args), expected) < 1e-5
    ldm.optimize(fast, memory=True)
    ldm.optimize(fast)
    assert (
        fast.conv_in.spilled is None
        and not fast._forward_hooks
        and not any("at rest" in line for line in fast.optimizations)
    )
    for _ in range(2):
        assert rms(fast(*args), expected) < 1e-5


@torch.no_grad()
def test_a_convolution_that_wraps_around_still_does(monkeypatch):
    small_maps_by_winograd(monkeypatch)
    conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular").requires_grad_(False)
    x = torch.randn(1, 16, 9, 8)
    assert rms(ldm.optimize(nn.Sequential(copy.deepcopy(conv)))(x), conv(x)) < 1e-5


def test_gradients_flow_as_before():
    plain = make(UNETS["sd"])
    fast = ldm.optimize(copy.deepcopy(plain))
    x, t, cond = inputs(UNETS["sd"], torch.float32)
    with torch.no_grad():
        fast(x, t, cond)  # packs
    slopes = []
    for net in (plain, fast):
        y = x.clone().requires_grad_()
        net(y, t, cond).square().sum().backward()
        slopes.append(y.grad)
    assert rms(slopes[1], slopes[0]) < 1e-5


@pytest.mark.parametrize("kernels", [True, False])
def test_training_goes_as_before_with_looks_in_between(kernels):
    plain = make(UNETS["linear"]).requires_grad_(True)
    fast = ldm.optimize(copy.deepcopy(plain), kernels=kernels)
    args = inputs(UNETS["linear"], torch.float32)
    looks = []
    for net in (plain, fast):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(3):
            with torch.no_grad():
                looks.append(net(*args))
            net(*args).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert looks[2].square().mean() < 0.9 * looks[0].square().mean()  # it learns
    for expected, got in zip(looks[:3], looks[3:], strict=True):
        assert rms(got, expected) < 2e-5  # three steps of rounding


@torch.no_grad()
def test_attention_can_still_be_looked_at():
    fast = ldm.optimize(make(UNETS["sd"]))
    args = inputs(UNETS["sd"], torch.float32)
    expected, seen = fast(*args), []
    with attention_control(fast, lambda name, p: seen.append(p.sum(-1)) or None):
        assert rms(fast(*args), expected) < 1e-5
    assert len(seen) == 7 and all(torch.allclose(s, torch.ones(()), atol=1e-5) for s in seen)


@torch.no_grad()
def test_keys_and_values_are_computed_once_for_a_context(monkeypatch):
    layer = nn.Linear(24, 8).requires_grad_(False)
    layer.__class__ = ContextLinear
    context = torch.randn(2, 7, 24)
    first = layer(context)
    assert layer(context) is first
    context.mul_(2)  # the same tensor, other numbers
    assert not torch.equal(layer(context), first)
    assert layer(context.clone()) is not layer(context)


@torch.no_grad()
def test_guidance_gives_the_network_the_same_context_at_every_step():
    pipe, seen = tiny_model(), []
    pipe.denoiser.net.register_forward_pre_hook(lambda module, args: seen.append(args[2].context))
    pipe.text_to_image("a red cat", steps=3, progress=False)
    assert len(seen) == 3 and all(context is seen[0] for context in seen)


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 6), (1, 1), (8, 3)])
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_folded_upsampling_is_the_same_convolution(size, dtype):
    plain = Upsample(32).to(dtype).requires_grad_(False)
    folded = copy.deepcopy(plain)
    folded.__class__ = FoldedUpsample
    x = torch.randn(2, 32, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = copy.deepcopy(plain).double()(x.double())
    assert rms(folded(x), expected) < BARS[dtype] / 2
    odd = (2 * size[0] - 1, 2 * size[1])  # where halving had rounded up
    assert torch.equal(folded(x, odd), plain(x, odd))
    folded.conv.weight.mul_(2), folded.conv.bias.mul_(2)
    folded.to(torch.float64).to(dtype)  # moving folds anew
    assert rms(folded(x), 2 * expected) < BARS[dtype] / 2


@torch.no_grad()
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(channels=(16, 32, 32), blocks=1),
        VAEConfig(channels=(16, 32), blocks=1, attention_levels=(0,), patch=2),
    ],
    ids=["three", "two"],
)
def test_strips_have_the_seams_of_the_whole_picture(config, kernels, monkeypatch):
    from ldm.speed import strips

    plain = make(config)
    z = torch.randn(2, 4, 20, 13, generator=torch.Generator().manual_seed(0)) + 1
    expected = plain.decode(z)
    fast = ldm.optimize(copy.deepcopy(plain), kernels=kernels)
    assert isinstance(fast.decoder, StripDecoder)
    kept = []
    block = strips.res_block
    monkeypatch.setattr(
        strips,
        "res_block",
        lambda ops, own, source, inner: kept.append(inner is not None) or block(ops, own, source, inner),
    )
    # strips of eight rows; one strip; strips, and no doubled map whole; and nothing kept between the
    # convolutions of a block
    for strip, large, spare in (
        (1, 2**28, False),
        (2**25, 2**28, False),
        (1, 1, False),
        (1, 1, True),
        (2**12, 1, True),
    ):
        monkeypatch.setattr(strips, "STRIP", strip), monkeypatch.setattr(strips, "LARGE", large)
        fast.decoder.spare = spare
        kept.clear()
        assert rms(fast.decode(z), expected) < 1e-5
        assert set(kept) <= {not spare} and (kept or strip == 2**25)
    seen = []
    hook = (
        fast.decoder.up_blocks[-1].resnets[0].register_forward_hook(lambda block, x, y: seen.append(y.shape))
    )
    assert rms(fast.decode(z), expected) < 1e-5 and len(seen) == 1  # who looks at a layer sees it
    hook.remove()
    half = fast.to(torch.bfloat16)
    assert rms(half.decode(z.to(torch.bfloat16)), expected) < 2.5e-2
    assert (
        rms(
            fast.encode(expected.to(torch.bfloat16).clamp(-1, 1)).mean,
            plain.encode(expected.clamp(-1, 1)).mean,
        )
        < 2e-2
    )


def test_rows_of_a_doubled_map_are_those_of_the_whole():
    up = Upsample(4).requires_grad_(False)
    x = torch.randn(1, 4, 7, 5)
    whole = up(x)
    source = Map(x, up)
    assert (source.height, source.width) == (14, 10)
    for top, bottom in ((0, 14), (0, 3), (5, 6), (6, 11), (13, 14)):
        assert torch.allclose(source.rows(top, bottom), whole[:, :, top:bottom], atol=1e-5)


def test_a_pipeline_says_what_was_done(monkeypatch):
    pipe = tiny_model().requires_grad_(False)
    whole = pipe.text_to_image("a red cat", steps=2, progress=False).tensor
    assert ldm.optimize(pipe) is pipe
    assert any("packed" in line for line in pipe.optimizations)
    assert (pipe.text_to_image("a red cat", steps=2, progress=False).tensor - whole).abs().max() < 1e-4
    without_kernels(monkeypatch)
    assert (
        "PyTorch's operators, as kernels cannot be built (a test)"
        in ldm.optimize(tiny_model()).optimizations[0]
    )
    assert "kernels=False" in ldm.optimize(tiny_model(), kernels=False).optimizations[0]
    assert any("strips" in line for line in ldm.optimize(tiny_model()).optimizations)
    spared = ldm.optimize(tiny_model(), memory=True).optimizations
    assert any("in a file" in line for line in spared)
    assert not any(
        "folded" in line for line in spared
    )  # 16/9 of the weights: time, not memory, is what folding spares


def mapped(network):
    """Bytes of a process's memory that are pages of spilled weights."""
    lines, total, inside = open("/proc/self/smaps").read().splitlines(), 0, False
    begin = network.storage.data_ptr()
    for line in lines:
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            low, high = (int(v, 16) for v in line.split()[0].split("-"))
            inside = low <= begin < high
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_networks_take_turns_in_memory(monkeypatch, tmp_path):
    from ldm.speed import spill

    monkeypatch.setenv("LDM_HOME", str(tmp_path))
    pipe, other = tiny_model().requires_grad_(False), tiny_model()
    whole = pipe.text_to_image("a red cat", steps=2, progress=False).tensor
    state = other.state_dict()
    spilled = spill.take_turns(ldm.optimize(pipe).networks().values())
    assert not list((tmp_path / "kernels").glob("tmp*"))  # the file has no name any more
    assert all(torch.equal(value, state[key]) for key, value in pipe.state_dict().items())
    for own in spilled:
        own.rest()
    assert all(mapped(own) == 0 for own in spilled)
    unet = next(own for own in spilled if own.network is pipe.denoiser.net)
    begin, end = unet.storage.data_ptr(), unet.storage.data_ptr() + unet.storage.nbytes()
    assert all(
        (begin <= p.data_ptr() < end) == (p.dim() > 1) for p in unet.network.parameters()
    )  # a norm in the file would keep weights about it
    between = []
    for _ in range(2):
        made = pipe.text_to_image(
            "a red cat", steps=2, progress=False, on_step=lambda i, x, d: between.append(mapped(unet))
        )
        assert (made.tensor - whole).abs().max() < 1e-4
        assert between and not any(between)  # packed: the plain weights are gone
        assert (
            pipe.vae.decoder.conv_in.packed is not None and pipe.denoiser.net.conv_in.packed is None
        )  # the last to compute, and one that rests
        assert mapped(unet) == 0


def in_memory(x):
    return x.as_strided((x.numel(),), (1,))


@pytest.mark.parametrize(
    "config",
    [*UNETS.values(), VAEConfig(channels=(32, 64), blocks=1, latent_channels=4)],
    ids=[*UNETS, "vae"],
)
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_a_network_made_for_training_has_the_same_gradients(config, dtype):
    """Against the plain network in float64; under autocast as in training, where the plain one itself is up
    to 0.03 away."""
    if not has_kernels():
        pytest.skip("without kernels the network stays as it is")
    nets = {"exact": make(config, torch.float64), "plain": make(config)}
    nets["fast"] = module.for_training(copy.deepcopy(nets["plain"]))
    assert not any(type(part) in (nn.GroupNorm, ResBlock) for part in nets["fast"].modules())
    found = {}
    for who, net in nets.items():
        net.train().requires_grad_(True)
        own = torch.float64 if who == "exact" else torch.float32
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16 and who != "exact"):
            if isinstance(config, UNetConfig):
                x, t, cond = inputs(config, own)
                loss = net(x, t, cond).to(own).square().mean()
            else:
                loss = (
                    net.decode(
                        net.encode(torch.linspace(-1, 1, 3 * 32 * 24, dtype=own).view(1, 3, 32, 24)).mean.to(
                            own
                        )
                    )
                    .to(own)
                    .square()
                    .mean()
                )
        loss.backward()
        found[who] = torch.cat([p.grad.flatten() for p in net.parameters()])
        for p in net.parameters():  # the fused AdamW reads both by their places in memory
            assert torch.equal(in_memory(p.grad), in_memory(torch.empty_like(p).copy_(p.grad)))
    fast, plain = (rms(found[who], found["exact"]) for who in ("fast", "plain"))
    assert fast < max(BARS[dtype], 1.2 * plain)


def test_a_network_made_for_training_is_made_plain_again():
    net = make(UNETS["sd"])
    kinds = [type(part) for part in net.modules()]
    module.exchange_back(module.for_training(net))
    assert [type(part) for part in net.modules()] == kinds and not any(
        hasattr(part, "ops") for part in net.modules()
    )
