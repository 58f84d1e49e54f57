"""The library of compiled kernels, built with the machine's compiler at first use and then cached."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = ("attention.cpp", "convert.cpp", "norm.cpp", "winograd.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
TIMEOUT = 120  # seconds; a build takes about three


class NoKernels(RuntimeError):
    """The kernels are not available on this machine; the message gives the reason."""


@cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels, after building them if necessary.

    Raises:
        NoKernels: If the operating system, the processor or the compiler is not suitable, if the build
            fails, or if the environment variable LDM_KERNELS is 0.
    """
    if os.environ.get("LDM_KERNELS") == "0":
        raise NoKernels("LDM_KERNELS=0")
    if platform.system() != "Linux" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise NoKernels(
            f"written for Linux and AVX-512, this is {platform.system()} and"
            f" {torch.backends.cpu.get_cpu_capability()}"
        )
    compiler = next(
        (path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))),
        None,
    )
    if compiler is None:
        raise NoKernels("no C++ compiler: g++ is not installed")
    return ctypes.CDLL(str(_library_path(compiler)))


def cache_folder() -> Path:
    """Return the folder for compiled kernels, `kernels` below LDM_HOME (default: ~/.cache/ldm)."""
    return Path(os.environ.get("LDM_HOME") or Path.home() / ".cache" / "ldm") / "kernels"


def _library_path(compiler: str) -> Path:
    """Return the shared library for these sources, this compiler and this processor, built if missing.

    The library is moved into place when it is complete, so an interrupted build leaves nothing behind.
    """
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False
    ).stdout
    texts = (path.read_text(encoding="utf-8") for path in sorted((*HERE.glob("*.cpp"), *HERE.glob("*.h"))))
    facts = "\n".join((*texts, version, *FLAGS, _processor_description()))
    path = cache_folder() / f"kernels-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            built = Path(temporary) / path.name
            command = [compiler, *FLAGS, *(str(HERE / name) for name in SOURCES), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            if done.returncode:
                raise NoKernels(
                    f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
                )
            os.replace(built, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"cannot build in {str(path.parent)!r}: {error}") from error
    return path


def _processor_description() -> str:
    """Return the model and the feature flags of the processor, which determine -march=native."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "model name"))))
