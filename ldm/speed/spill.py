"""Weights that leave memory while their network is not in use.

The weights are in a memory-mapped file, from which the system reads the pages that are used.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.speed.kept_forms import clear_derived
from ldm.speed.kernels.build import cache_folder
from ldm.speed.packed import Packed
from ldm.support.home import make_folder
from ldm.support.memory import evict_pages, whole_pages

# parameters of mallopt: free bytes above which the heap shrinks; size above which a block has its own pages
TRIM_THRESHOLD, MMAP_THRESHOLD = (-1, -3)


class Spilled:
    """A network whose weights are moved to a file without a name, which ends with the process.

    Parameters of one dimension, such as norms and biases, stay in memory, because reading one of them from
    the file would also read the weights in the same page.

    Args:
        network: The network; its parameters on the CPU are moved.

    Raises:
        RuntimeError: On systems without madvise; Linux has it.
        OSError: If the disk is full; the message names the folder.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.handles: list[RemovableHandle] = []
        clear_derived(network)
        own = [p for p in network.parameters() if p.device.type == "cpu"]
        parameters = [p for p in own if p.dim() > 1]
        for p in own:
            if p.dim() <= 1:
                p.data = p.data.clone()
        starts, end = [], 0
        for p in parameters:
            starts.append(end)
            end += -(-p.numel() * p.element_size() // 64) * 64
        self.storage = _nameless_file(make_folder(cache_folder()), max(end, 1))
        for p, start in zip(parameters, starts, strict=True):
            # torch's stubs of set_ lack the untyped storage, which it accepts
            none = torch.empty(0, dtype=p.dtype, device="cpu")
            view = none.set_(self.storage, start // p.element_size(), p.shape)  # type: ignore[call-overload]
            p.data = view.copy_(p.data)
        for part in network.modules():
            if isinstance(part, Packed):
                part.spilled = self
        self.rest()

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()  # the weights of a copy are in memory

    @contextmanager
    def separate_allocations(self) -> Iterator[None]:
        """Allocate blocks in pages of their own (glibc), inside a `with` block.

        The pages return to the system when the block is freed; weights between the results of layers would
        fragment the heap. Afterwards only blocks above 32 MB have pages of their own, which is malloc's own
        rule once it has freed such a block.
        """
        _call_libc("mallopt", MMAP_THRESHOLD, 1 << 16)
        try:
            yield
        finally:
            _call_libc("mallopt", MMAP_THRESHOLD, 1 << 25)
            _call_libc("mallopt", TRIM_THRESHOLD, 1 << 26)

    def evict(self, weight: Tensor | None = None) -> None:
        """Let the pages of a weight, or of all weights, leave memory; they are read again when used.

        Args:
            weight: The weight; it is ignored if it is not in the file, because it was moved, converted or
                loaded since. None for all weights. Default: None.
        """
        begin, size = self.storage.data_ptr(), self.storage.nbytes()
        if weight is not None:
            if not begin <= weight.data_ptr() < begin + size:
                return
            begin, size = whole_pages(weight)
        if size:
            evict_pages(begin, size)

    def rest(self) -> None:
        """Let all weights of the network leave memory, and discard what is derived from them."""
        clear_derived(self.network)
        self.evict()
        _call_libc("malloc_trim", 0)

    def release(self) -> None:
        """Move the weights back to memory, and remove the hooks of the network."""
        for handle in self.handles:
            handle.remove()
        clear_derived(self.network)
        for part in self.network.modules():
            if isinstance(part, Packed):
                part.spilled = None
        begin, size = self.storage.data_ptr(), self.storage.nbytes()
        for p in self.network.parameters():
            if begin <= p.data_ptr() < begin + size:
                p.data = p.data.clone()


def release_all(pipe: nn.Module) -> None:
    """Undo `take_turns` for all networks of a pipeline."""
    for own in {
        part.spilled for part in pipe.modules() if isinstance(part, Packed) and part.spilled is not None
    }:
        own.release()


class Waking:
    """Forward pre-hook of a network that takes turns in memory: the one before it leaves memory.

    Args:
        own: The network.
        awake: The networks in memory, which all hooks of a pipeline share: none or one.
        lock: Held while a network wakes.
    """

    def __init__(self, own: Spilled, awake: list[Spilled], lock: threading.Lock) -> None:
        self.own, self.awake, self.lock = own, awake, lock

    def __call__(self, module: nn.Module, args: Any) -> None:  # any arguments of the network
        with self.lock:
            if self.own not in self.awake:
                for other in self.awake:
                    other.rest()
                self.awake[:] = [self.own]

    def applies(self) -> bool:
        """Return False: the hook does not read the maps (`ldm.speed.strips.has_inner_hooks`)."""
        return False

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _no_hook, ()


class Evicting:
    """Forward hook of a network whose plain weights leave memory after each evaluation."""

    def __init__(self, own: Spilled) -> None:
        self.own = own

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:  # of any class
        self.own.evict()

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    """Return the hook of a copy, whose weights are in memory: it does nothing."""
    return _nothing


def _nothing(*args: Any) -> None:
    """Accept the arguments of any hook."""


def take_turns(networks: Iterable[nn.Module]) -> list[Spilled]:
    """Move the weights of networks to files, so that at most one network is in memory.

    When a network starts to compute, the weights of the previous one leave memory. A copy of a network has
    its weights in memory.
    """
    spilled = [Spilled(network) for network in networks]
    awake: list[Spilled] = []
    lock = threading.Lock()
    for own in spilled:
        # some networks are called by their parts: an autoencoder's encoder and decoder
        for part in (own.network, *own.network.children()):
            own.handles.append(part.register_forward_pre_hook(Waking(own, awake, lock)))
        own.handles.append(own.network.register_forward_hook(Evicting(own)))
    return spilled


def _nameless_file(folder: Path, size: int) -> torch.UntypedStorage:
    """Return the content of a new file that has no name and ends with its mapping.

    The disk space is allocated first: a write to a page without space would end the process.

    Raises:
        OSError: If there is no space; the message names the folder.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} ({size} bytes)", str(folder)) from None
        storage = torch.UntypedStorage.from_file(f"/proc/self/fd/{file.fileno()}", True, size)
        assert isinstance(storage, torch.UntypedStorage)
        return storage


def _call_libc(function: str, *numbers: int) -> None:
    """Call a function of glibc; other C libraries, which lack it, allocate by rules of their own."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, function):
        getattr(libc, function)(*numbers)
