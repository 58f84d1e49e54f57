"""Folders of DALL·E Mini with one damaged file: loaded, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fuzzing import Target, check
from text_mutations import in_folder, mutated_file, place_in_folder
from tiny_dalle import CARD, register_tiny, tiny_dalle, vocabulary, write_min_dalle

import ldm
from ldm.catalog.lookup import REGISTERED
from ldm.registry.dalle.model_config import sizes_of
from ldm.registry.inspection import Candidate, inspect
from ldm.weights.detection import Detection

EITHER = (ValueError, FileNotFoundError)
FEW = 30  # mutants in a short run, as each is a whole model


def no_cards(found: Detection) -> tuple[Candidate, ...]:
    """Return no cards."""
    return ()


def load(folder: Path) -> None:
    """Load a folder, and read a prompt."""
    if CARD.name not in REGISTERED:
        register_tiny()
    report = inspect(folder / "encoder.pt", candidates=no_cards, digest=False)
    assert all(line.isprintable() for line in report.text().split("\n"))
    pipe = ldm.load(CARD.name, weights=folder, device="cpu", dtype="float32")
    pipe.tokenizer(["a red apple"], 12)


@pytest.mark.parametrize("kind", ["configurations", "tokenizer of Hugging Face"])
def test_damaged_folders_of_dalle_mini(kind: str, tmp_path: Path) -> None:
    base = write_min_dalle(tiny_dalle(), tmp_path / "base")
    config = {"model_type": "dallebart", "normalize_text": True, "dropout": 0.1, **sizes_of(CARD)}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = ["config.json", "vocab.json", "merges.txt"]
    if kind != "configurations":
        merges = (base / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        content = {"model": {"vocab": vocabulary(), "merges": [merge.split(" ") for merge in merges]}}
        (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        (base / "vocab.json").unlink()
        names = ["tokenizer.json", "config.json"]
    target = Target(name=f"DALL·E Mini, {kind}", read=load, place=place_in_folder, allowed=EITHER, short=FEW)
    check(target, in_folder(base, names), mutated_file, tmp_path)


def test_damaged_weights_of_dalle_mini(tmp_path: Path) -> None:
    base = write_min_dalle(tiny_dalle(), tmp_path / "base")
    target = Target(
        name="weights of DALL·E Mini", read=load, place=place_in_folder, allowed=EITHER, short=FEW
    )
    check(target, in_folder(base, ["encoder.pt", "detoker.pt"]), mutated_file, tmp_path)
