"""What trainings of adapters have in common: what they refuse, and the record beside an exported file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ldm.support.config import to_dict
from ldm.support.files import write_atomically
from ldm.support.strict_yaml import format_yaml
from ldm.training.config import RunConfig
from ldm.training.parts.tuning import FineTuneDiffusion
from ldm.weights.formats.safetensors import sha256


def check_adapter_run(run: RunConfig, diffusion: FineTuneDiffusion) -> None:
    """Raise ValueError for a run that an adapter's file cannot express, or that divides it."""
    if run.distributed != "ddp":
        raise ValueError(f"run.distributed {run.distributed!r}: expected 'ddp', an adapter is small")
    check_adapter_diffusion(diffusion)


def check_adapter_diffusion(diffusion: FineTuneDiffusion) -> None:
    """Raise ValueError for another prediction or schedule, which no card beside an adapter states."""
    for name in ("prediction", "zero_terminal_snr"):
        if getattr(diffusion, name) is not None:
            raise ValueError(f"diffusion.{name}: expected none, an adapter cannot change it")


def write_record(path: Path, record: Mapping[str, object], *, figures: Mapping[str, float]) -> None:
    """Write NAME.yaml beside an exported file: its SHA-256, and how it was trained.

    Args:
        path: The file.
        record: The record of the run.
        figures: Figures of its last validation.
    """
    about = {"sha256": sha256(path), "training": to_dict(record), "figures": dict(figures)}
    beside = path.with_suffix(".yaml")
    write_atomically(beside, format_yaml(about, beside.name))
