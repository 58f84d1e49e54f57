"""Comparisons of products find another order of their sums, and drawings in batches keep their bits."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_latent_diffusion import tiny_model
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm.models.layers import grouped
from ldm.models.layers.grouped import GroupedLinear
from ldm.models.layers.rounding import Cancelling
from ldm.pipelines.tasks.deferred import deferred
from ldm.pipelines.together import Together


class Summed(TorchFunctionMode):
    """Takes the sums of linear layers in bfloat16 in float32: in three parts if there are few rows.

    Args:
        few: Number of rows below which there are three parts.
    """

    def __init__(self, few: int) -> None:
        super().__init__()
        self.few, self.divided = few, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        parts = 3 if x.flatten(0, -2).shape[0] < self.few else 1
        self.divided += parts == 3
        pairs = zip(x.float().chunk(parts, -1), weight.float().chunk(parts, -1), strict=True)
        total = sum(a @ b.T for a, b in pairs)
        return (total if bias is None else total + bias.float()).to(x.dtype)


def differing(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Return the part of a product that two orders of its sums make different."""
    with Summed(0):
        one = F.linear(x, weight)
    with Summed(10**9):
        two = F.linear(x, weight)
    return (one != two).float().mean().item()


def test_sums_that_cancel_show_their_order():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=g).bfloat16()
    weight = torch.randn(128, 512, generator=g).bfloat16()
    assert differing(x, weight) < 0.01
    outputs = []
    for few in (0, 10**9):
        with Summed(few), Cancelling():
            outputs.append(F.linear(x, weight))
    assert (outputs[0] != outputs[1]).float().mean() > 0.5
    assert all(out.abs().amax(dim=1).allclose(torch.ones(64, dtype=out.dtype)) for out in outputs)


@pytest.mark.parametrize(
    ("func", "shapes"),
    [
        (F.linear, [(4, 6, 31), (8, 31)]),
        (torch.conv2d, [(2, 7, 5, 5), (4, 7, 3, 3)]),
        (torch.conv_transpose2d, [(2, 6, 5, 5), (6, 4, 3, 3)]),
        (torch.bmm, [(3, 4, 8), (3, 8, 5)]),
        (torch.matmul, [(2, 3, 4, 8), (2, 3, 8, 5)]),
        (F.scaled_dot_product_attention, [(2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 8)]),
    ],
)
def test_all_products_cancel(func, shapes):
    g = torch.Generator().manual_seed(1)
    operands = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    plain, seen = func(*operands), []

    class Seen(TorchFunctionMode):
        def __torch_function__(self, called, types, args=(), kwargs=None):
            out = called(*args, **(kwargs or {}))
            seen.extend([out] if called is func else [])
            return out

    with Seen(), Cancelling():
        out = func(*operands)
    assert out.shape == plain.shape and len(seen) == 1
    assert seen[0].abs().max() < 1e-10 < plain.abs().max()


def test_a_bias_is_added_where_the_kernel_adds_it():
    x, weight, bias = torch.randn(8, 64), torch.randn(4, 64), torch.randn(4)
    with Cancelling():
        with_bias, without = F.linear(x, weight, bias), F.linear(x, weight)
    assert not torch.equal(with_bias, without)


def test_drawings_keep_their_bits_where_few_rows_are_summed_in_another_order():
    pipe = tiny_model().to(torch.bfloat16)
    run = partial(pipe.text_to_image, steps=2, progress=False)
    prompts = ("a red cat", "a cat", "apple", "red")
    with Summed(100) as summed:
        own = [run(prompt, seed=i) for i, prompt in enumerate(prompts)]
        made = Together(pipe).draw(
            [deferred(partial(run, prompt, seed=i)) for i, prompt in enumerate(prompts)]
        )
    assert summed.divided
    for images, expected in zip(made, own, strict=True):
        assert torch.equal(images.tensor, expected.tensor)


@pytest.fixture
def judged(monkeypatch):
    """What was tried out, which the test begins without."""
    monkeypatch.setattr(grouped, "_JUDGED", found := {})
    return found


@pytest.mark.parametrize(("few", "dtype"), [(128, torch.bfloat16), (0, torch.bfloat16), (0, torch.float32)])
def test_grouped_products_do_not_depend_on_the_batch(few, dtype, judged):
    torch.manual_seed(0)
    layer = GroupedLinear(1024, 32).to(dtype)
    plain = nn.Linear(1024, 32).to(dtype)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(7, 64, 1024).to(dtype)
    with torch.no_grad(), Summed(few) if few else nullcontext():
        assert torch.allclose(layer(x), plain(x), atol=1e-2)
        with Cancelling():
            apart = [torch.cat([each(one[None]) for one in x]) for each in (layer, plain)]
            together = [layer(x), plain(x)]
    assert torch.equal(apart[0], together[0])
    if few:  # the tokens of one image are few
        assert not torch.equal(apart[1], together[1]) and list(judged.values()) == [True]


def test_products_are_grouped_where_it_matters_alone(judged):
    layer, calls = GroupedLinear(512, 8), []

    class Counted(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.extend([tuple(args[0].shape)] if func is F.linear else [])
            return func(*args, **(kwargs or {}))

    with Counted():
        layer(torch.zeros(3, 64, 512)).sum().backward()
        with torch.no_grad():
            for answer in (True, False):
                judged[layer.weight.shape, torch.float32, 64, torch.get_num_threads()] = answer
                layer(torch.zeros(3, 64, 512))
            layer(torch.zeros(9, 4, 512))
            layer(torch.zeros(1, 257, 512))
    group = [(64, 512)] * 3
    assert calls == [(3, 64, 512), *group, (3, 64, 512), (9, 4, 512), (1, 257, 512)]
    assert layer.weight.grad is not None
