"""The library of compiled kernels: that of the package, or one that is built at first use and then cached.

The cache is used only if nobody but the user can change it (`ldm.support.home.private_folder`). A cached
library is loaded only if it was built from these sources, by this compiler, for this processor, and is intact
(`ldm.speed.kernels.shared_library`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from ldm.speed.kernels.choice import described, kernel_choice
from ldm.speed.kernels.compiler import CompilerError, find_compiler, run_compiler
from ldm.speed.kernels.prebuilt import read_prebuilt
from ldm.speed.kernels.shared_library import load_library, read_cached, read_own_file, write_cached
from ldm.speed.kernels.sources import FLAGS, HERE, SOURCES, compiler_arguments, source_contents
from ldm.support.files import remove_leftovers, temporary_folder
from ldm.support.home import library_home, private_folder
from ldm.support.processor import InstructionSet
from ldm.support.progress import progress_bar
from ldm.support.text import escaped
from ldm.support.warn import warn_user

CPUINFO = Path("/proc/cpuinfo")
FUNCTIONS = (
    "has_bf16",
    "ldm_affine",
    "ldm_attention",
    "ldm_convert",
    "ldm_group_norm",
    "ldm_group_norm_gradient",
    "ldm_moments",
    "ldm_product",
    "ldm_rows",
    "ldm_winograd",
    "ldm_winograd_untransformed",
    "ldm_winograd_weights",
)
BUILD_SECONDS, VERSION_SECONDS = 300, 10  # time limits; a build takes three on an idle machine
# lines of /proc/cpuinfo that name the processor: a shared home folder has a library for each
PROCESSOR = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")
_lock = threading.Lock()
LOGGER = logging.getLogger(__name__)


class NoKernels(RuntimeError):
    """The kernels are not available on this machine; the message gives the reason."""


def library(isa: InstructionSet | None = None) -> ctypes.CDLL:
    """Return the compiled kernels, after building them if necessary.

    A process builds once for an instruction set, also if that fails. The first failure is a warning too.

    Args:
        isa: The instruction set. Default: None, that of `kernel_choice`.

    Raises:
        NoKernels: If the operating system, the processor or the compiler is not suitable, if the build
            fails, if another user can change the cache, or if the environment variable LDM_KERNELS is 0.
        ValueError: If LDM_ISA is no instruction set of this processor.
    """
    choice = kernel_choice()
    isa = isa or choice.isa
    if isa is None:
        raise NoKernels(choice.reason)
    with _lock:
        before = built_library.cache_info().misses
        found = built_library(isa)
        first = built_library.cache_info().misses > before
    if isinstance(found, ctypes.CDLL):
        if first:
            LOGGER.info("compiled kernels: %s", described(choice._replace(isa=isa)))
        return found
    if first:
        warn_user(f"no compiled kernels: {found}. PyTorch's operators are used, which are slower")
    raise NoKernels(found)


@cache
def built_library(isa: InstructionSet) -> ctypes.CDLL | str:
    """Return the library of the package, from the cache, or a new one, or the reason why there is none."""
    if (data := read_prebuilt(isa)) is not None:
        with suppress(OSError, ValueError):  # another C library, or no libgomp: build one
            return load_library(data)
    try:
        compiler = find_compiler()
        key = library_key(compiler, isa)
        folder = private_folder(cache_folder())
        remove_leftovers(folder)
        path = folder / f"kernels-{isa.name}-{key[:16]}.so"
        cached = read_cached(path, key)
        data = compile_kernels(compiler, folder, isa) if cached is None else cached
        lib = load_library(data)
        missing = [name for name in FUNCTIONS if not hasattr(lib, name)]
        if missing:
            raise CompilerError(f"{compiler[0]} wrote a library without {', '.join(missing)}")
        if cached is None:
            write_cached(path, key, data)
        return lib
    except (OSError, RuntimeError, ValueError) as error:
        return escaped(" ".join(str(error).split()))


def cache_folder() -> Path:
    """Return the folder for compiled kernels, `kernels` in the library's own folder."""
    return library_home() / "kernels"


def library_key(compiler: Sequence[str], isa: InstructionSet) -> str:
    """Return a hash of everything that a build depends on, in 64 hexadecimal digits.

    These are the sources, the flags with those of the instruction set, the compiler and its version, the
    processor, the C library and PyTorch.

    Raises:
        CompilerError: If the compiler does not state its version.
        OSError: If the processor cannot be described.
    """
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    processor = list(dict.fromkeys(line for line in lines if line.startswith(PROCESSOR)))
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    facts = (
        *source_contents(HERE),
        run_compiler([*compiler, "--version"], VERSION_SECONDS),
        repr((SOURCES, FLAGS, isa.flags, compiler, os.path.realpath(compiler[0]))).encode(),
        repr((torch.__version__, torch.compiled_with_cxx11_abi(), libc)).encode(),
        repr((platform.machine(), processor)).encode(),
    )
    return hashlib.sha256(b"".join(hashlib.sha256(fact).digest() for fact in facts)).hexdigest()


def compile_kernels(compiler: Sequence[str], folder: Path, isa: InstructionSet) -> bytes:
    """Return a new library, built in a temporary folder.

    Args:
        compiler: The command.
        folder: Where to make the temporary folder.
        isa: The instruction set.

    Raises:
        CompilerError: If the compiler fails, writes no library, or does not end in time.
        OSError: If the folder cannot be written.
    """
    deadline = time.monotonic() + BUILD_SECONDS
    with temporary_folder(folder) as stage:
        env = {**os.environ, "TMPDIR": str(stage), "LC_ALL": "C"}
        built = stage / "kernels.so"
        commands = compiler_arguments(HERE, SOURCES, (*FLAGS, *isa.flags), stage, built)
        with progress_bar(len(commands), desc="compile the kernels, once") as bar:
            for arguments in commands:
                left = max(0.0, deadline - time.monotonic())
                run_compiler([*compiler, *arguments], left, folder=stage, env=env)
                bar.update()
        if built.is_file() and not built.is_symlink():
            built.chmod(0o600)
        data = read_own_file(built)
    if data is None:
        raise CompilerError(f"{compiler[0]} wrote no library")
    return data


def _renew_lock() -> None:
    """Renew the lock in a forked process, which has no thread that would release it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
