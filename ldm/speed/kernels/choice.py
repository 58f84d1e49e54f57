"""The choice of the instruction set that the kernels are compiled for."""

from __future__ import annotations

import os
import platform
from typing import NamedTuple

import torch

from ldm.support.processor import BASELINE, VARIABLE, InstructionSet, permitted_sets, processor_sets

# what PyTorch calls the instruction sets of its own kernels, where it uses less than the processor has
ATEN_SETS = {"AVX2": ("avx2",), "DEFAULT": (), "NO AVX": ()}


class KernelChoice(NamedTuple):
    """The instruction set of the kernels and the reason for it, in words.

    Attributes:
        isa: The instruction set. None: PyTorch's operators compute.
        reason: Why.
    """

    isa: InstructionSet | None
    reason: str


def kernel_choice() -> KernelChoice:
    """Return the instruction set that the compiled kernels use here, and why.

    It is the best that the processor has and LDM_ISA permits, and not above PyTorch's own (for example with
    ATEN_CPU_CAPABILITY=avx2). None with LDM_KERNELS=0. It is not known here whether a library of that set
    can be built (`ldm.speed.kernels.build.library`).

    Raises:
        ValueError: If LDM_ISA is no instruction set of this processor.
    """
    if os.environ.get("LDM_KERNELS") == "0":
        return KernelChoice(None, "LDM_KERNELS=0")
    if platform.system() != "Linux":
        return KernelChoice(None, f"written for Linux, this is {platform.system()}")
    best, sets = processor_sets(), permitted_sets()
    if not best:
        return KernelChoice(None, f"this {platform.machine()} processor has neither AVX2 nor NEON")
    if os.environ.get(VARIABLE) and sets != best:
        reason = f"{VARIABLE}={os.environ[VARIABLE]}"
    else:
        reason = "the best of this processor"
    used = torch.backends.cpu.get_cpu_capability()
    if platform.machine() == "x86_64" and used in ATEN_SETS:
        below = tuple(made for made in sets if made.name in ATEN_SETS[used])
        sets, reason = below, reason if below == sets else f"PyTorch is limited to {used}"
    return KernelChoice(sets[0] if sets else None, reason)


def described(choice: KernelChoice) -> str:
    """Return a choice as a text such as "avx2 (the best of this processor)"."""
    return f"{choice.isa.name if choice.isa else BASELINE} ({choice.reason})"
