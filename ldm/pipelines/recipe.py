"""What a recipe states besides the options of the call."""

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
    """Return the recipe of a task.

    Args:
        model: Name of the model.
        task: Options and facts of the task.
        device, dtype: What the denoiser computed on and in.
        origin: Hashes of the weights.
        replayable: Whether the recipe holds all that the images depend on.

    Returns:
        The recipe, as JSON can hold it, with the versions of the software.
    """
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
