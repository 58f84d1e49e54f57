"""Import the samplers of k-diffusion, or skip the test."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest


def k_sampling() -> Any:
    """Return the module k_diffusion.sampling.

    The package's `__init__` is not run: it imports CLIP and evaluation code, which need more packages.
    """
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("k_diffusion is not installed")
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["k_diffusion"] = package
    try:
        return importlib.import_module("k_diffusion.sampling")
    except ImportError as error:
        pytest.skip(f"k_diffusion.sampling cannot be imported: {error}")
