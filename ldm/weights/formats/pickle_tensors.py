"""Build the tensors that a pickle describes; they get their data after everything has been checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.support.text import shown
from ldm.weights.formats.pickle_machine import Global, StandIn
from ldm.weights.formats.pickle_names import ENTRY_TYPES, STORAGE_TYPES, UNREAD
from ldm.weights.formats.pickle_steps import set_items
from ldm.weights.formats.safetensors import MAX_DIMENSIONS, MAX_EXTENT, MAX_TENSORS

MAX_COPIED = 200_000  # values of the lists from which shapes and dictionaries are made
SHARING = (10, 1 << 20)  # all tensors have at most so many times the bytes of their storages, plus bytes


class StoredBytes(NamedTuple):
    """A storage that a pickle refers to: its key, its type and its size in bytes."""

    key: str
    dtype: torch.dtype
    size: int


class Described(NamedTuple):
    """A tensor without data, and the place of its entries in a storage, in entries."""

    tensor: Tensor
    storage: StoredBytes
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class TensorBuilder:
    """Makes what a `PickleMachine` needs: storages, tensors, and objects that do nothing.

    Args:
        whole: Whether the tensors are copied into memory, instead of mapped. Default: False.

    Attributes:
        storages: The storages that the pickles refer to, by key.
        tensors: The tensors that they describe.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole
        self.storages: dict[str, StoredBytes] = {}
        self.tensors: list[Described] = []
        self.total = 0  # bytes of all tensors
        self.copied = 0  # values that calls have copied

    def copy(self, values: Any) -> tuple[Any, ...]:
        """Return a list or a tuple as a tuple; ValueError for others, and if there were too many."""
        if not isinstance(values, tuple | list):
            raise ValueError(f"expected a list, got {shown(values)}")
        self.copied += len(values)
        if self.copied > MAX_COPIED:
            raise ValueError(f"lists of more than {MAX_COPIED:,} values are copied")
        return tuple(values)

    def storage(self, pid: Any) -> StoredBytes:
        """Return the storage of a persistent identifier, which torch.save writes as a tuple."""
        if (
            not isinstance(pid, tuple)
            or len(pid) not in (5, 6)
            or pid[0] != "storage"
            or pid[5:] not in ((), (None,))
        ):
            raise ValueError(f"{shown(pid)}, expected a reference to a storage")
        _, kind, key, _, numel = pid[:5]
        name = kind.name if isinstance(kind, Global) else shown(kind)
        if name in UNREAD:
            raise _unread(name)
        if name not in STORAGE_TYPES or type(key) is not str or not _are_extents((numel,)):
            raise ValueError(f"{shown(pid)}, expected a storage of a known type, with a key and a size")
        found = StoredBytes(key, STORAGE_TYPES[name], numel * STORAGE_TYPES[name].itemsize)
        if len(self.storages) == MAX_TENSORS and key not in self.storages:
            raise ValueError(f"more than {MAX_TENSORS:,} storages")
        first = self.storages.setdefault(key, found)
        if first.size != found.size:
            raise ValueError(
                f"storage {shown(key)} has {first.size} bytes in one place, {found.size} in another"
            )
        return found

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        """Return what calling a global makes: a tensor, a container, or a `StandIn`."""
        if name in UNREAD:
            raise _unread(name)
        build = BUILDERS.get(name)
        if build is None:
            return StandIn(name)
        try:
            return build(self, *args)
        except TypeError:  # the number of arguments
            raise ValueError(f"{name} is called with {len(args)} arguments: {shown(args)}") from None

    def tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a tensor that gets its data later.

        Args:
            storage: The storage.
            offset: The first entry of the tensor in it.
            size: Shape of the tensor.
            stride: Its strides.
            dtype: Type of the entries; None for that of the storage. Default: None.
        """
        if not isinstance(storage, StoredBytes):
            raise ValueError(f"a tensor is made of {shown(storage)}, expected a storage")
        if (
            not isinstance(size, tuple | list)
            or not isinstance(stride, tuple | list)
            or len(size) != len(stride)
        ):
            raise ValueError(f"a tensor has size {shown(size)} and strides {shown(stride)}")
        if len(size) > MAX_DIMENSIONS or not _are_extents((offset, *size, *stride)):
            raise ValueError(
                f"a tensor has size {shown(size)}, strides {shown(stride)} and offset {shown(offset)}:"
                f" expected at most {MAX_DIMENSIONS} whole numbers from 0 to {MAX_EXTENT:,}"
            )
        dtype = storage.dtype if dtype is None else dtype
        numel, held = math.prod(size), storage.size // dtype.itemsize
        last = (
            offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            if numel
            else offset - 1
        )
        if numel > held or last >= held or offset > held or math.prod(filter(None, size)) >= MAX_EXTENT:
            raise ValueError(
                f"a tensor of shape {shown(tuple(size))} does not fit its storage {shown(storage.key)} of"
                f" {held} × {dtype}"
            )
        self.total += numel * dtype.itemsize
        if len(self.tensors) == MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS:,} tensors")
        made = torch.empty(0, dtype=dtype, device="cpu")
        self.tensors.append(Described(made, storage, offset, tuple(size), tuple(stride)))
        return made

    def fill(self, locate: Callable[[StoredBytes, int], Tensor]) -> None:
        """Give the tensors their data.

        Args:
            locate: (storage, alignment in bytes) -> its bytes, as a flat uint8 tensor.

        Raises:
            ValueError: If the tensors share their storages too often.
        """
        if self.total > SHARING[0] * sum(each.size for each in self.storages.values()) + SHARING[1]:
            raise ValueError(f"{len(self.tensors)} tensors of {self.total} bytes share the same storages")
        aligned: dict[str, int] = {}
        for each in self.tensors:
            key = each.storage.key
            aligned[key] = max(aligned.get(key, 1), each.tensor.dtype.itemsize)
        flats = {key: locate(storage, aligned.get(key, 1)) for key, storage in self.storages.items()}
        if self.whole:
            flats = {key: flat.clone() for key, flat in flats.items()}
        for tensor, storage, offset, size, stride in self.tensors:
            tensor.set_(flats[storage.key].untyped_storage(), offset, size, stride)


def _are_extents(numbers: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n <= MAX_EXTENT for n in numbers)


def _unread(name: str) -> ValueError:
    return ValueError(f"it holds {UNREAD[name]} ({name}), which is not read")


def _check_plain(properties: tuple[Any, ...]) -> None:
    """Raise ValueError if a tensor has properties that change its values, such as being conjugated."""
    if not all(each is None or (type(each) is dict and not each) for each in properties):
        raise ValueError(f"a tensor with the properties {shown(properties)}, which are not read")


def _tensor_v2(builder: TensorBuilder, flat: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    _check_plain(rest[2:])
    return builder.tensor(flat, offset, size, stride)


def _tensor_v3(
    builder: TensorBuilder,
    flat: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _: Any,
    hooks: Any,
    kind: Any,
    *rest: Any,
) -> Tensor:
    _check_plain(rest)
    name = kind.name if isinstance(kind, Global) else shown(kind)
    if name in UNREAD:
        raise _unread(name)
    dtype = getattr(torch, name.removeprefix("torch."), None) if name in ENTRY_TYPES else None
    if dtype is None:
        raise ValueError(f"a tensor of type {name}, which PyTorch {torch.__version__} lacks")
    return builder.tensor(flat, offset, size, stride, dtype)


def _parameter(builder: TensorBuilder, data: Any, *_: Any) -> Any:
    if not isinstance(data, Tensor | StandIn):
        raise ValueError(f"a parameter is made of {shown(data)}, expected a tensor")
    return data


def _from_type(builder: TensorBuilder, function: Any, kind: Any, args: Any, *_: Any) -> Any:
    """Return a tensor that was saved with attributes of its own, without them."""
    name = function.name if isinstance(function, Global) else ""
    if name not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3") or not isinstance(
        args, tuple
    ):
        raise ValueError(f"a tensor is made by {shown(function)} of {shown(args)}")
    return builder.call(name, args)


def _shape(builder: TensorBuilder, size: Any = ()) -> tuple[int, ...]:
    numbers = builder.copy(size)
    if len(numbers) > MAX_DIMENSIONS or not _are_extents(numbers):
        raise ValueError(f"a shape is made of {shown(size)}, expected whole numbers")
    return numbers


def _mapping(builder: TensorBuilder, pairs: Any = ()) -> dict[Any, Any]:
    """Return a dictionary of a list of pairs, which Python 2 wrote."""
    made: dict[Any, Any] = {}
    for pair in builder.copy(pairs):
        set_items(made, list(builder.copy(pair)))
    return made


BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "torch.Size": _shape,
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}
