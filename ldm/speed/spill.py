"""Weights that leave memory while their network is not in use: they lie in a file, and are mapped."""

from __future__ import annotations

import ctypes
import mmap
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.speed.kernels.build import folder
from ldm.speed.packed import FoldedUpsample, Packed

DONTNEED = 4  # of madvise: the pages leave memory; a shared mapping's data stay in the file
# of mallopt: free bytes from which on the heap shrinks; size from which on a block has its own pages
TRIM_THRESHOLD, MMAP_THRESHOLD = (-1, -3)


class Spilled:
    """A network whose weights were moved to a file, which has no name any more and ends with the process.

    Linux only: RuntimeError elsewhere. OSError where there is no room on the disk.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.handles: list[RemovableHandle] = []
        for part in network.modules():
            if isinstance(part, Packed):
                part.unpack()
        own = [p for p in network.parameters() if p.device.type == "cpu"]
        parameters = [p for p in own if p.dim() > 1]
        for p in own:
            if (
                p.dim() <= 1
            ):  # norms and biases stay: reading one in the file would bring back the weights beside it
                p.data = p.data.clone()
        starts, end = [], 0
        for p in parameters:
            starts.append(end)
            end += -(-p.numel() * p.element_size() // 64) * 64
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder()) as file:
            file.truncate(max(end, 1))
            self.storage = torch.UntypedStorage.from_file(file.name, True, max(end, 1))
        for p, start in zip(parameters, starts, strict=True):
            view = torch.empty(0, dtype=p.dtype).set_(self.storage, start // p.element_size(), p.shape)  # type: ignore[call-overload]
            p.data = view.copy_(p.data)
        for part in network.modules():
            if isinstance(part, Packed):
                part.spilled = self
        self.rest()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Blocks made inside have pages of their own (glibc), which go back to the system with them: weights
        between the results of layers would leave the heap full of holes. Afterwards only blocks beyond 32 MB
        do, as by malloc's own rule once such a block was freed.
        """
        _glibc("mallopt", MMAP_THRESHOLD, 1 << 16)
        try:
            yield
        finally:
            _glibc("mallopt", MMAP_THRESHOLD, 1 << 25)
            _glibc("mallopt", TRIM_THRESHOLD, 1 << 26)

    def evict(self, weight: Tensor | None = None) -> None:
        """Let the pages of a weight, or of all, leave memory; they are read again when used."""
        begin, size = self.storage.data_ptr(), self.storage.nbytes()
        if weight is not None:
            if not begin <= weight.data_ptr() < begin + size:
                return  # it was moved, converted or loaded anew since, and lies elsewhere
            end = weight.data_ptr() + weight.numel() * weight.element_size()
            # whole pages, which hold nothing else
            begin = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            size = max(0, end // mmap.PAGESIZE * mmap.PAGESIZE - begin)
        if size:
            _madvise(begin, size)

    def rest(self) -> None:
        """Let all that the network holds leave memory, packed weights too."""
        for part in self.network.modules():
            if isinstance(part, Packed):
                part.unpack()
            elif isinstance(part, FoldedUpsample):
                part.__dict__.pop("folded", None)
        self.evict()
        _glibc("malloc_trim", 0)

    def leave(self) -> None:
        """Take the weights out of the file, and the network out of the turns."""
        for handle in self.handles:
            handle.remove()
        for part in self.network.modules():
            if isinstance(part, Packed):
                part.unpack()
                part.spilled = None
        begin, size = self.storage.data_ptr(), self.storage.nbytes()
        for p in self.network.parameters():
            if begin <= p.data_ptr() < begin + size:
                p.data = p.data.clone()


def leave_turns(pipe: nn.Module) -> None:
    """Undo `take_turns`, where it was done."""
    for own in {
        part.spilled for part in pipe.modules() if isinstance(part, Packed) and part.spilled is not None
    }:
        own.leave()


def take_turns(networks: Iterable[nn.Module]) -> list[Spilled]:
    """Spill networks, so that at most one is in memory: as one begins to compute, the one before rests."""
    spilled = [Spilled(network) for network in networks]
    awake: list[Spilled] = []

    def wake(own: Spilled) -> None:
        if own not in awake:
            for other in awake:
                other.rest()
            awake[:] = [own]

    for own in spilled:
        for part in (
            own.network,
            *own.network.children(),
        ):  # some are called by their parts: an autoencoder's encoder, its decoder

            def hook(module: nn.Module, args: Any, own: Spilled = own) -> None:
                wake(own)

            own.handles.append(part.register_forward_pre_hook(hook))
        own.handles.append(
            own.network.register_forward_hook(lambda module, args, result, own=own: own.evict())
        )
    return spilled


def _glibc(function: str, *numbers: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, function):  # other libraries place blocks by rules of their own
        getattr(libc, function)(*numbers)


def _madvise(begin: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "madvise"):
        raise RuntimeError("memory=True needs madvise, which this system lacks")
    if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")
