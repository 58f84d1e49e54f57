"""From a stage file to its configuration and its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.training.loop import Run
from ldm.training.recipe import find_stage


def read_training_config(path: str | Path) -> tuple[str, Any]:
    """Read a stage file and check it.

    What the stage reads is taken from the recipe that lists it, if there is one.

    Returns:
        The name of the part that it trains (see `part_kinds`), and the part's configuration.

    Raises:
        FileNotFoundError: If the file is absent.
        ValueError: If the part is unknown, a key is unknown or missing, or a value is impossible.
    """
    stage = find_stage(path)
    return stage.part, stage.config


def open_run(path: str | Path, *, runs: str | Path = "runs", device: torch.device | str = "cpu") -> Run:
    """Open the run of a stage file, at its last checkpoint if it has one.

    Args:
        path: The stage file.
        runs: The folder of runs. Default: "runs".
        device: Where to train. Default: "cpu".
    """
    return find_stage(path, runs).open(device)
