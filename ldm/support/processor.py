"""The processor: its instruction sets, which of them LDM_ISA permits, and the sizes of its caches.

The environment variable LDM_ISA names the highest instruction set that may be used (`INSTRUCTION_SETS`), so
that a machine can be measured as one that lacks the higher ones. PyTorch reads its own limits once, when it
first computes; `limit_libraries` sets them when `ldm` is imported.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ldm.support.config import nearest

VARIABLE = "LDM_ISA"
CPU_FACTS = Path("/proc/cpuinfo")
CACHE_FOLDERS = Path("/sys/devices/system/cpu/cpu0/cache")
# bytes of the data caches of one core where the system does not state them: those of small processors
DEFAULT_CACHES = {1: 2**15, 2: 2**18}


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """An instruction set, and what it is called elsewhere.

    Args:
        name: As in LDM_ISA.
        machine: As `platform.machine()` names it.
        features: The words of /proc/cpuinfo that state it.
        flags: Those of GCC and Clang that allow it.
        aten: Value of ATEN_CPU_CAPABILITY. None: PyTorch has no such limit.
        onednn: Value of ONEDNN_MAX_CPU_ISA. None: oneDNN has no such limit.
        mkl: Value of MKL_ENABLE_INSTRUCTIONS. None: MKL has no such limit.
    """

    name: str
    machine: str
    features: frozenset[str]
    flags: tuple[str, ...]
    aten: str | None = None
    onednn: str | None = None
    mkl: str | None = None


_AVX2, _AVX2_FLAGS = frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c")
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_AVX512_FLAGS = (*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
INSTRUCTION_SETS = {  # the best first
    made.name: made
    for made in (
        InstructionSet(
            name="avx512bf16",
            machine="x86_64",
            features=_AVX512 | {"avx512_bf16"},
            flags=(*_AVX512_FLAGS, "-mavx512bf16"),
            aten="avx512",
            onednn="AVX512_CORE_BF16",
            mkl="AVX512",
        ),
        InstructionSet(
            name="avx512",
            machine="x86_64",
            features=_AVX512,
            flags=_AVX512_FLAGS,
            aten="avx512",
            onednn="AVX512_CORE_VNNI",
            mkl="AVX512",
        ),
        InstructionSet(
            name="avx2",
            machine="x86_64",
            features=_AVX2,
            flags=_AVX2_FLAGS,
            aten="avx2",
            onednn="AVX2",
            mkl="AVX2",
        ),
        InstructionSet(name="neon", machine="aarch64", features=frozenset({"asimd"}), flags=()),
    )
}
BASELINE = "baseline"  # the LDM_ISA without any of them
_BASELINE_LIMITS = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}


def limit_libraries() -> None:
    """Let PyTorch, oneDNN and MKL use no higher instruction set than LDM_ISA.

    It has an effect only before PyTorch computes for the first time. Variables that are set already stay, as
    does an unknown LDM_ISA, which `permitted_sets` refuses.
    """
    name = os.environ.get(VARIABLE)
    if name == BASELINE:
        limits = _BASELINE_LIMITS
    elif name in INSTRUCTION_SETS:
        made = INSTRUCTION_SETS[name]
        found = {
            "ATEN_CPU_CAPABILITY": made.aten,
            "ONEDNN_MAX_CPU_ISA": made.onednn,
            "MKL_ENABLE_INSTRUCTIONS": made.mkl,
        }
        limits = {variable: value for variable, value in found.items() if value is not None}
    else:
        return
    for variable, value in limits.items():
        os.environ.setdefault(variable, value)


@cache
def processor_sets() -> tuple[InstructionSet, ...]:
    """Return the instruction sets that this processor has, the best first; none on systems but Linux."""
    try:
        lines = CPU_FACTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    stated = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    features = frozenset.intersection(*map(frozenset, stated)) if stated else frozenset()
    return tuple(
        made
        for made in INSTRUCTION_SETS.values()
        if made.machine == platform.machine() and made.features <= features
    )


def permitted_sets() -> tuple[InstructionSet, ...]:
    """Return the instruction sets of this processor that LDM_ISA permits, the best first.

    Raises:
        ValueError: If LDM_ISA is no instruction set of this processor.
    """
    sets, name = processor_sets(), os.environ.get(VARIABLE)
    names = [made.name for made in sets]
    if not name:
        return sets
    if name not in (*names, BASELINE):
        raise ValueError(f"{VARIABLE}={name!r} on this processor: {nearest(name, (*names, BASELINE))}")
    return () if name == BASELINE else sets[names.index(name) :]


@cache
def shared_cache_bytes() -> int:
    """Return a core's share of the last cache, which cores share: between 4 and 32 MiB, 8 if unknown."""
    try:
        (found,) = (
            index
            for index in CACHE_FOLDERS.glob("index*")
            if (index / "level").read_text(encoding="utf-8").strip() == "3"
        )
        cores = 0
        for part in (found / "shared_cpu_list").read_text(encoding="utf-8").strip().split(","):
            first, _, last = part.partition("-")
            cores += int(last or first) - int(first) + 1
        share = _size((found / "size").read_text(encoding="utf-8").strip()) // cores
    except (OSError, ValueError, ZeroDivisionError):
        return 2**23
    return min(max(share, 2**22), 2**25)


def _size(text: str) -> int:
    """Return the number of bytes of a text such as "512K"."""
    return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1:], 1)


@cache
def cache_bytes(level: int) -> int:
    """Return the size of the data cache of a level (1 or 2), in bytes, as the system states it for one core.

    `DEFAULT_CACHES` where it does not.
    """
    try:
        for index in sorted(CACHE_FOLDERS.glob("index*")):
            kind, own, size = (
                (index / name).read_text(encoding="utf-8").strip() for name in ("type", "level", "size")
            )
            if kind in ("Data", "Unified") and int(own) == level:
                return _size(size) or DEFAULT_CACHES[level]
    except (OSError, ValueError):
        pass
    return DEFAULT_CACHES[level]
