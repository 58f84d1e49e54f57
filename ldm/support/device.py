"""Which device and dtype to compute in."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best there is: CUDA, then Apple's MPS, then the CPU."""
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """The fastest dtype that is safe on a device: bfloat16 where the hardware multiplies it, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        flags = torch.backends.cpu.get_cpu_capability()
        return torch.bfloat16 if flags in ("AVX512", "AMX") and _has_bf16_instructions() else torch.float32
    return torch.float32


def _has_bf16_instructions() -> bool:
    """Whether the processor itself multiplies bfloat16 (older AVX-512 ones emulate it, more slowly than
    float32)."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check()) if check is not None else False


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """A dtype by its name; ValueError with the choices for another."""
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if short.get(name, name) not in DTYPES:
        from ldm.support.config import nearest

        raise ValueError(f"dtype {name!r}; {nearest(name, DTYPES)}")
    return DTYPES[short.get(name, name)]
