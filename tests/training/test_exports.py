"""An export over another one, killed or failed: the old parts, the new ones, or a refusal, and no mixture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from killing import in_fresh_process, kill_at_each_step

from ldm.models.vq import VQConfig
from ldm.training.loop import Run
from ldm.weights.formats.ldm_folder import read_network, write_part
from ldm.weights.parts import build_network

VQ = VQConfig(channels=(8,), blocks=1, latent_channels=4, codes=4)
PARTS = ("encoder", "decoder")


def export(folder: Path, value: float, *, then: Callable[[], None] = lambda: None) -> None:
    """Export two parts whose weights have one value, as a run does; `then` is called after the first."""
    net = build_network(VQ).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)

    def write(place: Path, record: Any) -> None:
        for name in PARTS:
            write_part(place, name, net, VQ, dtype=None, training=record)
            then()

    run: Any = SimpleNamespace(
        part=SimpleNamespace(model=net, export=write),
        ema=SimpleNamespace(swapped=lambda values: nullcontext()),
        config=SimpleNamespace(name="two", batch=1),
        **{"full_config": {}, "step": 1, "seconds": 1.0, "folder": folder.parent},
    )
    Run.export(run, folder)


def state(folder: Path) -> str:
    """Return the value of each part's weights, or that it is refused."""
    try:
        values = [float(next(read_network(folder, name)[0].parameters()).flatten()[0]) for name in PARTS]
    except (FileNotFoundError, ValueError):
        return "refused"
    return {(1.0, 1.0): "old", (2.0, 2.0): "new"}.get((values[0], values[1]), "mixture")


def killed(place: str) -> dict[str, int]:
    """Kill an export over another one at each step; return what was found."""
    folder, found = Path(place) / "export", Counter[str]()

    def look() -> None:
        found[state(folder)] += 1
        export(folder, 1.0)

    export(folder, 1.0)
    kill_at_each_step(lambda: export(folder, 2.0), Path(place), look)
    look()
    return dict(found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_export_is_no_mixture(tmp_path: Path) -> None:
    found = in_fresh_process(Path(__file__), "killed", str(tmp_path))
    assert set(found) == {"old", "new", "refused"}, found


def test_a_failed_export_leaves_the_old_one_and_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export(folder, 1.0)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail() -> None:
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        export(folder, 2.0, then=fail)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export(folder, 2.0)
    assert state(folder) == "new" and (folder / "notes.txt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
