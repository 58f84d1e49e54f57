"""Read PyTorch's pickled files (.ckpt, .pt, .pth, .bin) without executing anything in them.

Such a file is a zip archive with one pickle, data.pkl, and the uncompressed bytes of the tensors. A
restricted unpickler builds tensors and dictionaries, replaces the classes of training frameworks by objects
that do nothing, and refuses every other name. Tensors are memory-mapped.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ldm.weights.formats.pickle_scan import PickleScan, permitted, scan_pickle
from ldm.weights.formats.safetensors import existing_file, map_file
from ldm.weights.formats.torch_archive import ZIP, TorchArchive

STORAGES = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in (
        ("Double", torch.float64),
        ("Float", torch.float32),
        ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
        ("Long", torch.int64),
        ("Int", torch.int32),
        ("Short", torch.int16),
        ("Char", torch.int8),
        ("Byte", torch.uint8),
        ("Bool", torch.bool),
    )
}
# Entries with the state dict: Lightning's, then DALLE2-pytorch's averaged and plain weights.
STATES = ("state_dict", "ema_model", "model")
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # PyTorch's magic number before 1.6, pickled


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint.

    Args:
        tensors: The tensors by name.
        values: Numbers and strings beside them, such as global_step.
        dropped: Names of the entries that are neither.
    """

    tensors: dict[str, Tensor]
    values: dict[str, int | float | str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def read_ckpt(path: str | Path) -> Checkpoint:
    """Return the memory-mapped state dict of a .ckpt, .pt, .pth or .bin file.

    The state dict is the first of the entries `STATES` that is present, otherwise the top level.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, names a global that might run code, is a zip bomb or a TorchScript
            archive, or holds no tensors; the message names the file.
    """
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r}: expected a dictionary of tensors, got {type(content).__name__}")
    state = next((content[name] for name in STATES if isinstance(content.get(name), dict)), content)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"{str(path)!r} holds no tensors at its top level or in 'state_dict'; its keys:"
            f" {', '.join(map(str, list(content)[:10]))}"
        )
    if not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"{str(path)!r}: expected strings as names of tensors")
    others = {
        str(key): value
        for mapping in (content, state)
        for key, value in mapping.items()
        if not isinstance(value, Tensor)
    }
    others = {key: value for key, value in others.items() if key not in STATES}
    values = {key: value for key, value in others.items() if isinstance(value, int | float | str)}
    return Checkpoint(
        tensors=tensors, values=values, dropped=tuple(key for key in others if key not in values)
    )


def read_pickle(path: str | Path) -> Any:
    """Return the content of a file written by `torch.save`; see `read_ckpt`.

    It consists of dictionaries, lists, numbers, strings, memory-mapped tensors and `StandIn` objects.
    """
    path = existing_file(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{str(path)!r} is empty")
    data = map_file(path)
    if data[:4] == ZIP:
        archive = TorchArchive(path, data)
        text = archive.pickle()
        check_globals(scan(text, path), path)
        return _unpickle(text, archive.storage, path)
    if data[: len(LEGACY)] == LEGACY:
        return _read_legacy(path)
    raise ValueError(
        f"{str(path)!r} is not a file written by torch.save (neither a zip archive nor its format before 1.6)"
    )


def scan(text: bytes | IO[bytes], path: Path) -> PickleScan:
    """Return the globals of a pickle; ValueError naming the file if it is damaged."""
    try:
        return scan_pickle(text)
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{str(path)!r}: its pickle is damaged ({error})") from None


def check_globals(found: PickleScan, path: Path) -> None:
    """Raise ValueError if a pickle names globals that are not permitted."""
    if found.refused:
        raise ValueError(
            f"{str(path)!r} is refused: its pickle names {', '.join(found.refused[:8])}, which might run"
            " code. Nothing was executed. Ask for the weights as safetensors."
        )


class StandIn:
    """Stands for an object of a training framework: it accepts anything and does nothing.

    ``state`` is the state that was pickled.
    """

    state: object = None

    def __new__(cls, *args: object, **kwargs: object) -> StandIn:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None: ...

    def extend(self, items: object) -> None: ...

    def add(self, item: object) -> None: ...


def _unpickle(text: bytes, storage: Callable[[torch.dtype, str, int], Tensor], path: Path) -> Any:
    """Return the content of a pickle.

    Args:
        text: The pickle.
        storage: (dtype, key, number of entries) -> the storage as a flat tensor.
        path: The file, for messages.
    """
    builders = _new_builders()
    flats: dict[str, Tensor] = {}

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}"
            if full in STORAGES:
                return builders.setdefault(full, type(name, (StandIn,), {"dtype": STORAGES[full]}))
            if not permitted(full):
                raise ValueError(f"it names {full}, which might run code")
            return builders.setdefault(full, type(name, (StandIn,), {}))

        def persistent_load(self, pid: Any) -> Tensor:
            tag, storage_type, key, _, numel = pid
            if tag != "storage" or type(numel) is not int or numel < 0 or not isinstance(key, str):
                raise ValueError(f"it refers to {str(pid)[:80]}, expected a storage")
            if key not in flats:
                flats[key] = storage(storage_type.dtype, key, numel)
            return flats[key]

    try:
        return Reader(io.BytesIO(text)).load()
    except Exception as error:  # a damaged pickle can raise anything
        message = str(error)
        raise ValueError(
            message
            if str(path) in message
            else f"{str(path)!r}: its pickle is damaged ({type(error).__name__}: {message})"
        ) from None


def _new_builders() -> dict[str, Any]:
    """Return new builders of dictionaries, tensors and shapes, by the global that a pickle names.

    They are created for each pickle, so that nothing that a pickle does to them persists.
    """

    class Mapping(dict[Any, Any]):
        def __setstate__(self, state: object) -> None: ...  # state dicts carry `_metadata`

    def tensor(
        flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> Tensor:
        if (
            not isinstance(flat, Tensor)
            or min((offset, *size, *stride)) < 0
            or math.prod(size) > flat.numel()
        ):
            raise ValueError(f"a tensor of shape {tuple(size)} does not fit its storage")
        return torch.as_strided(flat, tuple(size), tuple(stride), offset)

    def parameter(data: Tensor, *_: object) -> Tensor:
        return data

    def shape(sizes: Any = ()) -> tuple[int, ...]:
        return tuple(sizes)

    return {
        "collections.OrderedDict": Mapping,
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": parameter,
        "torch.Size": shape,
    }


def scan_file(path: str | Path) -> PickleScan:
    """Return the globals that a pickled file names, read from its opcodes; ValueError if it is damaged."""
    path = existing_file(path)
    with path.open("rb") as file:
        head = file.read(len(LEGACY))
        if head[:4] == ZIP:
            return scan(TorchArchive(path, map_file(path)).pickle(), path)
        file.seek(0)
        # before 1.6, four pickles: magic number, protocol, system, content
        found = [scan(file, path) for _ in range(4 if head == LEGACY else 1)]
    names = dict.fromkeys(name for each in found for name in each.globals)
    return PickleScan(
        globals=tuple(names), refused=tuple(name for name in names if not permitted(name)), end=found[-1].end
    )


def _read_legacy(path: Path) -> Any:
    """Return the content of a file in PyTorch's format before 1.6: several pickles, then raw storages.

    The pickles are scanned first; then torch's own restricted reader reads the file.
    """
    check_globals(scan_file(path), path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{str(path)!r} is truncated, or cannot be read safely in PyTorch's format before 1.6 ({reason})"
        ) from None
