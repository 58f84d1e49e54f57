"""From a stage file to a run: ``ldm train STAGE.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.training.config_file import build_stage_config, read_stage_file
from ldm.training.kinds import part_kinds
from ldm.training.loop import Run


def read_training_config(path: str | Path) -> tuple[str, Any]:
    """Read a stage file and check it; see `build_stage_config`."""
    return build_stage_config(read_stage_file(path), path)


def open_run(path: str | Path, *, runs: str | Path = "runs", device: torch.device | str = "cpu") -> Run:
    """Open the run of a stage file, at its last checkpoint if it has one."""
    part, config = read_training_config(path)
    device = torch.device(device)
    folder = Path(runs) / config.run.name
    return Run(part_kinds()[part].part(config, device), config.run, config, folder, device)
