"""Read PyTorch's pickled files (.ckpt, .pt, .pth, .bin) without executing anything in them.

Such a file is a zip archive with one pickle, data.pkl, and the uncompressed bytes of the tensors; before
PyTorch 1.6, it is five pickles and the bytes of the tensors. A `PickleMachine`, which cannot execute
anything, builds tensors and dictionaries, and replaces the classes of training frameworks by objects that do
nothing. Files that name anything else are refused. Tensors are memory-mapped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.support.text import shown
from ldm.weights.formats.pickle_machine import PickleMachine, StandIn
from ldm.weights.formats.pickle_names import permitted
from ldm.weights.formats.pickle_steps import next_value
from ldm.weights.formats.pickle_tensors import TensorBuilder
from ldm.weights.formats.safetensors import MAX_NAME, check_names, existing_file, map_file, mapped_bytes
from ldm.weights.formats.torch_archive import ZIP, TorchArchive

# Entries with the state dict: Lightning's, then DALLE2-pytorch's averaged and plain weights.
STATES = ("state_dict", "ema_model", "model")
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # PyTorch's magic number before 1.6, pickled
PROTOCOL = 1001  # of such files
PICKLE = b"\x80"  # first byte of a pickle
MAX_MODULES = 10_000  # of a pickled module


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


@dataclass(frozen=True, kw_only=True)
class Pickled:
    """What reading a pickled file found.

    Args:
        path: The file.
        content: Its content; None if there is a problem.
        globals: The globals that its pickles name, in order, without repetition, as far as they were read.
        refused: Those that are not permitted.
        problem: Why it cannot be read; "" if it can.
    """

    path: Path
    content: Any = None
    globals: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    problem: str = ""

    def checkpoint(self) -> Checkpoint:
        """Return the state dict; see `read_ckpt`."""
        content = self.checked()
        if isinstance(content, StandIn):
            content = module_tensors(content, self.path)
        if not isinstance(content, dict):
            raise ValueError(
                f"{str(self.path)!r}: expected a dictionary of tensors, got {type(content).__name__}"
            )
        state = next((content[name] for name in STATES if isinstance(content.get(name), dict)), content)
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        if not tensors:
            raise ValueError(
                f"{str(self.path)!r} holds no tensors at its top level or in 'state_dict'; its keys:"
                f" {', '.join(map(shown, list(content)[:10]))}"
            )
        check_names(tensors, self.path)
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

    def checked(self) -> Any:
        """Return the content; ValueError if there is a problem."""
        if self.problem:
            raise ValueError(self.problem)
        return self.content


def read_ckpt(path: str | Path) -> Checkpoint:
    """Return the memory-mapped state dict of a .ckpt, .pt, .pth or .bin file.

    The state dict is the first of the entries `STATES` that is present, otherwise the top level.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, names a global that might run code, is a zip bomb or a TorchScript
            archive, or holds no tensors; the message names the file.
    """
    return examine(path).checkpoint()


def module_tensors(module: StandIn, path: Path) -> dict[str, Tensor]:
    """Return the parameters of a module that was pickled as a whole, by the names of its state dict.

    Nothing is made of its class: its state is a dictionary, which holds parameters and inner modules.

    Args:
        module: What stands for the module.
        path: The file, for messages.

    Raises:
        ValueError: If it is no module, or has more inner modules than `MAX_MODULES`.
    """
    found: dict[str, Tensor] = {}
    stack: list[tuple[str, object]] = [("", module)]
    for _ in range(MAX_MODULES):
        if not stack:
            return found
        prefix, part = stack.pop()
        state = part.state if isinstance(part, StandIn) else None
        own = [state.get(kind) if isinstance(state, dict) else None for kind in ("_parameters", "_modules")]
        if not all(isinstance(each, dict) for each in own):
            raise ValueError(
                f"{str(path)!r}: expected tensors or a module, got {shown(part)} at {shown(prefix)}"
            )
        parameters, modules = own
        assert isinstance(parameters, dict) and isinstance(modules, dict)
        found |= {f"{prefix}{name}": each for name, each in parameters.items() if isinstance(each, Tensor)}
        stack += [
            (f"{prefix}{name}."[-MAX_NAME:], each)
            for name, each in reversed(modules.items())
            if each is not None
        ]
    raise ValueError(f"{str(path)!r}: expected a module of at most {MAX_MODULES:,} modules")


def read_pickle(path: str | Path, *, whole: bool = False) -> Any:
    """Return the content of a file written by `torch.save`; see `read_ckpt` and `examine`.

    It consists of dictionaries, lists, tuples, numbers, strings, bytes, tensors, and `Global` and `StandIn`
    objects.
    """
    return examine(path, whole=whole).checked()


def examine(path: str | Path, *, whole: bool = False) -> Pickled:
    """Read a pickled file as far as it can be read; what is wrong with it is in `Pickled.problem`.

    Args:
        path: The file.
        whole: Whether all bytes are read now: the checksums of a zip archive are compared, and the tensors
            are in memory. Otherwise they are memory-mapped. Default: False.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    path = existing_file(path)
    try:
        data = map_file(path)
    except ValueError as error:
        return Pickled(path=path, problem=str(error))
    builder = TensorBuilder(whole=whole)
    machine = PickleMachine(data, builder.call, builder.storage)
    content, problem = None, ""
    try:
        content = _content(path, machine, builder)
    except (ValueError, MemoryError, RuntimeError) as error:
        text = str(error) or type(error).__name__
        problem = text if text.startswith(repr(str(path))) else f"{str(path)!r} is damaged or refused: {text}"
    names = tuple(machine.names)
    refused = tuple(name for name in names if not permitted(name))
    if refused:
        listed = ", ".join(refused[:8]) + (f" and {len(refused) - 8} more" if len(refused) > 8 else "")
        problem = (
            f"{str(path)!r} is refused: its pickle names {listed}, which might run code. Nothing was"
            " executed. Ask for the weights as safetensors."
        )
    return Pickled(
        path=path,
        content=None if problem else content,
        globals=names,
        refused=refused,
        problem=problem,
    )


def _content(path: Path, machine: PickleMachine, builder: TensorBuilder) -> Any:
    """Return the content of a file in any container.

    Args:
        path: The file.
        machine: The machine at the beginning of the file.
        builder: What makes the tensors for it.
    """
    data = machine.data
    if data[:4] == ZIP:
        return _zip_content(TorchArchive(path, data), machine, builder)
    if data[: len(LEGACY)] == LEGACY:
        return _legacy_content(machine, builder)
    kind = ""
    if data[:1] == PICKLE:
        kind = ": it is a plain pickle"
        while data[machine.at : machine.at + 1] == PICKLE:
            next_value(machine)
    if data[257:262] == b"ustar":
        kind = ": it is a tar archive, as PyTorch 0.1 wrote"
    raise ValueError(
        f"{str(path)!r} is not a file written by torch.save (neither a zip archive nor its format before"
        f" 1.6){kind}"
    )


def _zip_content(archive: TorchArchive, machine: PickleMachine, builder: TensorBuilder) -> Any:
    """Return the content of an archive; all of its pickles are read, the state dict's is the first."""
    values = []
    for machine.at, machine.end in archive.pickles():
        values.append(next_value(machine))
        if machine.at != machine.end:
            raise ValueError(f"byte {machine.at}: bytes follow the pickle in its entry")
    archive.check_kind()
    archive.check_entries(builder.storages)
    if builder.whole:
        archive.check_sums()
    builder.fill(archive.storage)
    return values[0]


def _legacy_content(machine: PickleMachine, builder: TensorBuilder) -> Any:
    """Return the content of a file in PyTorch's format before 1.6.

    It consists of five pickles (magic number, protocol, system, content, keys of the storages) and, for each
    key, the number of entries and the entries.
    """
    data = machine.data
    _, protocol, system, content, keys = (next_value(machine) for _ in range(5))
    if protocol != PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError(
            f"protocol {shown(protocol)} of the system {shown(system)}, expected {PROTOCOL} of a"
            " little-endian one"
        )
    stored = builder.storages
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"the keys of its storages are {shown(keys)}, expected a list of text")
    if len(set(keys)) != len(keys) or set(keys) != set(stored):
        raise ValueError(
            f"it has {len(keys)} storages {shown(keys)}, and its pickle refers to {len(stored)}:"
            f" {shown(list(stored))}"
        )
    at, places = machine.at, dict[str, int]()
    for key in keys:
        numel = stored[key].size // stored[key].dtype.itemsize
        places[key], end = at + 8, at + 8 + stored[key].size
        if end > len(data) or int.from_bytes(data[at : at + 8], "little") != numel:
            raise ValueError(f"storage {shown(key)} is truncated, or has another size than {numel}")
        at = end
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes follow its last storage")
    builder.fill(lambda each, alignment: mapped_bytes(data, places[each.key], each.size, alignment))
    return content
