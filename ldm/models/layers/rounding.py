"""Sums that cancel, by which two ways to compute the same products are compared.

Libraries of matrix products choose their kernel by the shapes, and with it the order of each sum. In bfloat16
two orders differ in one result of 10,000 or so, which a comparison of a network's outputs misses now and
then. A sum that cancels consists of its rounding error alone: two orders differ in nine results of ten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SUMMED: Mapping[Callable[..., Any], tuple[int, int]] = {
    F.linear: (-1, -1),
    torch.conv1d: (1, 1),
    torch.conv2d: (1, 1),
    torch.conv3d: (1, 1),
    torch.conv_transpose2d: (1, 0),
    torch.bmm: (-1, -2),
    torch.matmul: (-1, -2),
    Tensor.matmul: (-1, -2),
    Tensor.__matmul__: (-1, -2),
}
"""The dimension of the first and of the second operand along which a product is summed."""

BIAS = 2.0**-18
"""Factor of a bias, which makes it as small as the rounding errors of float32 sums that it is added to."""


class Cancelling(TorchFunctionMode):
    """Makes all products of networks cancel, inside a `with` block of this thread.

    A product takes half of what it is summed along, twice: from its first operand as it is, from the second
    once with the opposite sign. An attention takes half of its keys twice, with opposite values. Biases are
    made as small as the rounding errors, and the results are scaled to at most 1 for each element of the
    first dimension.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v, *others = args
            every = {
                name: torch.ones_like(value) if isinstance(value, Tensor) else value
                for name, value in kwargs.items()
            }
            return at_most_one(
                func(q, mirrored_halves(k, -2), with_powers(mirrored_halves(v, -2, -1), -2), *others, **every)
            )
        dims = SUMMED.get(func)
        if dims is None or not isinstance(args[1], Tensor) or min(args[0].ndim, args[1].ndim) < 2:
            return func(*args, **kwargs)
        x, weight, *others = args
        shared = [value * BIAS if isinstance(value, Tensor) else value for value in others]
        operands = with_powers(mirrored_halves(x, dims[0]), dims[0]), mirrored_halves(weight, dims[1], -1)
        return at_most_one(func(*operands, *shared, **kwargs))


def mirrored_halves(x: Tensor, dim: int, sign: int = 1) -> Tensor:
    """Return x whose second half along a dimension is its first half in reverse, times a sign; 0 between."""
    half = x.shape[dim] // 2
    made = x.clone()
    made.narrow(dim, half, x.shape[dim] - 2 * half).zero_()
    made.narrow(dim, x.shape[dim] - half, half).copy_(x.narrow(dim, 0, half).flip(dim) * sign)
    return made


def with_powers(x: Tensor, dim: int) -> Tensor:
    """Return x times powers of 2 that vary along a dimension and are the same for its halves."""
    powers = 2.0 ** (torch.arange(x.shape[dim], device=x.device) * 5 % 13 - 6)  # of neighbours, far apart
    shape = [1] * x.ndim
    shape[dim] = -1
    return x * mirrored_halves(powers, 0).to(x.dtype).reshape(shape)


def at_most_one(x: Tensor) -> Tensor:
    """Return x with the absolute value of at most 1 in each element of the first dimension."""
    largest = x.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return x / largest.reshape(-1, *[1] * (x.ndim - 1))
