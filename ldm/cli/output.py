"""Standard output in any encoding, messages in one line, and output whose reader or disk has ended."""

from __future__ import annotations

import contextlib
import os
import sys

from ldm.support.text import escaped


def prepare_output() -> None:
    """Escape characters that the encoding of standard output lacks, which would otherwise be an error."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Write what is still buffered for standard output to nowhere, so that the flush at exit succeeds."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def complain(message: object) -> None:
    """Print a message in one line on standard error, where there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # it is closed, or its disk is full
            print(escaped(message), file=sys.stderr)
