"""The compiled kernels and PyTorch's operators, each compared with float64, in shapes of the networks."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
import torch.nn.functional as F
from emulated_neon import EmulatedLibrary, emulated_ops
from torch import nn

from ldm.speed.kernels import build, product
from ldm.speed.kernels import ops as module
from ldm.speed.kernels.ops import CompiledOps, TorchOps
from ldm.support.processor import INSTRUCTION_SETS, processor_sets

# permitted RMS error, relative to the standard deviation of the output
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


SETS = [name for name in INSTRUCTION_SETS if name != "neon"]


@pytest.fixture(params=["torch", *SETS, pytest.param("neon", marks=pytest.mark.slow)])
def ops(request, monkeypatch, tmp_path_factory):
    """Return PyTorch's operators, and those compiled for each instruction set that this processor has."""
    if request.param == "torch":
        return TorchOps()
    isa = INSTRUCTION_SETS[request.param]
    if isa.name == "neon" and isa not in processor_sets():
        folder = tmp_path_factory.getbasetemp() / "neon"
        folder.mkdir(exist_ok=True)
        return emulated_ops(folder, monkeypatch)
    if isa not in processor_sets():
        pytest.skip(f"this processor has no {isa.name}")
    try:
        return CompiledOps(isa)
    except build.NoKernels as error:
        pytest.skip(str(error))


def error(got, expected):
    return float((got.double() - expected).square().mean().sqrt() / expected.std())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "rows", "keys", "dim"),
    [
        (3, 50, 77, 40),
        (1, 100, 1000, 80),
        (2, 49, 530, 160),
        (1, 7, 600, 512),
        (2, 130, 16, 8),
        (1, 1, 1, 64),
        (1, 48, 513, 96),
        (1, 96, 80, 88),
    ],
)
def test_attention(ops, dtype, heads, rows, keys, dim):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        (1.5 * torch.randn(2, n, heads, dim, generator=generator)).to(dtype).transpose(1, 2)
        for n in (rows, keys, keys)
    )
    some = torch.rand(2, 1, 1, keys, generator=generator) > 0.3
    some[..., 0] = True
    for mask in (None, some, some.expand(2, 1, rows, keys)):
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
        got = ops.attention(q, k, v, mask)
        assert got.dtype == dtype and error(got, expected) < DTYPES[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_scores_that_overflow_an_exponential(ops, dtype):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 40, generator=generator) for n in (60, 700, 700))
    # the last rows attend to a single key, with a score in the hundreds
    q = q * torch.logspace(-2, 2, 60)[:, None]
    q, k, v = (t.to(dtype) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(ops.attention(q, k, v), expected) < DTYPES[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "groups", "size"), [(320, 32, (9, 8)), (48, 16, (13, 7)), (24, 8, (1, 3)), (8, 8, (20, 20))]
)
def test_group_norm(ops, dtype, channels, groups, size):
    generator = torch.Generator().manual_seed(2)
    # a mean of ten standard deviations
    x = (
        (torch.randn(2, channels, *size, generator=generator) * 2 + 20)
        .to(dtype)
        .to(memory_format=torch.channels_last)
    )
    norm = nn.GroupNorm(groups, channels).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -1, 1)
    exact = copy.deepcopy(norm).double()
    add, gain, offset = torch.randn(3, 2, channels, generator=generator).to(dtype)
    wide = [t.double()[:, :, None, None] for t in (add, gain, offset)]
    for silu in (False, True):
        last = F.silu if silu else (lambda y: y)
        # rounding of x itself is 2e-6 of its standard deviation in float32; PyTorch also rounds x + add in
        # bfloat16, to a twentieth
        computed = isinstance(ops, CompiledOps) and dtype in ops.dtypes  # by the kernel
        bar = DTYPES[dtype] if computed else 8 * DTYPES[dtype]
        assert error(ops.group_norm(x, norm, silu=silu), last(exact(x.double()))) < bar
        everything = last(exact(x.double() + wide[0]) * (1 + wide[1]) + wide[2])
        assert error(ops.group_norm(x, norm, silu=silu, add=add, gain=gain, offset=offset), everything) < bar


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "groups", "size"), [(1, 320, 32, (9, 8)), (5, 48, 16, (13, 7)), (2, 20, 4, (1, 3))]
)
@pytest.mark.parametrize("behind", [(), ("add",), ("gain", "offset"), ("add", "gain", "offset")], ids=str)
def test_gradients_of_group_norm(ops, dtype, batch, channels, groups, size, behind):
    """All gradients are compared with float64, for fewer samples than threads and more."""
    generator = torch.Generator().manual_seed(4)
    x, dy = (torch.randn(batch, channels, *size, generator=generator).add(1).to(dtype) for _ in range(2))
    extra = {name: torch.randn(batch, channels, generator=generator).to(dtype) for name in behind}
    norm = nn.GroupNorm(groups, channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -1, 1)

    def gradients(ops, norm, silu, wide):
        inputs = [wide(t).detach().requires_grad_() for t in (x, *extra.values())]
        y = ops.group_norm(inputs[0], norm, silu=silu, **dict(zip(extra, inputs[1:], strict=True)))
        return torch.autograd.grad(y, [*inputs, norm.weight, norm.bias], wide(dy))

    for silu in (False, True):
        expected = gradients(TorchOps(), copy.deepcopy(norm).double(), silu, torch.Tensor.double)
        got = gradients(ops, norm, silu, lambda t: t)
        assert [t.dtype for t in got] == [dtype] * (1 + len(extra)) + [torch.float32] * 2
        assert max(error(a, b) for a, b in zip(got, expected, strict=True)) < DTYPES[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_and_affine_are_the_steps_of_a_group_norm(ops, dtype):
    x = (
        (torch.randn(2, 40, 11, 9, generator=torch.Generator().manual_seed(3)) + 3)
        .to(dtype)
        .to(memory_format=torch.channels_last)
    )
    mean, m2 = ops.moments(x)
    wide = x.double().flatten(2)
    assert torch.allclose(mean, wide.mean(2), rtol=1e-6) and torch.allclose(
        m2, wide.var(2, correction=0) * 99, rtol=1e-5
    )
    scale, shift = torch.rand(2, 2, 40)
    got = ops.affine(x, scale, shift, silu=True)
    assert (
        error(got, F.silu(x.double() * scale[:, :, None, None] + shift[:, :, None, None])) < DTYPES[dtype] / 2
    )
    assert got.is_contiguous(memory_format=torch.channels_last)


SHAPES = [(2, 320, 32, (9, 8)), (1, 16, 48, (13, 7)), (3, 128, 128, (1, 1)), (1, 32, 640, (64, 66))]


@torch.inference_mode()
@pytest.mark.parametrize(("batch", "channels", "made", "size"), SHAPES)
@pytest.mark.parametrize("block", [2**23, 1])
def test_winograd_is_the_convolution(monkeypatch, ops, batch, channels, made, size, block):
    """The shapes include odd sides, blocks that end inside a row, and one pixel; the maximum is tested."""
    if not isinstance(ops, CompiledOps):
        pytest.skip("only the compiled kernels have this operator")
    monkeypatch.setattr(module, "shared_cache_bytes", lambda: block)  # 1 gives the fewest tiles at once
    conv = nn.Conv2d(channels, made, 3, padding=1)
    x = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1)) + 0.5
    for bias in (conv.bias.detach(), None):
        expected = F.conv2d(
            x.double(), conv.weight.double(), None if bias is None else bias.double(), padding=1
        )
        torch.set_default_dtype(torch.float64)  # the dtype of the result must not depend on the default
        try:
            got = ops.conv3x3(x, ops.conv3x3_weights(conv.weight.detach()), bias, made)
        finally:
            torch.set_default_dtype(torch.float32)
        assert (
            got.dtype == x.dtype
            and got.shape == expected.shape
            and got.is_contiguous(memory_format=torch.channels_last)
        )
        # of the RMS; the direct convolution's largest error is half as large
        assert (got - expected).abs().max() / expected.square().mean().sqrt() < 3e-5
        assert error(got, expected) < 3e-6


WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)  # their dtypes


@torch.inference_mode()
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    ("channels", "made", "size", "kernel", "stride", "padding"),
    [
        (5, 3, (7, 9), 3, 1, 1),
        (33, 50, (6, 5), 3, 2, 1),
        (70, 130, (9, 8), 1, 1, 0),
        (300, 37, (5, 6), 3, 1, 1),
        (40, 4, (9, 9), 2, 1, 1),
    ],
)
def test_convolution_by_weights_of_each_dtype(ops, dtype, channels, made, size, kernel, stride, padding):
    """Shapes end inside blocks of rows, panels of outputs and parts of the inputs."""
    generator = torch.Generator().manual_seed(6)
    conv = nn.Conv2d(channels, made, kernel, stride, padding).to(dtype)
    x = torch.randn(2, channels, *size, generator=generator)
    geometry = product.Geometry(conv.padding, conv.stride, conv.dilation, conv.groups)
    for bias in (conv.bias, None):
        wide = None if bias is None else bias.double()
        expected = F.conv2d(x.double(), conv.weight.double(), wide, stride, padding)
        got = ops.convolution(x, conv.weight, bias, geometry)
        assert got.dtype == torch.float32 and got.shape == expected.shape
        assert error(got, expected) < 1e-6


@torch.inference_mode()
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "width", "made"), [(2, 1300, 70), (154, 48, 8), (7, 1, 1), (13, 600, 33)])
def test_linear_by_weights_of_each_dtype(ops, dtype, threads, rows, width, made):
    layer = nn.Linear(width, made).to(dtype)
    x = torch.randn(1, rows, width, generator=torch.Generator().manual_seed(7))
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = ops.linear(x, layer.weight, layer.bias)
    finally:
        torch.set_num_threads(before)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), expected, atol=3e-6)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize(("batch", "channels", "made", "size"), SHAPES)
def test_winograd_by_weights_of_each_dtype(monkeypatch, ops, dtype, batch, channels, made, size):
    """The weights are transformed in several parts."""
    if not isinstance(ops, CompiledOps):
        pytest.skip("only the compiled kernels have this operator")
    conv = nn.Conv2d(channels, made, 3, padding=1).to(dtype)
    x = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(8))
    whole = ops.conv3x3(x, ops.conv3x3_weights(conv.weight.float()), conv.bias.float(), made)
    for most in (2**25, 36 * 4 * channels * 64):
        monkeypatch.setattr(product, "TRANSFORMED_BYTES", most)
        got = ops.conv3x3_untransformed(x, conv.weight, conv.bias)
        assert torch.equal(got, whole)


def test_extremes_of_silu(ops):
    x = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 1e4]).view(1, 1, 1, 6)
    got = ops.affine(x, torch.ones(1, 1), torch.zeros(1, 1), silu=True)
    assert torch.allclose(got, F.silu(x), atol=1e-6)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("made", FLOATS, ids=str)
def test_conversion_rounds_as_pytorch_and_finds_what_is_not_finite(ops, made):
    """Subnormal numbers, halfway cases, overflow, infinity and NaN are among the numbers."""
    if not isinstance(ops, CompiledOps):
        pytest.skip("only the compiled kernels have this operator")
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (1003,), generator=generator).to(torch.int32)
    wide = bits.view(torch.float32)
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 2.0**-140, 65520.0, 1e-7, 0.0, -0.0])
    every = [wide, halfway, wide.bfloat16(), wide.half(), halfway.half(), torch.full((5,), float("nan"))]
    given = [*every, torch.randn(37, generator=generator), torch.randn(16, generator=generator).half()]
    results = [torch.full((len(x),), 7.0, dtype=made) for x in given]
    finite, n = torch.full((len(given),), 9, dtype=torch.uint8), len(given)
    emulated = isinstance(ops.lib, EmulatedLibrary)

    def array(kind, values):
        return values if emulated and kind is ctypes.c_void_p else (kind * n)(*values)

    def addresses(tensors):
        return tensors if emulated else [x.data_ptr() for x in tensors]

    ops.lib.ldm_convert(
        n,
        array(ctypes.c_void_p, addresses(given)),
        array(ctypes.c_void_p, addresses(results)),
        array(ctypes.c_int64, [len(x) for x in given]),
        array(ctypes.c_int, [FLOATS.index(x.dtype) for x in given]),
        FLOATS.index(made),
        module.pointer(finite),
        1,
    )
    for x, got, ok in zip(given, results, finite.tolist(), strict=True):
        expected = x.to(made)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(0), expected.nan_to_num(0))
        assert bool(ok) == bool(expected.isfinite().all())
