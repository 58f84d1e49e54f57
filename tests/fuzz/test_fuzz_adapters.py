"""Damaged adapters of every kind and container: read and matched, or refused with a reason."""

from __future__ import annotations

import base64
import io
import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from described_files import described, mutated_description, place_described
from fuzzing import Target, check, write_file
from image_mutations import chunks_of, mutated_png, png_of
from kinds_of_adapters import EMBEDDINGS, KINDS, PEFT, small_places
from mutations import mixed, mutated_bytes, mutated_json
from pickle_mutations import mutated_archive
from PIL import Image

from ldm.registry.inspection import Candidate, inspect
from ldm.weights.adapters.embedding_images import TEXT_KEY
from ldm.weights.adapters.files import read_adapter
from ldm.weights.adapters.matching import match_places
from ldm.weights.cast import is_finite
from ldm.weights.detection import Detection

CONFIG = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}


def no_cards(found: Detection) -> tuple[Candidate, ...]:
    """Return no cards."""
    return ()


def use(path: Path) -> None:
    """Match an adapter to a small model; then compute every weight that it changes."""
    adapter = match_places(read_adapter(path), small_places(), model="small")
    for edit in adapter.edits:
        weight = torch.linspace(-1, 1, torch.Size(edit.site.shape).numel()).reshape(edit.site.shape)
        try:
            changed = edit.delta.apply(weight, 0.7)
        except torch.linalg.LinAlgError:  # a rotation of such numbers has no inverse
            raise ValueError("mutant: no rotation") from None
        assert changed.shape == edit.site.shape
    for learned in adapter.learned:
        assert all(is_finite(vectors) and vectors.ndim == 2 for vectors in learned.vectors.values())


def look(path: Path) -> None:
    """Inspect an adapter, and match it to a small model."""
    report = inspect(path, candidates=no_cards, digest=False, nan=True, model="sd-v1-5")
    assert all(line.isprintable() for line in report.text().split("\n"))


def seeds() -> list[bytes]:
    files = [described(shapes, metadata={"modelspec.architecture": "sd"}) for shapes in KINDS.values()]
    files += [described(shapes, "pickle") for shapes in (KINDS["LoRA"], *EMBEDDINGS.values())]
    return files + [
        described(shapes, "peft", config={"peft_type": kind, **(CONFIG if kind == "LORA" else {})})
        for kind, shapes in PEFT.items()
    ]


def test_damaged_adapters(tmp_path: Path) -> None:
    small_places()
    target = Target(name="adapters", read=use, place=place_described)
    check(target, seeds(), mutated_description, tmp_path)


def test_reports_of_damaged_adapters(tmp_path: Path) -> None:
    target = Target(name="reports of adapters", read=look, place=place_described, short=30)
    check(target, seeds(), mutated_description, tmp_path)


def pickled(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def test_damaged_pickled_adapters(tmp_path: Path) -> None:
    own = {name: torch.ones(shape) for name, shape in KINDS["LoRA"].items()}
    embedding = {"string_to_param": {"*": torch.ones(2, 16)}, "string_to_token": {"*": 265}, "name": "x"}
    contents = (
        own,
        {"state_dict": own, "epoch": 3},
        embedding,
        [{"emb_params": torch.ones(2, 16)}, {"a": 1}],
    )
    target = Target(name="pickled adapters", read=use)
    check(target, [pickled(each) for each in contents], mixed(mutated_archive, mutated_bytes), tmp_path)


VECTORS = {"TORCHTENSOR": [[0.5] * 16] * 2}
EMBEDDING = {"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "zor", "step": 12}
SIDE = 32  # of a card


def card(text: bytes, *, chunk: bool, form: str = "PNG") -> bytes:
    """Return a card: its text in a PNG's chunk, or in the pixels left and right of two black columns."""
    made = io.BytesIO()
    if chunk:
        Image.new("RGB", (SIDE, SIDE), (90, 90, 90)).save(made, "PNG")
        header, *rest = chunks_of(made.getvalue())
        return png_of([header, (b"tEXt", TEXT_KEY.encode() + b"\0" + base64.b64encode(text)), *rest])
    data = zlib.compress(text)
    data += bytes(-len(data) % (3 * SIDE))
    parts = []
    for bits in (bytes(each & 15 for each in data), bytes(each >> 4 for each in data)):
        x, covered = 0, bytearray()
        for bit in bits:
            x = (x * 1664525 + 1013904223) % 2**32
            covered.append(bit ^ (x % 255 & 15) | 0x50)
        parts.append(Image.frombytes("RGB", (len(bits) // (3 * SIDE), SIDE), bytes(covered)))
    whole = Image.new("RGB", (parts[0].width * 2 + 12, SIDE))
    whole.paste((90, 91, 92), (parts[0].width + 1, 0, parts[0].width + 11, SIDE))
    whole.paste(parts[0], (0, 0))
    whole.paste(parts[1], (whole.width - parts[1].width, 0))
    whole.save(made, form, lossless=True, exact=True)
    return made.getvalue()


def mutated_card(cards: Sequence[bytes], rng: random.Random) -> bytes:
    """Return a card whose JSON is damaged, or whose text is many times as long as its file."""
    if rng.random() < 0.1:
        text = b'{"a": [' + b"0," * rng.choice((10**5, 10**6, 4 * 10**6)) + b"0]}"
        return card(text, chunk=False) if len(text) < 10**6 else with_squeezed_chunk(text)
    return card(mutated_json([json.dumps(EMBEDDING).encode()], rng), chunk=rng.random() < 0.5)


def with_squeezed_chunk(text: bytes) -> bytes:
    """Return a card whose chunk is compressed."""
    head, *rest = chunks_of(card(b"{}", chunk=True))
    content = TEXT_KEY.encode() + b"\0\0" + zlib.compress(base64.b64encode(text))
    return png_of([head, (b"zTXt", content), *rest[1:]])


def test_damaged_embedding_cards(tmp_path: Path) -> None:
    text = json.dumps(EMBEDDING).encode()
    cards = [card(text, chunk=True), card(text, chunk=False), card(text, chunk=False, form="WEBP")]
    target = Target(name="embedding cards", read=use, place=write_file)
    check(target, cards, mixed(mutated_card, mutated_png, mutated_bytes), tmp_path)
