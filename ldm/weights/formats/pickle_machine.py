"""The machine that a pickle is a program for, without the ability to execute anything.

It has a stack and a memo, and knows numbers, text, bytes, lists, tuples and dictionaries. A global is a name:
nothing is imported. What is made of storages and of calls is decided by the functions that it is given. Its
instructions are in `pickle_steps`.

Every length is compared with the bytes that are there, steps are counted, numbers and names are short, keys
of dictionaries are scalars, and nothing recurses: time and memory are proportional to the bytes that are
read.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from typing import Any

from ldm.support.text import shown

MAX_STEPS = 600_000  # instructions of the pickles of a file; a checkpoint has about 40 for each tensor
MAX_INTEGER = 32  # bytes
MAX_LINE = 1024  # bytes of a number or a name in text
MAX_GLOBALS = 1000  # names of classes and functions in a file; a checkpoint has about ten
MAX_KEY = 2**61 - 1  # whole numbers below it have different hashes
MISSING: Any = object()  # what an index of the memo holds that was not written


class Global:
    """The name of a class or a function in a pickle; nothing is imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


class StandIn:
    """Stands for an object of another library. It does nothing.

    Attributes:
        name: The class or function that the pickle names for it.
        state: The state that was pickled, or None.
    """

    __slots__ = ("name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: object = None

    def __repr__(self) -> str:
        return f"<{self.name}>"


class PickleMachine:
    """Reads one pickle after another from the same bytes.

    Args:
        data: The bytes.
        call: (name of a global, arguments) -> what a call of it makes.
        storage: (persistent identifier) -> what it stands for.
        begin: Offset of the first pickle. Default: 0.
        end: Offset of the first byte behind the pickles; None for the end of the bytes. Default: None.

    Attributes:
        at: Offset of the next byte.
        names: The globals that were named, in order, without repetition.
    """

    def __init__(
        self,
        data: mmap.mmap,
        call: Callable[[str, tuple[Any, ...]], Any],
        storage: Callable[[Any], Any],
        begin: int = 0,
        end: int | None = None,
    ) -> None:
        self.data, self.call, self.storage = data, call, storage
        self.at, self.end = begin, len(data) if end is None else end
        self.names: dict[str, Global] = {}
        self.left = MAX_STEPS
        self.stack: list[Any] = []  # the values since the last mark
        self.outer: list[list[Any]] = []  # those before it, by mark
        self.memo: list[Any] = []
        self.done = False

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        begin, self.at = self.at, self.at + count
        if count < 0 or self.at > self.end:
            raise ValueError(f"the pickle ends early: {count} bytes expected")
        return self.data[begin : self.at]

    def byte(self) -> int:
        """Return the next byte."""
        if self.at >= self.end:
            raise ValueError("the pickle ends early")
        self.at += 1
        return self.data[self.at - 1]

    def number(self, size: int, *, signed: bool = False) -> int:
        """Return the next bytes as a whole number."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> str:
        """Return the next line of text."""
        found = self.data.find(b"\n", self.at, min(self.end, self.at + MAX_LINE))
        if found < 0:
            raise ValueError(f"expected a line of at most {MAX_LINE} bytes")
        return self.take(found + 1 - self.at)[:-1].decode()

    def marked(self) -> list[Any]:
        """Return the values since the last mark, and take them off the stack."""
        found, self.stack = self.stack, self.outer.pop()
        return found

    def named(self, module: Any, name: Any) -> Global:
        """Return the global of a module's name and a name in it."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError(f"a global is named by {shown(module)} and {shown(name)}, expected text")
        inside = (
            ":" if "." in name[:MAX_LINE] else "."
        )  # of an object of the module, which is never permitted
        full = f"{module[:MAX_LINE]}{inside}{name[:MAX_LINE]}"
        if len(full) > MAX_LINE or not all(part.isidentifier() for part in re.split("[.:]", full)):
            raise ValueError(f"a global has the name {shown(full)}")
        if full not in self.names and len(self.names) == MAX_GLOBALS:
            raise ValueError(f"more than {MAX_GLOBALS:,} globals are named")
        return self.names.setdefault(full, Global(full))

    def called(self, function: Any, args: Any) -> Any:
        """Return what a call makes."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise ValueError(f"{shown(function)} is called with {shown(args)}, expected a global and a tuple")
        return self.call(function.name, args)
