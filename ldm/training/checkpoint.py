"""Checkpoints: the state of a training run in a file, and the check that a run resumes what it began."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from ldm.support.files import write_atomically
from ldm.training.config import RunConfig
from ldm.weights.formats.pickles import read_pickle

STATE = frozenset({"config", "step", "seconds", "model", "ema", "optimizer"})  # keys of a checkpoint
# keys of `run` that change no result beyond rounding
REPORTING = frozenset({"log_every", "validate_every", "sample_every", "checkpoint_every", "distributed"})


@runtime_checkable
class BeginsWithModel(Protocol):
    """A part whose training begins with the weights of a model, which are in no checkpoint."""

    @property
    def base_hashes(self) -> Mapping[str, str]:
        """The SHA-256 of each network of the model, by its name."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a training state; the file appears when it is complete."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training state; nothing in the file is executed.

    Raises:
        ValueError: If the file is damaged: its checksums differ, or it is not a checkpoint.
    """
    return read_state(path, whole=True)


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint, or 0 if there is none; the weights stay on the disk."""
    return int(read_state(path, whole=False)["step"]) if path.is_file() else 0


def read_state(path: Path, *, whole: bool) -> dict[str, Any]:
    """Read a file of `save_checkpoint`; only if it is read as a whole, its checksums are compared. See
    `load_checkpoint`."""
    advice = "delete it to train from the beginning, or put back a copy"
    try:
        state = read_pickle(path, whole=whole)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a checkpoint that can be read ({error}): {advice}") from None
    if not isinstance(state, dict) or not state.keys() >= STATE or not isinstance(state["step"], int):
        raise ValueError(f"{str(path)!r} is not a checkpoint: expected {', '.join(sorted(STATE))}: {advice}")
    return state


def match_strides(optimizer: torch.optim.Optimizer) -> None:
    """Lay an optimizer's state out in memory as its weights are.

    The fused AdamW reads both in the order of memory, whatever their strides: a state saved from a network
    with other strides would silently be applied to the wrong weights.
    """
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def check_resumable(old: Mapping[str, Any], new: Mapping[str, Any], run: RunConfig, step: int) -> None:
    """Check that a run is resumed with the configuration that it began with.

    The name, the reporting intervals and `distributed` may change. The number of steps and the decay may
    change as long as the learning rate has not begun to fall.

    Args:
        old: The checkpoint's configuration, as plain mappings.
        new: The configuration to resume with, as plain mappings.
        run: The run's part of `new`.
        step: The checkpoint's step.

    Raises:
        ValueError: For any other difference; the message names each.
    """
    free = {"name", *REPORTING}
    if step <= min(old["run"]["steps"] - old["run"]["optimizer"]["decay"], run.steps - run.optimizer.decay):
        free |= {"steps", "decay"}
    differences = [key for key in config_differences(old, new) if key.rpartition(".")[2] not in free]
    if differences:
        raise ValueError(
            f"the run is at step {step} of a configuration that differs in {', '.join(differences)}: restore"
            " these, or give the run another name"
        )


def check_same_base(old: Mapping[str, str] | None, new: Mapping[str, str]) -> None:
    """Check that a run continues with the model that it began with.

    Args:
        old: The hashes in the checkpoint; None if it has none, as those of older versions.
        new: The hashes of the model that was loaded.

    Raises:
        ValueError: If they differ; the message names the networks.
    """
    if old is None:
        return
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        raise ValueError(
            f"the run was begun with other weights of {', '.join(map(repr, changed))} than the model has now:"
            " put the model back, or give the run another name"
        )


def config_differences(old: object, new: object, where: str = "") -> list[str]:
    """Return the dotted keys at which two nested mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in config_differences(
                old.get(key), new.get(key), f"{where}.{key}" if where else key
            )
        ]
    return [] if old == new else [where]
