"""The kernels compiled for 64-bit ARM and run by an emulator, in place of a library of this machine.

It needs Debian's packages g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.speed.kernels import group_norm, ops, product
from ldm.speed.kernels.ops import CompiledOps
from ldm.speed.kernels.sources import FLAGS, HERE, SOURCES

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
DRIVER = Path(__file__).with_name("emulated_driver.cpp")


@cache
def program(folder: Path) -> Path:
    """Return the kernels with the program that calls them, for 64-bit ARM; skip without the tools."""
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    sources = [str(HERE / name) for name in SOURCES]
    command = [COMPILER, *flags, "-static", f"-I{HERE}", *sources, str(DRIVER), "-o", str(folder / "program")]
    subprocess.run(command, check=True)
    return folder / "program"


class EmulatedLibrary:
    """The functions of the library; tensors take the place of pointers, and lists of them of arrays."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.program = folder, program(folder)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self._call(name, arguments)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> None:
        given, made = self.folder / "in", self.folder / "out"
        places: list[tuple[int, int]] = []  # address and size of each buffer
        given.write_bytes(b"".join(_packed(argument, places) for argument in arguments))
        subprocess.run([EMULATOR, str(self.program), name, str(given), str(made)], check=True)
        content, at = made.read_bytes(), 0
        for address, size in places:
            ctypes.memmove(address, content[at : at + size], size)
            at += size
        assert at == len(content)


def _packed(argument: Any, places: list[tuple[int, int]]) -> bytes:
    """Return an argument in the form that the program reads."""
    if argument is None:
        return struct.pack("<q", 3)
    if isinstance(argument, Tensor):
        return struct.pack("<q", 2) + _buffer(
            argument.data_ptr(),
            argument.untyped_storage().nbytes() - argument.storage_offset() * argument.element_size(),
            places,
        )
    if isinstance(argument, list):
        parts = [_packed(part, places)[8:] for part in argument]
        return struct.pack("<qq", 4, len(parts)) + b"".join(parts)
    if isinstance(argument, ctypes.Array):
        return struct.pack("<q", 2) + _buffer(ctypes.addressof(argument), ctypes.sizeof(argument), places)
    if isinstance(argument, ctypes.c_double):
        return struct.pack("<qd", 1, argument.value)
    return struct.pack("<qq", 0, argument.value if isinstance(argument, ctypes.c_int64) else argument)


def _buffer(address: int, size: int, places: list[tuple[int, int]]) -> bytes:
    places.append((address, size))
    return struct.pack("<q", size) + ctypes.string_at(address, size)


def emulated_ops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> CompiledOps:
    """Return the operators, computed by the kernels for NEON under emulation."""
    for module in (ops, group_norm, product):
        monkeypatch.setattr(module, "pointer", lambda x: x)
    made = CompiledOps.__new__(CompiledOps)
    made.__dict__.update(lib=EmulatedLibrary(folder), dtypes=(torch.float32,))
    return made
