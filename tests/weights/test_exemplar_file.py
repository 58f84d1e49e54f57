"""The files of the library of exemplars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_exemplars import tiny_library

from ldm.weights.formats.exemplar_file import LIBRARY_IMAGES, LIBRARY_INDEX, read_library, write_library
from ldm.weights.formats.safetensors import write_safetensors


def test_a_library_is_read_as_it_was_written(tmp_path: Path):
    library = tiny_library()
    write_library(tmp_path, library)
    again = read_library(tmp_path)
    assert list(again) == list(library) and again.nouns == library.nouns and again.size == library.size


@pytest.mark.parametrize("ends", [[5, 3], [2], [1, 9], [], [-2, 5]])
def test_images_that_are_not_one_after_the_other_are_refused(tmp_path: Path, ends: list[int]):
    index = {"size": 16, "images": [["cat", "noto"], ["cat", "flat"]], "nouns": {}}
    (tmp_path / LIBRARY_INDEX).write_text(json.dumps(index), encoding="utf-8")
    state = {"content": torch.zeros(5, dtype=torch.uint8), "ends": torch.tensor(ends, dtype=torch.int64)}
    write_safetensors(tmp_path / LIBRARY_IMAGES, state, {})
    with pytest.raises(ValueError, match="does not hold 2 images one after the other"):
        read_library(tmp_path)


def test_wrong_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="library.safetensors is absent"):
        read_library(tmp_path)
    write_library(tmp_path, tiny_library())
    (tmp_path / LIBRARY_INDEX).write_text('{"size": "16", "images": [], "nouns": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="library.json.*size.*expected int"):
        read_library(tmp_path)
    nouns = {"images": [["dog", "noto"]] * 9, "nouns": {"bird\x1b": ["wren"]}, "size": 16}
    (tmp_path / LIBRARY_INDEX).write_text(json.dumps(nouns), encoding="utf-8")
    with pytest.raises(ValueError, match="library.json': two exemplars of 'dog' in style 'noto'"):
        read_library(tmp_path)
    write_safetensors(tmp_path / LIBRARY_IMAGES, {"other": torch.zeros(1)}, {})
    write_library_index = {"size": 16, "images": [], "nouns": {}}
    (tmp_path / LIBRARY_INDEX).write_text(json.dumps(write_library_index), encoding="utf-8")
    with pytest.raises(ValueError, match="expected the tensors content and ends"):
        read_library(tmp_path)
