"""The one copy of the weights that a change of dtype needs, made quickly."""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

CHUNK = 32_000  # elements: below the number from which torch starts threads, which cost more than they give on a busy machine
ALIGN = 64  # bytes, as torch aligns its own memory


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous tensors, the floating-point ones of the given dtype; those that already are stay the very same memory.

    On the CPU the copies stand in one block of huge pages, as page faults would cost as much as the conversion; between float16 and bfloat16
    they go through float32 by chunks, which rounds the same and takes half of the processor time of torch's direct way.
    """
    block = Block(sum(_size(tensor, dtype) for tensor in tensors.values() if dtype is not None and _copied(tensor, dtype)))
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if dtype is not None and _copied(tensor, dtype):
            found[name] = block.take(tensor.shape, dtype)
            _convert(tensor.contiguous().view(-1), found[name].view(-1))
        elif dtype is not None and tensor.is_floating_point():
            found[name] = tensor.to(dtype).contiguous()
        else:
            found[name] = tensor.contiguous()
    return found


def _copied(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype != dtype and tensor.device.type == "cpu" and tensor.numel() > 0


def _size(tensor: Tensor, dtype: torch.dtype) -> int:
    return -(-tensor.numel() * dtype.itemsize // ALIGN) * ALIGN


class Block:
    """Memory for many tensors, reserved at once; it is given back when the last of them is gone."""

    def __init__(self, size: int) -> None:
        self.memory, self.used = None, 0
        if size and hasattr(mmap, "MADV_HUGEPAGE"):  # Linux; private memory, as shared memory has no huge pages
            self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            try:
                self.memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel built without huge pages: only slower

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The next tensor, not yet filled."""
        if self.memory is None:
            return torch.empty(shape, dtype=dtype)
        count = shape.numel()
        tensor = torch.frombuffer(self.memory, dtype=dtype, count=count, offset=self.used).view(shape)
        self.used += -(-count * dtype.itemsize // ALIGN) * ALIGN
        return tensor


def _convert(source: Tensor, target: Tensor) -> None:
    if {source.dtype, target.dtype} != {torch.float16, torch.bfloat16}:
        target.copy_(source)
        return
    wide = torch.empty(min(CHUNK, source.numel()), dtype=torch.float32)
    for piece, out in zip(source.split(CHUNK), target.split(CHUNK), strict=True):
        out.copy_(wide[: piece.numel()].copy_(piece))
