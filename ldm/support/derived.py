"""What is derived from parameters and kept beside them, and made again when they change.

Packed, folded and quantised weights are caches. The parameters stay where they are, with their names, and
whatever changes them counts: an optimizer, `load_state_dict`, another parameter in their place, a move, or a
write to `weight.data` or to an array that shares the memory, which no version counter records.

When something derived is used, it is compared with its sources:

- at every use: the tensors' identities, addresses, shapes, strides, dtypes and version counters (a
  microsecond);
- at the first use in a call of a pipeline (`ldm.support.calls.separate_call`), and outside of such calls at
  every use: a checksum of all their bits, at about 6 GB/s on one core of AVX-512.

A write that no counter records, during a call of a pipeline, is therefore seen from the next call on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ldm.support.calls import current_call, own_state

_T = TypeVar("_T")
Read = Callable[[Tensor], None]
COLUMNS = 1024  # 64-bit words in a row of `checksum`
DIRECT = 2**14  # bytes up to which `checksum` hashes the content itself


def version(x: Tensor) -> int:
    """Return how often a tensor was written to; 0 for inference tensors, which do not count."""
    return 0 if x.is_inference() else x._version


def checksum(x: Tensor) -> int:
    """Return a hash of all bits of a tensor, which depends on their order.

    The bits are summed as 64-bit integers along the rows and along the columns of a table, and the sums are
    hashed. A change of one number always changes two sums. The value is comparable within a process.

    Args:
        x: Tensor of any shape, strides, dtype and device.
    """
    x = x.detach()
    if x.is_meta:
        return 0
    if x.ndim == 4 and not x.is_contiguous():
        x = x.permute(0, 2, 3, 1)  # the order of memory, if the channels are last
    flat = x.reshape(-1)
    if not flat.numel():
        return 0
    data = flat.view(torch.uint8)
    if data.numel() <= DIRECT:
        return hash(_content(data))
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // (8 * COLUMNS) * (8 * COLUMNS)
    table = data[:whole].view(torch.int64).view(-1, COLUMNS)
    return hash((_content(table.sum(0)), _content(table.sum(1)), _content(data[whole:])))


def _content(x: Tensor) -> bytes:
    # of a copy: memory that an array shares cannot be resized, as FSDP does with weights
    return x.cpu().clone().numpy().tobytes()


class Seal:
    """What tensors were at one time.

    Args:
        tensors: The tensors. They are not kept alive.
        contents: Whether their contents are remembered, by a checksum.
        read: Called with each tensor after its contents were read. Default: None.
    """

    def __init__(self, tensors: Sequence[Tensor], *, contents: bool, read: Read | None = None) -> None:
        self.identities = [weakref.ref(x) for x in tensors]
        self.states = [_state(x) for x in tensors]
        self.checksums = [_read_checksum(x, read) for x in tensors] if contents else []

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors, as far as can be said without reading them."""
        return len(tensors) == len(self.identities) and all(
            identity() is x and _state(x) == state
            for x, identity, state in zip(tensors, self.identities, self.states, strict=True)
        )

    def holds_contents(self, tensors: Sequence[Tensor], read: Read | None = None) -> bool:
        """Return whether tensors for which `holds` is true have the contents that are remembered, if any."""
        return not self.checksums or all(
            _read_checksum(x, read) == own for x, own in zip(tensors, self.checksums, strict=True)
        )


def _state(x: Tensor) -> tuple[Any, ...]:
    """Return what can be said of a tensor without reading it."""
    try:
        address = x.data_ptr()
    except RuntimeError:  # a tensor of a transform or a trace, which has no memory of its own
        address = 0
    return version(x), address, x.shape, x.stride(), x.dtype, x.device


def _read_checksum(x: Tensor, read: Read | None) -> int:
    try:
        return checksum(x)
    finally:
        if read is not None:
            read(x)


class Derived(Generic[_T]):
    """A value that is derived from tensors, kept, and made again when they change.

    It may be used by several threads. A copy, and a pickle, is empty.
    """

    def __init__(self) -> None:
        self._entry: tuple[Seal, _T] | None = None
        self._making = threading.Lock()

    def __reduce__(self) -> tuple[type[Derived[_T]], tuple[()]]:
        return type(self), ()

    @property
    def value(self) -> _T | None:
        """The value, which may be out of date; None if there is none."""
        entry = self._entry
        return None if entry is None else entry[1]

    def of(
        self,
        sources: Sequence[Tensor],
        make: Callable[[], _T],
        *,
        contents: bool = True,
        read: Read | None = None,
    ) -> _T:
        """Return the value for the present state of its sources.

        Args:
            sources: The tensors.
            make: Makes the value.
            contents: Whether to compare the contents of the sources too, at the first use in a call and
                outside of calls. Default: True.
            read: Called with each source after its contents were read. Default: None.
        """
        call = current_call()
        compare = contents and (call is None or self not in call.checked)
        entry = self._entry
        if not _is_current(entry, sources, contents=compare, read=read):
            with self._making:
                entry = self._entry  # which another thread may have made while this one waited
                if not _is_current(entry, sources, contents=compare, read=read):
                    self._entry = None  # the memory of the old value is free for the new one
                    # before the value is made: what changes meanwhile is seen at the next use
                    seal = Seal(sources, contents=contents, read=read)
                    self._entry = entry = seal, make()
                    if read is not None:
                        for x in sources:
                            read(x)
        assert entry is not None
        if call is not None:
            call.checked.add(self)
        return entry[1]

    def clear(self) -> None:
        """Discard the value."""
        self._entry = None


def _is_current(
    entry: tuple[Seal, Any] | None, sources: Sequence[Tensor], *, contents: bool, read: Read | None
) -> bool:
    """Return whether an entry of `Derived` was made of the present state of its sources."""
    return (
        entry is not None
        and entry[0].holds(sources)
        and (not contents or entry[0].holds_contents(sources, read))
    )


def kept_for_call(
    owner: object,
    sources: Sequence[Tensor],
    make: Callable[[], _T],
    *,
    key: Hashable = None,
    read: Read | None = None,
) -> _T:
    """Return what an object derives from tensors and keeps for this call (without one: for this thread).

    Args:
        owner: The object; see `ldm.support.calls.own_state`.
        sources: The tensors.
        make: Makes the value, which must not refer to the owner.
        key: What else the value depends on; there is one value for each key. Default: None.
        read: Called with each source after its contents were read. Default: None.
    """
    kept: dict[Hashable, Derived[_T]] = own_state(owner, dict)
    # inside a call nothing is older than the call, so that contents need no comparison
    return kept.setdefault(key, Derived()).of(sources, make, contents=current_call() is None, read=read)
