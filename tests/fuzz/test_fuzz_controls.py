"""Damaged controls of every kind: read and built for a small UNet, or refused with a reason."""

from __future__ import annotations

from pathlib import Path

from control_nets import peer_config, reduced_config
from described_files import described, mutated_description, place_described
from fuzzing import Target, check
from kinds_of_adapters import UNET
from kinds_of_controls import control_states, target

from ldm.catalog.control_cards import CONTROL_CARDS
from ldm.registry.inspection import Candidate, inspect
from ldm.weights.controls.building import IP_ADAPTER_KIND, build_control, control_kind, family_of
from ldm.weights.controls.files import read_control
from ldm.weights.detection import Detection


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
