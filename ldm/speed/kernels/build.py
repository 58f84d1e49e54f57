"""The compiled kernels: built by the machine's own compiler when first wanted, and kept in the user's cache
folder."""

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
TIMEOUT = 120  # seconds; it takes three


class NoKernels(RuntimeError):
    """The kernels cannot be had on this machine; the message says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels; NoKernels where the processor or the compiler is missing, or building fails."""
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
    return ctypes.CDLL(str(_built(compiler)))


def folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("LDM_HOME") or Path.home() / ".cache" / "ldm") / "kernels"


def _built(compiler: str) -> Path:
    """The shared library of this source, compiler and processor, from the cache or new; whole or not
    there."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False
    ).stdout
    texts = (path.read_text(encoding="utf-8") for path in sorted((*HERE.glob("*.cpp"), *HERE.glob("*.h"))))
    facts = "\n".join((*texts, version, *FLAGS, _processor()))
    path = folder() / f"kernels-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            made = Path(temporary) / path.name
            command = [compiler, *FLAGS, *(str(HERE / name) for name in SOURCES), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            if done.returncode:
                raise NoKernels(
                    f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
                )
            os.replace(made, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernels(f"cannot build in {str(path.parent)!r}: {error}") from error
    return path


def _processor() -> str:
    """What the compiler's -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "model name"))))
