"""Networks without data: built on the meta device, and filled from a file afterwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ldm.support.defaults import Float32Mode

MAX_NETWORK_TENSORS = 10_000  # of a network; Stable Diffusion XL's UNet has 1,680


class _MetaMode(Float32Mode):
    """Mode in which tensors are counted, and the functions of `torch.nn.init` return their tensor unchanged.

    On the meta device these have no effect, but they import torch's compiler, which takes seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),  # of any function of torch
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        self.tensors += 1
        if self.tensors > MAX_NETWORK_TENSORS:
            raise ValueError(f"expected a network of at most {MAX_NETWORK_TENSORS:,} tensors")
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Build modules without data and without initialization, inside a `with` block.

    Raises:
        ValueError: If they have more than `MAX_NETWORK_TENSORS` tensors.
    """
    with torch.device("meta"), _MetaMode():
        yield
