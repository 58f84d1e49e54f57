"""The machine's C++ compiler, as a process that may be missing, fail, hang, or print anything."""

from __future__ import annotations

import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

KEPT = 2**16  # bytes at the end of a compiler's output that are kept
ERROR = re.compile("error|fatal|failed|No space", re.IGNORECASE)  # in the line that states the reason
SHOWN = 200  # characters of a compiler's message in an error


class CompilerError(RuntimeError):
    """There is no compiler, or it failed; the message gives the reason."""


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: CXX if it is set, else g++ or c++.

    Raises:
        CompilerError: If there is no such program.
    """
    named = os.environ.get("CXX", "").strip()
    try:
        choices = [shlex.split(named)] if named else [["g++"], ["c++"]]
    except ValueError as error:
        raise CompilerError(f"CXX={named!r}: {error}") from None
    for program, *arguments in choices:
        path = shutil.which(program)
        if path is not None:
            return [os.path.abspath(path), *arguments]
    raise CompilerError(
        f"CXX={named!r}: there is no such program" if named else "no C++ compiler: g++ is not installed"
    )


def run_compiler(
    command: Sequence[str],
    seconds: float,
    *,
    folder: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> bytes:
    """Run a compiler, and return the last `KEPT` bytes of what it prints.

    Args:
        command: The program and its arguments.
        seconds: Time after which it is killed, with the processes that it has started.
        folder: Where to run it. Default: None, the present folder.
        env: The environment. Default: None, that of this process.

    Raises:
        CompilerError: If it is no program, fails, or does not end in time.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=env,
            start_new_session=True,  # so that it has a process group of its own
        )
    except OSError as error:
        raise CompilerError(f"{command[0]} cannot be run: {error.strerror}") from None
    deadline = time.monotonic() + seconds
    with process:
        try:
            output = _read_output(process, deadline)
            process.wait(max(0.0, deadline - time.monotonic()))
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CompilerError(f"{command[0]} did not end in time") from None
            raise
    if process.returncode:
        raise CompilerError(f"{command[0]} failed: {_message(output)}")
    return output


def _read_output(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Return the end of what a process prints until it ends or closes its output, or until the deadline."""
    assert process.stdout is not None
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(min(left, 0.2)):
                piece = os.read(process.stdout.fileno(), KEPT)
                output = (output + piece)[-KEPT:]
                if not piece:
                    break
            elif process.poll() is not None:  # another process, such as a server, has inherited the output
                break
    return output


def _message(output: bytes) -> str:
    """Return the first line of an output that names an error, or the last."""
    lines = output.decode(errors="replace").strip().splitlines() or ["no message"]
    return next(filter(ERROR.search, lines), lines[-1])[:SHOWN]
