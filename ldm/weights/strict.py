"""Load a state dict into a module strictly: every key must fit, and every number must be finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.support.memory import release_unchanged
from ldm.support.text import escaped
from ldm.weights.cast import cast, is_finite
from ldm.weights.sources import remember_sources

LONGEST_KEY = 200  # characters of a key, with what is said of it, in a message


@runtime_checkable
class ResetsBuffers(Protocol):
    """A module that can compute those of its buffers that are not in the state dict."""

    def reset_buffers(self) -> None: ...


def mismatch(missing: Iterable[str], extra: Iterable[str], misshapen: Iterable[str], show: int = 5) -> str:
    """Describe keys that do not fit, by counts and the first of each kind; empty if all fit.

    Args:
        missing: Keys that are expected and absent.
        extra: Keys that are not expected.
        misshapen: Keys with another shape or another kind of numbers, with both.
        show: Number of keys of each kind that are listed. Default: 5.
    """
    parts = []
    for what, keys in (
        ("missing", list(missing)),
        ("unexpected", list(extra)),
        ("misshapen", list(misshapen)),
    ):
        if keys:
            more = f" and {len(keys) - show} more" if len(keys) > show else ""
            first = ", ".join(escaped(key, LONGEST_KEY) for key in keys[:show])
            parts.append(f"{len(keys)} {what} ({first}{more})")
    return "; ".join(parts)


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path,
    dtype: torch.dtype | None = None,
    allow_nan: bool = False,
) -> None:
    """Load a state dict into a module by assignment; all keys must fit exactly.

    If an error is raised, the module is unchanged. Buffers that are not in the state dict are computed again
    by a ``reset_buffers`` method of their module.

    Args:
        module: The module, usually on the meta device.
        state: The state dict.
        source: The file that error messages name.
        dtype: Floating-point type to which the tensors are converted; None leaves each as it is. Default:
            None.
        allow_nan: Whether NaN and infinity are accepted. Default: False.

    Raises:
        ValueError: If keys are missing, unexpected or misshapen, or a tensor contains NaN or infinity.
        RuntimeError: If a tensor remains without data.
    """
    want = module.state_dict()
    shapes = {key: (tuple(state[key].shape), tuple(want[key].shape)) for key in want if key in state}
    kinds = {key: state[key].dtype for key in shapes if want[key].is_floating_point()}
    wrong = mismatch(
        [key for key in want if key not in state],
        [key for key in state if key not in want],
        [f"{key}: {have}, expected {need}" for key, (have, need) in shapes.items() if have != need]
        + [
            f"{key}: {kind}, expected real numbers"
            for key, kind in kinds.items()
            if not kind.is_floating_point
        ],
    )
    if wrong:
        raise ValueError(f"{str(source)!r} does not fit {type(module).__name__}: {wrong}")
    ready, bad = cast({key: state[key] for key in want}, dtype)
    if bad and not allow_nan:
        raise ValueError(f"{str(source)!r}{_non_finite_reason(bad, ready, state)}")
    release_unchanged(ready.values())  # they were read to be checked
    module.load_state_dict(ready, strict=True, assign=True)
    remember_sources(module, state)
    for part in module.modules():
        if isinstance(part, ResetsBuffers) and any(buffer.is_meta for buffer in part.buffers(recurse=False)):
            part.reset_buffers()
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(
            f"{type(module).__name__}: {len(left)} tensors are in no state dict and have no data"
            f" ({', '.join(left[:5])})"
        )


def _non_finite_reason(bad: Sequence[str], ready: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Return why tensors are not finite: they are damaged, or overflow in their new dtype."""
    overflowing = [key for key in bad if is_finite(state[key])]
    if overflowing:
        wide, narrow = state[overflowing[0]].dtype, ready[overflowing[0]].dtype
        return (
            f": {narrow} cannot hold the {wide} values of {len(overflowing)} tensors"
            f" ({', '.join(overflowing[:5])})"
        )
    return f": NaN or infinity in {len(bad)} tensors ({', '.join(bad[:5])}); the weights are damaged"
