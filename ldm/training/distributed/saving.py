"""The checkpoints of a run's folder: ``checkpoint.pt`` of one process, ``checkpoint-STEP`` of several.

A folder has one checkpoint, and a moment after a new one is complete, two. The newest counts, and is read by
any number of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.training.checkpoint import checkpoint_step, load_checkpoint, match_strides, save_checkpoint
from ldm.training.distributed.checkpoint import (
    STATE_FILE,
    check_files,
    read_about,
    read_into,
    read_shapes,
    save_together,
)
from ldm.training.distributed.processes import Processes
from ldm.training.distributed.state import TrainingTensors, packed_tensors

SINGLE = "checkpoint.pt"


def all_checkpoints(folder: Path) -> dict[Path, int]:
    """Return the checkpoints in a run's folder with their steps."""
    found = {
        path.parent: read_about(path.parent)["step"] for path in folder.glob(f"checkpoint-*/{STATE_FILE}")
    }
    return {**found, folder / SINGLE: step} if (step := checkpoint_step(folder / SINGLE)) else found


def last_step(folder: Path) -> int:
    """Return the step of the newest checkpoint in a run's folder, 0 if there is none."""
    return max(all_checkpoints(folder).values(), default=0)


def save_state(
    folder: Path, tensors: TrainingTensors, about: Mapping[str, Any], processes: Processes
) -> None:
    """Write a checkpoint, and remove the one before it.

    Args:
        folder: The run's folder.
        tensors: The tensors of the training.
        about: The configuration "config", "step" and "seconds".
        processes: The processes that train.
    """
    path = folder / SINGLE
    if processes.size == 1:
        state = {
            **about,
            "model": tensors.model.state_dict(),
            "ema": tensors.ema.state_dict(),
            "optimizer": tensors.optimizer.state_dict(),
            "names": list(tensors.trained()),
        }
        save_checkpoint(path, state)
    else:
        path = folder / f"checkpoint-{about['step']:07d}"
        save_together(path, tensors.named(), about, processes)

    def remove_others() -> None:
        for other in (folder / SINGLE, *folder.glob("checkpoint-*")):
            if other == path:
                continue
            if other.is_dir():
                shutil.rmtree(other)
            else:
                other.unlink(missing_ok=True)

    processes.once(remove_others)


def load_state(
    folder: Path, tensors: TrainingTensors, processes: Processes, check: Callable[[Mapping[str, Any]], None]
) -> Mapping[str, Any] | None:
    """Load the newest checkpoint of a run's folder.

    Args:
        folder: The run's folder.
        tensors: The tensors of the training, which are changed in place.
        processes: The processes that train.
        check: Raises an error for a configuration and step that are not to be loaded.

    Returns:
        What `save_state` was given as `about`; None if there is no checkpoint.

    Raises:
        ValueError: If the checkpoint is damaged, or of another network.
    """
    found = processes.once(lambda: all_checkpoints(folder))
    if not found:
        return None
    path = max(found, key=lambda each: found[each])
    if path.name == SINGLE:
        state = load_checkpoint(path)
        check(state)
        tensors.load(packed_tensors(state, state.get("names", list(tensors.trained()))))
    else:
        state = read_about(path)
        check_files(path, processes)
        check(state)
        places = tensors.places_for(read_shapes(path))
        read_into(path, places, processes)
        tensors.load(places)
    match_strides(tensors.optimizer)
    return state
