"""Atomic file writes: after a crash a file is either complete or absent."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = re.compile(r"\.ldm-(\d+)-[0-9a-f]{16}")  # name of a temporary file: process, random number
_cleaned: set[Path] = set()  # folders in which this process has looked for leftovers


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, flush it to disk, and rename it to `path`.

    Parent folders are created. An existing file is replaced, and its mode is kept; it stays as it is if
    writing fails. Temporary files have random names, which no other thread or process uses and no planted
    link can have; those that killed processes left in the folder are removed.

    Raises:
        OSError: If the file cannot be written; the message names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = path.parent / f".ldm-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the umask applies
        try:
            with os.fdopen(handle, "wb") as file:
                if path.exists():
                    os.chmod(temporary, path.stat().st_mode & 0o777)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None


@contextmanager
def staged_folder(folder: Path, key: str, stale: Callable[[Path], Iterable[Path]]) -> Iterator[Path]:
    """Write the files of a folder, inside a `with` block, in a new folder beside it; move them when it ends.

    If the block raises, or the process is killed in it, `folder` is as it was. While files are moved, the key
    file is absent, so that a mixture of two states is never read: it goes first and comes back last. Other
    files of the folder are kept.

    Args:
        folder: The folder to write.
        key: Name of the file without which the folder is not read, such as "card.yaml".
        stale: Returns the files of `folder` that belong to its earlier content, of which those that are not
            written again are removed.

    Yields:
        The new folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    stage = folder.parent / f".ldm-{os.getpid()}-{secrets.token_hex(8)}"
    stage.mkdir()
    try:
        yield stage
        moved = [path.relative_to(stage) for path in sorted(stage.rglob("*")) if path.is_file()]
        folder.mkdir(exist_ok=True)
        old = [path for path in stale(folder) if path.relative_to(folder) not in moved]
        (folder / key).unlink(missing_ok=True)
        for path in old:
            path.unlink(missing_ok=True)
        for name in sorted(moved, key=lambda each: each == Path(key)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, folder / name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of processes that have ended; done once for each folder."""
    if folder in _cleaned:
        return
    _cleaned.add(folder)
    for path in folder.iterdir():
        found = TEMPORARY.fullmatch(path.name)
        if found is not None and not is_running(int(found[1])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Return whether a process of this machine is running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it belongs to another user
    return True


def longest_name(folder: Path) -> int:
    """Return the largest number of bytes that a file name in a folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return 255
