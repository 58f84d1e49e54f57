"""Stages: one training each, with a record of what it was trained from.

The record, ``stage.json`` in the run's folder, holds the configuration, the hashes of the exports that the
stage reads, and, when the stage is finished, those of its own export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm.support.config import filled, read_yaml, to_dict
from ldm.support.defaults import plain_defaults
from ldm.support.files import write_atomically
from ldm.support.strict_json import read_json
from ldm.support.text import shown
from ldm.support.warn import warn_user
from ldm.training.checkpoint import REPORTING, config_differences
from ldm.training.distributed.group import current_processes, one_process_alone
from ldm.training.distributed.saving import last_step
from ldm.training.inputs.protocol import TrainsOnImages
from ldm.training.kinds import part_kinds
from ldm.training.loop import Run, check_until

RECORD = ("config", "reads", "exports")  # keys of a record
Hashes = dict[str, str]  # part -> SHA-256 of its weights


@dataclass(frozen=True, kw_only=True)
class TrainingStage:
    """A training as one step of a recipe, or alone.

    Args:
        name: Name of the stage.
        folder: The run's folder.
        part: What is trained; see `part_kinds`.
        config: The part's configuration; its class is that of `part`.
        reads: The stages whose exports are read, by the dotted key of the configuration.
        hours: Expected cost, or None if it is not known. Default: None.
        optional: Whether a recipe leaves the stage out. Default: False.
    """

    name: str
    folder: Path
    part: str
    config: Any
    reads: Mapping[str, TrainingStage] = field(default_factory=dict)
    hours: float | None = None
    optional: bool = False

    @property
    def export(self) -> Path:
        """The folder of the exported weights."""
        return self.folder / "export"

    @property
    def steps(self) -> int:
        """The number of training steps."""
        return int(self.config.run.steps)

    @property
    def finished(self) -> bool:
        """Whether the stage is trained and its export is complete."""
        exports = self.read_record().get("exports")
        return exports is not None and exports == export_hashes(self.export)

    @property
    def step(self) -> int:
        """The step of the last checkpoint, 0 if there is none."""
        return last_step(self.folder)

    def status(self) -> str:
        """Describe how far the stage is: "finished", "at step k of n", or "not started"."""
        if self.finished:
            return "finished"
        return f"at step {step} of {self.steps}" if (step := self.step) else "not started"

    def open(self, device: torch.device | str = "cpu") -> Run:
        """Open the stage's run, at its last checkpoint if it has one."""
        processes = current_processes()
        own = processes.device(device)
        with plain_defaults():
            part = part_kinds()[self.part].part(self.config, own)
        return Run(part, self.config.run, self.config, self.folder, own, processes)

    def train(
        self, *, device: torch.device | str = "cpu", until: int | None = None, progress: bool = True
    ) -> bool:
        """Train the stage from its last checkpoint, and export it when it is complete.

        Args:
            device: Where to train. Default: "cpu".
            until: Stop with a checkpoint at this step; None for the last one. Default: None.
            progress: Whether to show a progress bar on a terminal. Default: True.

        Returns:
            Whether the stage is finished.

        Raises:
            ValueError: If `until` is no step of at least 1.
        """
        check_until(until)
        run = self.open(device)
        run.processes.once(lambda: self.write_record(exports=None))
        run.train(until=until, progress=progress)
        if isinstance(run.part, TrainsOnImages) and (problems := run.part.images.report()):
            warn_user(problems)
        if run.finished:
            run.processes.once(lambda: self._export(run))
        return run.finished

    def _export(self, run: Run) -> None:
        """Write the export of a finished run in one process."""
        with one_process_alone():
            if not run.processes.holds_all(run.config.distributed):
                run = self.open(run.device)  # from the checkpoint
            run.export(self.export)
        self.write_record(exports=export_hashes(self.export))

    def check_unchanged(self) -> None:
        """Check that the stage is still what its record states, as far as it was begun.

        Raises:
            ValueError: If its configuration has changed, or an export that it reads.
        """
        record = self.read_record()
        if not record:
            return
        free = {"name", *REPORTING}
        if record["exports"] is None:
            free |= {"steps", "decay"}  # `Run` decides whether these may change
        recorded = filled(type(self.config), record["config"])
        differences = config_differences(recorded, self.recorded_config())
        changed = [key for key in differences if key.rpartition(".")[2] not in free]
        begun = "begun" if record["exports"] is None else "finished"
        if changed:
            raise ValueError(
                f"stage {self.name!r} was {begun} with a configuration that differs in {', '.join(changed)}:"
                f" restore it, or remove {str(self.folder)!r} to train the stage again"
            )
        for key, source in self.reads.items():
            if source.finished and record["reads"].get(key) != export_hashes(source.export):
                raise ValueError(
                    f"stage {self.name!r} was {begun} with another export of {source.name!r}: remove"
                    f" {str(self.folder)!r} to train the stage again"
                )

    def recorded_config(self) -> dict[str, Any]:
        """Return the configuration as plain mappings, with the names of stages in place of their folders."""
        config: dict[str, Any] = to_dict(self.config)
        for key, source in self.reads.items():
            set_dotted(config, key, source.name)
        return config

    def read_record(self) -> dict[str, Any]:
        """Return the record, or an empty mapping if the stage was not begun."""
        path = self.folder / "stage.json"
        if not path.is_file():
            return {}
        record = read_json(path, infinite=True)
        if not record.keys() >= set(RECORD) or not all(
            isinstance(record[key], dict) for key in ("config", "reads")
        ):
            raise ValueError(
                f"{shown(str(path))} is not the record of a stage: expected {', '.join(RECORD)}: remove"
                f" {shown(str(self.folder))} to train the stage again"
            )
        return record

    def write_record(self, *, exports: Hashes | None) -> None:
        """Write the record; `exports` is None while the stage is not finished."""
        record = {
            "config": self.recorded_config(),
            "reads": {key: export_hashes(source.export) for key, source in self.reads.items()},
            "exports": exports,
        }
        write_atomically(self.folder / "stage.json", (json.dumps(record, indent=1) + "\n").encode())


def export_hashes(folder: Path) -> Hashes:
    """Return the SHA-256 of each part in an export, as the parts' YAMLs state it; empty without a folder."""
    paths = sorted(folder.glob("*.yaml"))
    return {
        path.stem: str(read_yaml(path).get("sha256"))
        for path in paths
        if path.with_suffix(".safetensors").is_file()
    }


def get_dotted(mapping: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key of nested mappings, or None if it is absent."""
    value: Any = mapping
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def set_dotted(mapping: dict[str, Any], key: str, value: object) -> None:
    """Set the value at a dotted key of nested mappings, which are created if absent."""
    *path, last = key.split(".")
    for part in path:
        if not isinstance(mapping.get(part), dict):
            mapping[part] = {}
        mapping = mapping[part]
    mapping[last] = value
