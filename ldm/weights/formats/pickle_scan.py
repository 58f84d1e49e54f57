"""List the globals that a pickle names, from its opcodes; nothing is executed."""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass
from typing import IO

# The globals that the restricted reader builds tensors with (TENSORS), and those that it replaces by objects
# that do nothing (INERT). Every other global is refused.
TENSORS = frozenset(
    {
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "collections.OrderedDict",
        "torch.Size",
    }
    | {
        f"torch.{kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    }
)
INERT = frozenset(
    {
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in (
            "set",
            "frozenset",
            "list",
            "dict",
            "tuple",
            "int",
            "long",
            "float",
            "complex",
            "bool",
            "str",
            "bytes",
            "bytearray",
            "slice",
            "object",
        )
    }
    | {
        "collections.defaultdict",
        "collections.Counter",
        "_codecs.encode",
        "copyreg._reconstructor",
        "copy_reg._reconstructor",
        "typing.Any",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "datetime.datetime",
        "datetime.timedelta",
        "argparse.Namespace",
        "torch.device",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "torch.nn.modules.container.ParameterDict",
    }
    | {
        f"torch.{name}"
        for name in (
            "float64",
            "float32",
            "float16",
            "bfloat16",
            "int64",
            "int32",
            "int16",
            "int8",
            "uint8",
            "bool",
        )
    }
)
INERT_PREFIXES = (
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "omegaconf.",
    "packaging.version.",
    "packaging._structures.",
    "torch.optim.",
    "pytorch_warmup.",
)
MAX_PICKLE = 256 << 20  # bytes; pickles do not contain tensors, so real ones have a few megabytes


def permitted(name: str) -> bool:
    """Return whether the restricted reader accepts a global with this full name."""
    return name in TENSORS or name in INERT or name.startswith(INERT_PREFIXES)


@dataclass(frozen=True, kw_only=True)
class PickleScan:
    """The globals of a pickle.

    Args:
        globals: The globals that it names, in order, without repetition.
        refused: Those that are not permitted.
        end: Offset of the first byte after the pickle.
    """

    globals: tuple[str, ...]
    refused: tuple[str, ...]
    end: int


STRINGS = {
    "UNICODE",
    "BINUNICODE",
    "BINUNICODE8",
    "SHORT_BINUNICODE",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
}
PUT, GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
HIDDEN = "a global whose name is computed"


def scan_pickle(data: bytes | IO[bytes]) -> PickleScan:
    """Return the globals of one pickle from its opcodes.

    Raises:
        ValueError: If the data are truncated or no pickle, or memo indices would exhaust the memory.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    names: dict[str, None] = {}
    recent: list[str | None] = []  # the last two values pushed; None for what is not a string
    memo: dict[int, str | None] = {}
    count = 0
    for opcode, arg, _ in pickletools.genops(stream):
        count += 1
        kind = opcode.name
        if kind in ("GLOBAL", "INST"):
            names[str(arg).replace(" ", ".", 1)] = None
        elif kind == "STACK_GLOBAL":
            known = len(recent) == 2 and None not in recent
            names[f"{recent[0]}.{recent[1]}" if known else HIDDEN] = None
        elif kind in ("EXT1", "EXT2", "EXT4"):
            names[HIDDEN] = None
        if kind == "MEMOIZE":
            memo[len(memo)] = recent[-1] if recent else None
        elif kind in PUT:
            index = int(str(arg))
            if index > count:
                raise ValueError(f"memo index {index} after {count} opcodes")
            memo[index] = recent[-1] if recent else None
        elif kind not in ("PROTO", "FRAME", "STOP"):
            value = arg if kind in STRINGS else memo.get(int(str(arg))) if kind in GET else None
            recent = [*recent, value][-2:]
    refused = tuple(name for name in names if not permitted(name))
    return PickleScan(globals=tuple(names), refused=refused, end=stream.tell())
