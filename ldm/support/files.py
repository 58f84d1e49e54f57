"""Atomic file writes: after a crash a file is either complete or absent."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

# name of a temporary file or folder: process, system (see `_system`; earlier versions lack it), random number
TEMPORARY = re.compile(r"\.ldm-(\d{1,9})-(?:([0-9a-f]{8})-)?[0-9a-f]{16}")
WEIGHT_ENDINGS = (
    ".safetensors",
    ".bin",
)  # endings of files without which the others of their folder are not read
DAY = 86400  # seconds; temporary files of other systems are leftovers when they are older
_cleaned: set[Path] = set()  # folders in which this process has looked for leftovers


def write_atomically(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write `data` to a file, whole or not at all; see `open_atomically`."""
    with open_atomically(path, mode) as file:
        file.write(data)


@contextmanager
def open_atomically(path: Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """Write a temporary file beside `path`, inside a `with` block; rename it to `path` when the block ends.

    Parent folders are created. The content is flushed to disk first. An existing file is replaced, and its
    mode is kept; it stays as it is if writing fails. Temporary files have random names, which no other thread
    or process uses and no planted link can have; those that killed processes left in the folder are removed.

    Args:
        path: The file.
        mode: Permissions of the file, whatever the umask is. None for those of an existing file, or by the
            umask. Default: None.

    Yields:
        The temporary file, open for binary writing.

    Raises:
        OSError: If the file cannot be written; the message names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path.parent)
    with errors_name(path, temporary):
        if mode is None and path.exists():
            mode = path.stat().st_mode & 0o777
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
        try:
            with os.fdopen(handle, "wb") as file:
                if mode is not None:
                    os.chmod(temporary, mode)  # as the umask has been applied
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Append a text to a file.

    Raises:
        OSError: If the file cannot be written; the message names it.
    """
    with errors_name(path, path), path.open("a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Make a new folder in `folder` that only its owner may use; remove it when the `with` block ends."""
    path = temporary_path(folder)
    with errors_name(folder, path):
        path.mkdir(mode=0o700)
        path.chmod(0o700)  # as the umask has been applied
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def temporary_path(folder: Path) -> Path:
    """Return a new name for a temporary file or folder in `folder`, after removing leftovers there."""
    remove_leftovers(folder)
    return folder / f".ldm-{os.getpid()}-{_system()}-{secrets.token_hex(8)}"


def replace_folder(stage: Path, folder: Path) -> None:
    """Move a complete folder to a name in the same folder; what has that name is removed."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(stage, folder)


@contextmanager
def staged_folder(
    folder: Path, keys: Collection[str], stale: Callable[[Path], Iterable[Path]]
) -> Iterator[Path]:
    """Write the files of a folder, inside a `with` block, in a new folder beside it; move them when it ends.

    If the block raises, or the process is killed in it, `folder` is as it was. A mixture of two states is
    never read: all old files are removed before the first new one comes, key files first and weights next,
    and the new ones come in the opposite order. Other files of the folder are kept.

    Args:
        folder: The folder to write.
        keys: Names of the files without any of which the folder is not read, such as "card.yaml".
        stale: Returns the files of `folder` that belong to its earlier content.

    Yields:
        The new folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent) as stage, errors_name(folder, stage):
        yield stage
        moved = [path.relative_to(stage) for path in sorted(stage.rglob("*")) if path.is_file()]
        folder.mkdir(exist_ok=True)
        old = [path.relative_to(folder) for path in stale(folder)]

        def rank(name: Path) -> int:
            return 2 if str(name) in keys else int(name.suffix in WEIGHT_ENDINGS)

        for name in sorted({*map(Path, keys), *old, *moved}, key=rank, reverse=True):
            (folder / name).unlink(missing_ok=True)
        for name in sorted(moved, key=rank):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, folder / name)


@contextmanager
def errors_name(path: Path, temporary: Path) -> Iterator[None]:
    """Let OSErrors that name no file, or a temporary one, name what is to be written instead.

    Args:
        path: What is to be written.
        temporary: The temporary file or folder.
    """
    try:
        yield
    except OSError as error:
        named = temporary if error.filename is None else error.filename
        if (
            error.errno is None
            or not isinstance(named, str | Path)
            or not Path(named).is_relative_to(temporary)
        ):
            raise
        meant = path / Path(named).relative_to(temporary)
        raise OSError(error.errno, error.strerror, str(meant)) from None


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of processes that have ended; done once for each folder.

    What cannot be removed, such as files of other users, stays.
    """
    if folder in _cleaned:
        return
    _cleaned.add(folder)
    with suppress(OSError):
        for path in list(folder.iterdir()):
            found = TEMPORARY.fullmatch(path.name)
            if found is None or not _is_leftover(path, int(found[1]), found[2]):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def _is_leftover(path: Path, process: int, system: str | None) -> bool:
    """Return whether a temporary file, with the process and the system in its name, is nobody's any more."""
    if system in (None, _system()):
        return not is_running(process)
    try:
        return time.time() - path.lstat().st_mtime > DAY
    except OSError:
        return False  # another process has removed it


@cache
def _system() -> str:
    """Return eight hexadecimal digits for this system: the machine, its start, and the container.

    The number of a process says nothing on another one, which may share the folder.
    """
    facts = [platform.node()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def is_running(process: int) -> bool:
    """Return whether a process of this machine is running."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it belongs to another user
    return True


def file_exists(path: Path) -> bool:
    """Return whether there is a file; False also for names that no file can have, too long or with "\\0".

    `Path.is_file` raises OSError for a long name, which texts from files can be.
    """
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


class BoundedFile(io.BufferedReader):
    """A file of which no more is read than there is: Python sets aside as much memory as is asked for.

    A damaged image file can state that a chunk of some bytes has gigabytes, which its decoder then asks for.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes of the file, at most `size` of them; all that are left for None or −1."""
        left = max(self._size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def check_place(path: Path) -> None:
    """Check before any work that a file or folder can be written, in a folder that may still have to be made.

    Raises:
        ValueError: If its name is too long.
        OSError: If it, or the folder in which it or the first missing folder is made, cannot be written.
    """
    if len(os.fsencode(path.name)) > (longest := longest_name(path.parent)):
        raise ValueError(f"{path.name[:40]!r}…: expected a file name of at most {longest} bytes")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{str(path)!r} cannot be written")
    place = next((each for each in path.parents if each.exists()), path.parent)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise PermissionError(f"{str(path)!r} cannot be written: {error.strerror}") from None


def longest_name(folder: Path) -> int:
    """Return the largest number of bytes that a file name in a folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return 255


def file_sha256(file: io.FileIO) -> str:
    """Return the SHA-256 of what is left to read in a file without a buffer, in 64 hexadecimal digits."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**18))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()
