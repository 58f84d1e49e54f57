"""The choice of device and dtype to compute in."""

from __future__ import annotations

import os

import torch
from torch import nn

from ldm.support.config import nearest
from ldm.support.text import escaped, shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
COMPUTES_IN = (
    "computes_in"  # attribute of modules that compute in another dtype than that of their parameters
)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return the requested device, or the best available one: CUDA, then Apple's MPS, then the CPU.

    Raises:
        ValueError: If PyTorch does not know the name, cannot use the device here, or it holds no values
            ("meta").
    """
    if device is not None:
        try:
            found = torch.device(device)
            if found.type == "meta":
                raise RuntimeError("it holds no values")
            torch.empty(1, device=found, dtype=torch.float32).zero_()
        except (RuntimeError, AssertionError, TypeError, ImportError) as error:
            reason = escaped(f"{error}".split("\n")[0], 300)
            raise ValueError(f"device {shown(str(device))} is not available: {reason}") from None
        return found
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def process_device(device: str | torch.device | None = None) -> torch.device | None:
    """Return the device of a process of `torchrun`: of CUDA devices, one for each process of a machine.

    Args:
        device: The device for all processes; None for the best. Default: None.

    Returns:
        The device; without `torchrun`, `device` as it is.

    Raises:
        ValueError: If a machine has fewer GPUs than processes.
    """
    local = os.environ.get("LOCAL_RANK")
    if local is None:
        return None if device is None else torch.device(device)
    asked = pick_device(device)
    if asked.type != "cuda" or asked.index is not None:
        return asked
    if int(local) >= (found := torch.cuda.device_count()):
        raise ValueError(f"device {asked}: process {local} of a machine that has {found} GPUs")
    return pick_device(f"cuda:{local}")


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, float32 elsewhere."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        flags = torch.backends.cpu.get_cpu_capability()
        return torch.bfloat16 if flags in ("AVX512", "AMX") and _has_bf16_instructions() else torch.float32
    return torch.float32


def _has_bf16_instructions() -> bool:
    """Return whether the processor has bfloat16 instructions.

    Older AVX-512 processors emulate bfloat16, which is slower than float32.
    """
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check()) if check is not None else False


def computing_dtype(network: nn.Module) -> torch.dtype | None:
    """Return the dtype that a network computes in; None if it has no floating-point parameter.

    It is that of its first parameter, or float32 where `ldm.optimize` widens parameters of 16 bits.
    """
    found: torch.dtype | None = network.__dict__.get(COMPUTES_IN)
    if found is not None:
        return found
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), None)


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """Return the dtype called `name`: float32, bfloat16 or float16, or their short forms fp32, bf16, fp16.

    Raises:
        ValueError: For any other name, with the choices.
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    name = SHORT_DTYPES.get(str(name), name)
    if name not in DTYPES:
        raise ValueError(f"dtype {shown(name)}; {nearest(name, DTYPES)}")
    return DTYPES[name]
