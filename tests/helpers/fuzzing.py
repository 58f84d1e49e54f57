"""Give damaged inputs to a function in a process of its own, and record what must not happen.

A target says what is read. Its mutants follow from its name. Reading one must return, or raise a documented
exception with a short message; it must not take more than five seconds, take more memory than ten times the
input plus 200 MB, write a file, start a process, open a connection or run code. The functions of a target
stand at module level, because the reading process imports them:

    def read(path: Path) -> None:
        read_card(path)

    def test_damaged_cards(tmp_path: Path) -> None:
        check(Target(name="cards", read=read), [CARD], mixed(mutated_json, mutated_bytes), tmp_path)

`LDM_FUZZ=20000 python -m pytest -n0 -s tests/fuzz` reads 20,000 mutants of each target, and
`LDM_FUZZ=5000:20000` those from number 5,000, so that a long reading can be shared among processes.
"""

from __future__ import annotations

import atexit
import errno
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import time
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

SHORT = 300  # mutants per target; the environment variable LDM_FUZZ asks for others
SECONDS = 5.0  # of processor time for each input
MEMORY = (10, 200 << 20)  # times the size of the input, plus bytes
MESSAGE = 3000  # characters of an exception's message
PATIENCE = 12  # times the limit of processor time, after which the reading process is ended
SHOWN = 10  # faults that are listed

Mutator = Callable[[Sequence[bytes], random.Random], bytes]


def write_file(mutant: bytes, folder: Path) -> Path:
    """Write a mutant to the file `mutant` of a folder, and return the file."""
    path = folder / "mutant"
    path.write_bytes(mutant)
    return path


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is read. Its functions stand at module level.

    Args:
        name: Name of the target, from which its mutants follow.
        read: The function under test: it takes what `place` returns.
        place: (input, empty folder) -> the argument of `read`. Default: a file called "mutant".
        allowed: The documented exceptions. Default: ValueError.
        names: Text that the message of each exception contains, such as the file's name; "" for none.
        seconds: Limit of processor time for each input. Default: `SECONDS`.
        short: Number of mutants unless `LDM_FUZZ` states another. Default: `SHORT`.
    """

    name: str
    read: Callable[[Any], object]
    place: Callable[[bytes, Path], object] = write_file
    allowed: tuple[type[Exception], ...] = (ValueError,)
    names: str = "mutant"
    seconds: float = SECONDS
    short: int = SHORT


class Outcome(NamedTuple):
    """What reading one input did: `error` is the exception's class, `text` the beginning of its message, and
    `fault` what must not happen."""

    seconds: float
    memory: int
    error: str = ""
    text: str = ""
    fault: str = ""


def check(target: Target, seeds: Sequence[bytes], mutate: Mutator, folder: Path) -> None:
    """Read the mutants of valid inputs; raise AssertionError if reading one does what must not happen.

    Args:
        target: What is read.
        seeds: Valid inputs; reading each must succeed.
        mutate: (valid inputs, random numbers) -> a damaged input.
        folder: Where the mutants with a fault are written.
    """
    first, _, end = os.environ.get("LDM_FUZZ", str(target.short)).rpartition(":")
    numbers = range(int(first or 0), int(end))
    begin = time.monotonic()
    faults, kinds, slowest, largest = list[str](), Counter[str](), 0.0, 0
    for i in numbers:
        data = mutate(seeds, random.Random(f"{target.name}/{i}"))
        outcome = read_under_limits(target, seeds, data)
        kinds[outcome.error or "read"] += not outcome.fault
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.memory)
        if outcome.fault:
            path = folder / f"fault-{i}"
            path.write_bytes(data)
            faults.append(f"mutant {i} ({len(data)} bytes, {path}): {outcome.fault}")
    print(
        f"\n{target.name}: mutants {numbers.start} to {numbers.stop - 1} in"
        f" {time.monotonic() - begin:.0f} s, {len(faults)} faults;"
        f" {', '.join(f'{kind} {n}' for kind, n in kinds.most_common() if n)};"
        f" slowest {slowest:.2f} s, most memory {largest >> 20} MB"
    )
    listed = "\n".join(faults[:SHOWN])
    assert not faults, (
        f"{target.name}: {len(faults)} of {len(numbers)} mutants must not be read so:\n{listed}"
    )


def read_under_limits(target: Target, seeds: Sequence[bytes], data: bytes) -> Outcome:
    """Return what reading one input did, after valid inputs were read."""
    reader = Reader.shared()
    reader.choose(target, seeds)
    return reader.read(data)


class Reader:
    """A process that reads one input at a time; it is started again if it ends."""

    _shared: Reader | None = None

    def __init__(self) -> None:
        self.folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"fuzz-{os.getpid()}-{id(self)}"
        self._start()
        atexit.register(self.close)

    @classmethod
    def shared(cls) -> Reader:
        """Return the reader of this process."""
        if cls._shared is None:
            cls._shared = cls()
        return cls._shared

    def _start(self) -> None:
        self.target: Target | None = None
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.folder), daemon=True)
        self.process.start()
        theirs.close()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def choose(self, target: Target, seeds: Sequence[bytes]) -> None:
        """Set what is read from now on; valid inputs are read twice, which imports what is needed."""
        if self.target == target:
            return
        self.target = target
        self.connection.send(target)
        for i, seed in enumerate(seeds):
            for warm in (False, True):
                outcome = self.read(seed, warm=warm)
                wrong = outcome.fault or outcome.error
                assert not wrong, f"{target.name}: seed {i} cannot be read: {wrong} {outcome.text}"

    def read(self, data: bytes, *, warm: bool = True) -> Outcome:
        """Read an input; without `warm`, limits and forbidden actions are not watched. If the process ends,
        a new one is started, for which the target must be chosen again."""
        assert self.target is not None
        patience = PATIENCE * (self.target.seconds if warm else 10 * SECONDS)
        try:
            self.connection.send((data, warm))
            for _ in range(math.ceil(patience)):  # a pause of both processes counts as one second
                if self.connection.poll(1.0):
                    outcome: Outcome = self.connection.recv()
                    return outcome
            fault = f"no answer after {patience:.0f} s"
        except (EOFError, ConnectionError):
            self.process.join()
            fault = f"the process ended (exit code {self.process.exitcode})"
        self.close()
        self._start()
        return Outcome(0.0, 0, fault=fault)


# In the reading process

FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile"),
    *("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.chmod", "os.chown"),
    *("os.truncate", "os.putenv", "os.unsetenv", "os.kill", "os.killpg", "pty.spawn", "subprocess.Popen"),
    *("socket.", "shutil.", "urllib.Request", "http.client.", "ftplib.", "smtplib.", "webbrowser.open"),
    *("ctypes.dlopen", "code.__new__", "builtins.input", "builtins.breakpoint", "tempfile."),
)
_watching: list[str] | None = None  # what was done that is forbidden; None while nobody looks


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watching is None:
        return
    writes = event == "open" and (
        (isinstance(args[1], str) and any(letter in args[1] for letter in "wax+"))
        or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    )
    runs = event == "compile" and args[1] in ("<string>", b"<string>", None) and not _is_annotation()
    if writes or runs or event.startswith(FORBIDDEN):
        _watching.append(f"{event}{str(args)[:200]}")


def _is_annotation() -> bool:
    """Return whether the module typing compiles an annotation of the library, on its first use."""
    return sys._getframe(2).f_code.co_filename == typing.__file__


def _serve(connection: Connection, folder: Path) -> None:
    sys.addaudithook(_watch)
    target: Target | None = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if isinstance(message, Target):
            target = message
            continue
        assert target is not None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        data, warm = message
        place = target.place(data, folder)
        size = place.stat().st_size if isinstance(place, Path) and place.is_file() else 0
        connection.send(_read(target, place, max(size, len(data))) if warm else _first(target, place))


def _first(target: Target, place: object) -> Outcome:
    """Read a seed, which imports what is needed."""
    try:
        target.read(place)
    except Exception as error:
        return Outcome(0.0, 0, fault=f"{type(error).__name__}: {error}")
    return Outcome(0.0, 0)


def _read(target: Target, place: object, size: int) -> Outcome:
    """Read an input under the limits."""
    global _watching
    budget = MEMORY[0] * size + MEMORY[1]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = _memory()
    error: BaseException | None = None
    resource.setrlimit(resource.RLIMIT_AS, (before.mapped + budget, hard))
    _watching = []
    begin = time.process_time()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            target.read(place)
    except BaseException as caught:  # also SystemExit and KeyboardInterrupt
        error = caught
    seconds, done, _watching = time.process_time() - begin, _watching, None
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    memory = _memory().peak - before.resident
    faults = [f"it did {each}" for each in done]
    if seconds > target.seconds:
        faults.append(f"it took {seconds:.1f} s")
    if memory > budget or (error is not None and _is_out_of_memory(error)):
        faults.append(f"it took {memory >> 20} MB, or asked for more than {budget >> 20} MB")
    for each in warned:
        faults += _text_faults(str(each.message), "a warning")
    if error is not None:
        faults += _message_faults(target, error)
    kind, text = (type(error).__name__, str(error)[:500]) if error else ("", "")
    return Outcome(seconds, memory, kind, text, "; ".join(faults)[:1000])


def _message_faults(target: Target, error: BaseException) -> list[str]:
    text, kind = str(error), type(error).__name__
    if not isinstance(error, target.allowed):
        return [f"{kind} is not documented: {text[:300]}"]
    found = _text_faults(text, kind)
    if target.names not in text:
        found.append(f"the message of {kind} does not name {target.names!r}: {text[:300]}")
    return found


def _text_faults(text: str, kind: str) -> list[str]:
    found = []
    if len(text) > MESSAGE:
        found.append(f"the message of {kind} has {len(text)} characters: {text[:300]}")
    if re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text):
        found.append(f"the message of {kind} has control characters: {text[:300]!r}")
    return found


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or one that it replaced, says that memory ran out."""
    for _ in range(20):
        if error is None:
            break
        lacking = isinstance(error, OSError) and error.errno == errno.ENOMEM
        text = str(error)[:1000]
        if lacking or isinstance(error, MemoryError) or "allocate memory" in text or "MemoryError" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


class Memory(NamedTuple):
    """Bytes of this process: address space, resident memory, and its peak since the last look."""

    mapped: int
    resident: int
    peak: int


def _memory() -> Memory:
    fields = dict(
        re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    )
    found = Memory(*(1024 * int(fields[name]) for name in ("VmSize", "VmRSS", "VmHWM")))
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins again
    except OSError:
        pass  # the peak is that of the process
    return found
