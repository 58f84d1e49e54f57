"""Products of a few rows with weights of 32, 16 and 8 bits, and the layer that uses them."""

from __future__ import annotations

import pytest
import torch
from tiny_dalle import tiny_dalle
from torch import Tensor

import ldm
from ldm.models.dalle.layers import TokenLinear
from ldm.speed.few_rows import MOST_ROWS, FewRowsLinear, few_rows_layers, round_to_octets
from ldm.speed.kernels.ops import CompiledOps, TorchOps, available_ops

OPS = available_ops()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 16, 4), (2, 50, 130), (3, 7, 1), (9, 64, 67), (5, 1, 3)]
)
def test_products_equal_pytorchs(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight = numbers(rows, inputs), numbers(outputs, inputs, seed=1).to(dtype)
    expected = x.double() @ weight.double().T
    made = OPS.few_rows(x, weight)
    assert made.shape == (rows, outputs) and made.dtype == torch.float32
    assert torch.allclose(made.double(), expected, atol=1e-5 * inputs**0.5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "inputs"), [(1, 33), (4, 160), (7, 5)])
def test_products_with_octets(rows: int, inputs: int) -> None:
    x, weight = numbers(2, rows, inputs), numbers(45, inputs, seed=1)
    rounded, scale = round_to_octets(weight)
    assert rounded.dtype == torch.int8 and int(rounded.abs().amax()) == 127
    assert (rounded.float() * scale[:, None] - weight).abs().max() <= scale.max() * 0.51
    expected = x.double() @ (rounded.double() * scale[:, None].double()).T
    for ops in (OPS, TorchOps()):
        assert torch.allclose(ops.few_rows(x, rounded, scale).double(), expected, atol=1e-4)


def test_a_row_does_not_depend_on_the_others() -> None:
    if not isinstance(OPS, CompiledOps):
        pytest.skip("no compiled kernels")
    x, weight = numbers(11, 100), numbers(77, 100, seed=1)
    together = OPS.few_rows(x, weight)
    assert all(torch.equal(together[i : i + 1], OPS.few_rows(x[i : i + 1], weight)) for i in range(11))


def fast_layer(inputs: int = 24, outputs: int = 10) -> FewRowsLinear:
    layer = TokenLinear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(numbers(outputs, inputs))
    ldm.optimize(layer)
    assert isinstance(layer, FewRowsLinear)
    return layer


def test_the_layer_follows_its_weight_and_keeps_gradients() -> None:
    layer = fast_layer()
    x = numbers(3, 24, seed=2)
    with torch.no_grad():
        before = layer(x)
        assert torch.allclose(before, x @ layer.weight.T, atol=1e-5)
        layer.weight.mul_(2)
        assert torch.allclose(layer(x), 2 * before, atol=1e-5)
        many = numbers(MOST_ROWS + 1, 24)
        assert torch.allclose(layer(many), many @ layer.weight.T, atol=1e-5)
        assert layer(x[:0]).shape == (0, 10)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and torch.allclose(layer.weight.grad[0], x.sum(0), atol=1e-5)


def test_octets_are_an_option_of_each_call() -> None:
    layer = fast_layer()
    x = numbers(2, 24, seed=3)
    with torch.no_grad():
        exact = layer(x)
        ldm.optimize(layer, int8=True)
        rough = layer(x)
        assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()
        layer.weight.mul_(2)
        assert torch.allclose(layer(x), 2 * rough, atol=1e-4)
        ldm.optimize(layer)
        assert torch.allclose(layer(x), 2 * exact, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"memory": True}, {"kernels": False}])
def test_an_optimized_pipeline_draws_the_same_tokens(options: dict[str, bool]) -> None:
    pipe = tiny_dalle()
    plain = pipe.text_to_image("a red apple", n=2, temperature=0.0, progress=False).tensor
    ldm.optimize(pipe, **options)
    assert len(few_rows_layers(pipe)) == 2 * 7 + 2 * 11 + 1
    assert any("few rows" in line for line in pipe.__dict__["optimizations"])
    fast = pipe.text_to_image("a red apple", n=2, temperature=0.0, progress=False).tensor
    assert (fast - plain).abs().max() < 1e-4


def test_an_optimized_pipeline_is_the_same_for_every_batch() -> None:
    pipe = ldm.optimize(tiny_dalle())
    together = pipe.text_to_image("a red apple", n=3, seed=4, progress=False).tensor
    alone = pipe.text_to_image("a red apple", n=1, seed=6, progress=False).tensor
    assert (together[2:] - alone).abs().max() < 1e-4


def test_octets_in_a_pipeline() -> None:
    pipe = ldm.optimize(tiny_dalle(), int8=True)
    assert any(
        line.startswith("int8: weights of the token decoder") for line in pipe.__dict__["optimizations"]
    )
    assert pipe.text_to_image("a cat", n=1, progress=False).tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits(dtype: torch.dtype) -> None:
    pipe = tiny_dalle()
    for network in (pipe.encoder, pipe.decoder):
        network.to(dtype)
    images = ldm.optimize(pipe).text_to_image("a cat", n=1, progress=False)
    assert images.tensor.isfinite().all() and images.recipe["dtype"] == str(dtype).removeprefix("torch.")
