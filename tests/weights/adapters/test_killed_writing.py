"""Writing a folder of peft over another one, killed: the old adapter, the new one, or a refusal."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from killing import in_fresh_process, kill_at_each_step
from kinds_of_adapters import PEFT, small_places
from torch import Tensor

from ldm.weights.adapters.files import read_adapter
from ldm.weights.adapters.kinds.low_rank import LowRank
from ldm.weights.adapters.matching import match_places
from ldm.weights.adapters.writing import ModuleChange, write_adapter

DOWN, UP = PEFT["LORA"].values()  # their shapes
PATH = next(iter(PEFT["LORA"])).removeprefix("base_model.model.").removesuffix(".lora_A.weight")


def change(value: float, scale: float) -> ModuleChange:
    delta = LowRank(up=torch.full(UP, value), down=torch.full(DOWN, value), scale=scale)
    return ModuleChange(part="unet", path=PATH, delta=delta)


OLD, NEW = (1.0, 0.25), (2.0, 8.0)


def difference(folder: Path) -> Tensor:
    (edit,) = match_places(read_adapter(folder), small_places(), model="small").edits
    return edit.delta.apply(torch.zeros(edit.site.shape), 1.0)


def replaced(folder: str) -> dict[str, int]:
    """Kill the writing of a new adapter over an old one at each step; return what was found."""
    place, found = Path(folder) / "style", Counter[str]()
    states = {}
    for name, numbers in (("old", OLD), ("new", NEW)):
        write_adapter(Path(folder) / name, [change(*numbers)], "peft")
        states[name] = difference(Path(folder) / name)

    def act() -> None:
        write_adapter(place, [change(*NEW)], "peft")

    def look() -> None:
        try:
            made = difference(place)
            found[next((name for name, state in states.items() if torch.equal(made, state)), "mixture")] += 1
        except FileNotFoundError:
            found["refused"] += 1
        write_adapter(place, [change(*OLD)], "peft")

    write_adapter(place, [change(*OLD)], "peft")
    kill_at_each_step(act, Path(folder), look)
    look()
    return dict(found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_adapter_is_never_read_with_the_configuration_of_another(tmp_path: Path) -> None:
    found = in_fresh_process(Path(__file__), "replaced", str(tmp_path))
    assert set(found) == {"old", "new", "refused"}, found


def test_other_files_of_the_folder_are_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    write_adapter(tmp_path, [change(*OLD)], "peft")
    write_adapter(tmp_path, [change(*NEW)], "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
