"""The choice of device and dtype."""

from __future__ import annotations

import pytest
import torch

from ldm.support.device import dtype_of, fast_dtype, pick_device


def test_devices_by_name():
    assert pick_device("cpu") == torch.device("cpu") == pick_device(torch.device("cpu"))
    assert pick_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="device 'gpu'"):
        pick_device("gpu")


def test_dtypes_by_name():
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16)):
        assert dtype_of(name) is dtype
    with pytest.raises(ValueError, match="did you mean 'float32'"):
        dtype_of("float33")
    assert fast_dtype("cpu") in (torch.float32, torch.bfloat16) and fast_dtype("meta") is torch.float32
