"""Tensors that do not depend on `torch.set_default_device` and `torch.set_default_dtype`.

What this library creates names its device and dtype. Networks are the exception: their layers follow
PyTorch's defaults, as those of every module do. `plain_defaults` is for the places that build one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FLOATING = (torch.empty, torch.zeros, torch.ones, torch.eye, torch.rand, torch.randn, torch.linspace)


class Float32Mode(TorchFunctionMode):
    """Mode in which the constructors of floating-point tensors create float32 if no dtype is given."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),  # of any function of torch
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in FLOATING and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Build networks in float32 on the CPU, inside a `with` block, whatever PyTorch's defaults are."""
    if torch.get_default_dtype() == torch.float32 and torch.get_default_device().type == "cpu":
        yield
    else:
        with torch.device("cpu"), Float32Mode():
            yield


def as_tensor(values: Tensor | float | Sequence[float]) -> Tensor:
    """Return a tensor as it is, and numbers as a float64 tensor on the CPU."""
    return values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64, device="cpu")
