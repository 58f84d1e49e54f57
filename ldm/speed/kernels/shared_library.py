"""Shared libraries in a cache: the bytes that are checked are the bytes that are loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import struct
from pathlib import Path

from ldm.support.files import write_atomically

LARGEST_LIBRARY = 2**26  # bytes of a library
DIGEST = hashlib.sha256().digest_size
EXEC = Path("/proc/self/exe")  # the interpreter, whose machine a library must have been built for


def read_cached(path: Path, key: str) -> bytes | None:
    """Return the library that `write_cached` wrote under a key, or None.

    None for every file that is not exactly that: one that is damaged, was written under another key, is a
    link or no regular file, belongs to another user, or can be changed by one.

    Args:
        path: The file, in a folder that only the user can change.
        key: The key.
    """
    content = read_own_file(path)
    return None if content is None else verified_library(content, key)


def verified_library(content: bytes, key: str) -> bytes | None:
    """Return the library in the content of a file that `write_cached` wrote under a key; None for others."""
    data, digest = content[:-DIGEST], content[-DIGEST:]
    return data if digest == _digest(data, key) else None


def write_cached(path: Path, key: str, data: bytes) -> None:
    """Write a library, followed by a hash of it and of its key, with the mode 0600.

    Raises:
        OSError: If the file cannot be written.
    """
    write_atomically(path, data + _digest(data, key), 0o600)


def _digest(data: bytes, key: str) -> bytes:
    return hashlib.sha256(key.encode() + data).digest()


def read_own_file(path: Path) -> bytes | None:
    """Return the content of a file that nobody but the user can change, or None for any other."""
    try:
        # a pipe is opened without waiting for its other end
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            own = status.st_uid == os.geteuid() and status.st_nlink == 1 and not status.st_mode & 0o022
            if not own or not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_LIBRARY:
                return None
            return file.read(LARGEST_LIBRARY)
    except OSError:
        return None


def load_library(data: bytes) -> ctypes.CDLL:
    """Load a shared library from memory, where nothing can change or shorten it.

    Raises:
        OSError: If the system cannot load it.
        ValueError: If it is not a whole library for this machine.
    """
    check_whole(data)
    # the function of the C library: Python has its own only where it was built against a recent one
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.memfd_create(b"ldm-kernels", 1) if hasattr(libc, "memfd_create") else -1  # MFD_CLOEXEC
    if handle < 0:
        raise OSError(ctypes.get_errno(), "memfd_create is not possible")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        # the handle stays open, as the dynamic loader would take another library of this name for this one
        return ctypes.CDLL(f"/proc/self/fd/{handle}")
    except OSError:
        os.close(handle)
        raise


def check_whole(data: bytes) -> None:
    """Raise ValueError unless bytes are a whole 64-bit ELF library for the machine of this interpreter.

    The dynamic loader maps what the headers describe; a library that is shorter ends the process.
    """
    with EXEC.open("rb") as file:
        own = file.read(20)
    if len(data) < 64 or data[:6] != own[:6] or data[:6] != b"\x7fELF\2\1" or data[18:20] != own[18:20]:
        raise ValueError("not a shared library for this machine")
    programs, sections = struct.unpack_from("<QQ", data, 32)
    size, count, section_size, section_count = struct.unpack_from("<4H", data, 54)
    ends = [programs + size * count, sections + section_size * section_count]
    if size == 56 and max(ends) <= len(data):
        for offset in range(programs, programs + size * count, size):
            begin, length = struct.unpack_from("<8xQ16xQ", data, offset)
            ends.append(begin + length)
    if size != 56 or max(ends) > len(data):
        raise ValueError("the shared library is truncated")
