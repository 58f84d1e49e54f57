"""Damaged controls of every kind: read and built for a small UNet, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

import torch
from clip_towers import write_tower
from control_nets import peer_config, reduced_config
from described_files import described, mutated_description, place_described
from fuzzing import Target, check
from kinds_of_adapters import UNET
from kinds_of_controls import control_states, target
from text_mutations import in_folder, mutated_file, place_in_folder

from ldm.catalog.control_cards import CONTROL_CARDS
from ldm.registry.inspection import Candidate, inspect
from ldm.weights.controls.building import IP_ADAPTER_KIND, build_control, control_kind, family_of
from ldm.weights.controls.files import read_control
from ldm.weights.controls.ip_adapter import load_vision
from ldm.weights.detection import Detection

EITHER = (ValueError, FileNotFoundError)


def no_cards(found: Detection) -> tuple[Candidate, ...]:
    """Return no cards."""
    return ()


def use(path: Path) -> None:
    """Build a control for a small model."""
    file = read_control(path)
    model = target(vision=control_kind(file) == IP_ADAPTER_KIND)
    built = build_control(file, model, CONTROL_CARDS["canny"])
    assert built.what and isinstance(family_of(file), str)


def look(path: Path) -> None:
    """Inspect a control."""
    report = inspect(path, candidates=no_cards, digest=False)
    assert all(line.isprintable() for line in report.text().split("\n"))


def seeds() -> list[bytes]:
    states = control_states()
    files = [described(state) for state in states.values()]
    config = {**peer_config(reduced_config(UNET)), "_class_name": "ControlNetModel"}
    net = described(states["ControlNet of diffusers"], "diffusers", config=config)
    return [*files, described(states["T2I-Adapter"], "pickle"), net]


def test_damaged_controls(tmp_path: Path) -> None:
    check(Target(name="controls", read=use, place=place_described), seeds(), mutated_description, tmp_path)


def test_reports_of_damaged_controls(tmp_path: Path) -> None:
    target = Target(name="reports of controls", read=look, place=place_described, short=30)
    check(target, seeds(), mutated_description, tmp_path)


def read_tower(folder: Path) -> None:
    """Read CLIP's image tower from a folder in Hugging Face layout."""
    load_vision(folder, torch.float32)


def test_damaged_configurations_of_image_towers(tmp_path: Path) -> None:
    base = write_tower(tmp_path / "base")
    names = [path.name for path in base.iterdir() if path.suffix == ".json"]
    target = Target(name="image towers", read=read_tower, place=place_in_folder, allowed=EITHER)
    check(target, in_folder(base, names), mutated_file, tmp_path)
