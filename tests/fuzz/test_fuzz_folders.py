"""Folders of models with one damaged file: loaded, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reduced_families
import yaml
from fuzzing import Target, check
from text_mutations import in_folder, mutated_file, place_in_folder
from tiny_exemplars import tiny_exemplar_model
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.catalog.lookup import REGISTERED
from ldm.models.text.unigram import Unigram
from ldm.models.text.wordpiece import WordPiece
from ldm.registry.inspection import Candidate, inspect
from ldm.registry.latent.assembly import word_pieces
from ldm.support.strict_json import read_json
from ldm.weights.detection import Detection
from ldm.weights.formats.diffusers_hashes import HASHES_KEY, PIPELINE_INDEX

FEW = 30  # mutants in a short run, as each is a whole model
EITHER = (ValueError, FileNotFoundError)
PROMPT = "a red apple, cats"


def no_cards(found: Detection) -> tuple[Candidate, ...]:
    """Return no cards."""
    return ()


def look(folder: Path) -> None:
    """Inspect a folder."""
    report = inspect(folder, candidates=no_cards, digest=True)
    assert all(line.isprintable() for line in report.text().split("\n"))


def load(folder: Path) -> None:
    """Inspect and load a folder in ldm layout; then read a prompt."""
    look(folder)
    pipe = ldm.load(weights=folder, device="cpu", dtype="float32")
    try:
        pipe.text([PROMPT])
    except ValueError as error:
        raise ValueError(f"mutant: {error}") from None


@pytest.mark.parametrize("kind", ["plain", "exemplars"])
def test_damaged_folders_in_ldm_layout(kind: str, tmp_path: Path) -> None:
    pipe = {"plain": tiny_model, "exemplars": tiny_exemplar_model}[kind]("mine")
    base = ldm.save(pipe, tmp_path / "base")
    card = yaml.safe_load((base / "card.yaml").read_text(encoding="utf-8"))
    (base / "card.yaml").write_text(
        yaml.safe_dump({**card, "files": None}), encoding="utf-8"
    )  # what else is compared counts
    names = [path.name for path in sorted(base.iterdir()) if path.suffix in (".yaml", ".json")]
    if kind == "exemplars":
        names = ["library.json", "library.json", "library.safetensors", "layout.yaml", "card.yaml"]
    target = Target(name=f"{kind} ldm folders", read=load, place=place_in_folder, allowed=EITHER, short=FEW)
    check(target, in_folder(base, names), mutated_file, tmp_path)


CARD = "tiny-sd-v1-5"


def load_diffusers(folder: Path) -> None:
    """Inspect and load a folder in diffusers layout, beside which the card of the model is."""
    if CARD not in REGISTERED:
        ldm.register(folder / f"{CARD}.yaml")
    look(folder)
    reduced_families.load(CARD, weights=folder)


def test_damaged_folders_in_diffusers_layout(tmp_path: Path) -> None:
    reduced_families.register("sd-v1-5", tmp_path)
    base = ldm.save(reduced_families.load(CARD), tmp_path / "base", layout="diffusers")
    (tmp_path / f"{CARD}.yaml").rename(base / f"{CARD}.yaml")
    index = {**read_json(base / PIPELINE_INDEX), HASHES_KEY: {}}  # what else is compared counts
    (base / PIPELINE_INDEX).write_text(json.dumps(index), encoding="utf-8")
    names = [str(path.relative_to(base)) for path in sorted(base.rglob("*.json"))]
    target = Target(
        name="diffusers folders", read=load_diffusers, place=place_in_folder, allowed=EITHER, short=FEW
    )
    check(target, in_folder(base, names), mutated_file, tmp_path)


def read_words(folder: Path) -> None:
    """Read the vocabularies of BERT and XLM-R, and a prompt with each."""
    for tokenizer in (WordPiece.from_file(folder / "vocab.txt"), Unigram.from_file(folder)):
        tokenizer.encode(PROMPT)


def test_damaged_vocabularies(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text(json.dumps(Unigram.spelling().to_json()), encoding="utf-8")
    (base / "vocab.txt").write_text(
        "".join(f"{token}\n" for token in word_pieces(None).vocabulary), encoding="utf-8"
    )
    target = Target(name="vocabularies", read=read_words, place=place_in_folder)
    check(target, in_folder(base, ("tokenizer.json", "vocab.txt")), mutated_file, tmp_path)
