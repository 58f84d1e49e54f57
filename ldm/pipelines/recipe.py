"""What a recipe says besides the options of the call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.support.config import to_dict


def stamp(
    model: str,
    task: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    origin: Mapping[str, Any],
    replayable: bool,
) -> dict[str, Any]:
    """The recipe of a task: the model, where and in what it was computed, the hashes of its weights and the
    versions of the software."""
    import platform

    from ldm.support.version import __version__

    made_with = {
        "ldm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    where = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    return {
        "model": model,
        **to_dict(task),
        **where,
        "replayable": replayable,
        "weights": dict(origin),
        "versions": made_with,
    }
