"""What a recipe states besides the options of the call."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.support.config import to_dict


def stamp(
    model: str,
    task: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    computed_in: torch.dtype,
    origin: Mapping[str, Any],
    loaded: Mapping[str, Any],
    replayable: bool,
) -> dict[str, Any]:
    """Return the recipe of a task.

    Args:
        model: Name of the model.
        task: Options and facts of the task.
        device: What the denoiser computed on.
        dtype: Dtype of its parameters.
        computed_in: Dtype that it computed in.
        origin: SHA-256 of all files and settings that the images depend on.
        loaded: Options of `ldm.load` that the images depend on.
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
    if computed_in != dtype:
        where["computed_in"] = str(computed_in).removeprefix("torch.")
    return {
        "model": model,
        **to_dict(task),
        **where,
        "replayable": replayable,
        "weights": dict(origin),
        **({"loaded": dict(loaded)} if loaded else {}),
        "versions": made_with,
    }


def content_sha256(value: Any) -> str | None:  # Any: what a caller gives as an image or as noise
    """Return the SHA-256 of an array, a tensor, a PIL image, or a sequence of these; None for anything else.

    It is that of the type of the numbers, the shape, and the bytes.
    """
    if isinstance(value, list | tuple):
        parts = [content_sha256(part) for part in value]
        return (
            None
            if None in parts or not parts
            else hashlib.sha256("".join(map(str, parts)).encode()).hexdigest()
        )
    if isinstance(value, Tensor):
        kind, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif hasattr(value, "getpalette"):  # a PIL image
        kind, shape = value.mode, value.size
        data = value.tobytes() + bytes(value.getpalette() or b"")
    elif hasattr(value, "dtype") and hasattr(value, "tobytes"):  # an array
        kind, shape, data = str(value.dtype), value.shape, value.tobytes()
    else:
        return None
    return hashlib.sha256(f"{kind} {shape} ".encode() + data).hexdigest()
