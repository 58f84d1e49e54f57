"""Data sets of Hugging Face's `datasets`."""

from __future__ import annotations

import numpy as np
import pytest
from photos import drawn_photo, encoded

from ldm.data.sources.config import HubData
from ldm.data.sources.hub import HubImages

datasets = pytest.importorskip("datasets")


def test_a_saved_data_set(tmp_path):
    photos = [drawn_photo(i) for i in range(5)]
    rows = {
        "image": [{"bytes": encoded(image), "path": None} for image, _ in photos],
        "text": [caption for _, caption in photos],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "saved"))
    config = HubData(kind="datasets", path=str(tmp_path / "saved"), size=32)
    dataset = HubImages(config)
    for i, (image, caption) in enumerate(photos):
        assert dataset.record(i).captions == (caption,)
        assert (np.asarray(dataset.open(i)) == np.asarray(image)).all()
    with pytest.raises(ValueError, match=r"split 'test'; .*Choices: train"):
        HubImages(HubData(kind="datasets", path=config.path, split="test"))
