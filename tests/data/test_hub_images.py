"""Data sets of Hugging Face's `datasets`: by the package where it is installed, and by a stand-in for it."""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import drawn_photo, encoded
from tiny_latent_diffusion import tiny_model
from tiny_trainings import run, write

import ldm
from ldm.data.sources.config import HubData
from ldm.data.sources.hub import HubImages
from ldm.training.run import open_run

PHOTOS = [drawn_photo(i) for i in range(6)]


@pytest.fixture(params=["package", "stand-in"])
def datasets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the package, without its network, or the stand-in in its place."""
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "datasets", importlib.import_module("datasets_stand_in"))
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets")


def cells(count: int = len(PHOTOS)) -> list[dict[str, Any] | None]:
    return [{"bytes": encoded(image), "path": None} for image, _ in PHOTOS[:count]]


def rows(count: int = len(PHOTOS), **columns: Any) -> dict[str, Any]:
    return {"image": cells(count), "text": [caption for _, caption in PHOTOS[:count]], **columns}


def config(path: Path, **options: Any) -> HubData:
    return HubData(**{"kind": "datasets", "path": str(path), "size": 32, **options})


def saved(datasets: Any, folder: Path, columns: dict[str, Any]) -> Path:
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return folder


def test_splits_of_a_saved_data_set(datasets: Any, tmp_path: Path) -> None:
    parts = {"train": rows(), "validation": rows(2)}
    made = datasets.DatasetDict({name: datasets.Dataset.from_dict(each) for name, each in parts.items()})
    made.save_to_disk(str(tmp_path / "saved"))
    for split, count in (("train", 6), ("validation", 2)):
        dataset = HubImages(config(tmp_path / "saved", split=split))
        assert len(dataset) == count and not dataset.problems
        for i, (image, caption) in enumerate(PHOTOS[:count]):
            record = dataset.record(i)
            assert (record.name, record.captions) == (f"{split}[{i}]", (caption,))
            assert (record.height, record.width) == (40, 48)
            assert (np.asarray(dataset.open(i)) == np.asarray(image)).all()
    with pytest.raises(ValueError, match=r"split 'test'; .*Choices: train"):
        HubImages(config(tmp_path / "saved", split="test"))


def test_columns_are_named_and_may_hold_lists_of_captions(datasets: Any, tmp_path: Path) -> None:
    columns = {"photo": cells(3), "lines": [["a", "b"], ["c"], []], "number": [1, 2, 3]}
    folder = saved(datasets, tmp_path / "saved", columns)
    dataset = HubImages(config(folder, image_key="photo", caption_key="lines"))
    assert [dataset.record(i).captions for i in range(3)] == [("a", "b"), ("c",), ()]
    assert [problem.kind for problem in dataset.problems] == ["no caption"]
    with pytest.raises(ValueError, match="image_key 'image'; .*photo"):
        HubImages(config(folder))


def test_rows_without_an_image_and_broken_ones_are_named_and_left_out(datasets: Any, tmp_path: Path) -> None:
    columns = rows()
    columns["image"][1] = None
    columns["image"][3] = {"bytes": encoded(PHOTOS[3][0])[:20], "path": None}
    columns["image"][4] = {"bytes": None, "path": str(tmp_path / "saved" / "absent.png")}
    columns["image"][5] = {"bytes": None, "path": str(tmp_path / "saved" / "there.png")}
    folder = saved(datasets, tmp_path / "saved", columns)
    PHOTOS[5][0].save(folder / "there.png")
    dataset = HubImages(config(folder))
    assert [dataset.record(i).name for i in range(len(dataset))] == ["train[0]", "train[2]", "train[5]"]
    assert (np.asarray(dataset.open(2)) == np.asarray(PHOTOS[5][0])).all()
    assert {problem.name: problem.kind for problem in dataset.problems} == dict.fromkeys(
        ("train[1]", "train[3]", "train[4]"), "unreadable"
    )
    with pytest.raises(ValueError, match="3 broken files, data.max_broken permits 2"):
        HubImages(config(folder, max_broken=2))


def test_rows_name_no_files_outside_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = importlib.import_module("datasets_stand_in")
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    PHOTOS[0][0].save(tmp_path / "private.png")
    folder = tmp_path / "saved"
    named = [tmp_path / "private.png", folder / "../private.png", folder / "link.png", "/etc/passwd"]
    columns = rows()
    columns["image"][:4] = [{"bytes": None, "path": str(path)} for path in named]
    saved(stand_in, folder, columns)
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    dataset = HubImages(config(folder))
    assert [dataset.record(i).name for i in range(len(dataset))] == ["train[4]", "train[5]"]
    assert all("a file outside the data set" in problem.reason for problem in dataset.problems)
    # what was downloaded lies in a cache
    monkeypatch.setattr(stand_in, "load_dataset", lambda path, split: stand_in.Dataset(columns))
    monkeypatch.setattr(stand_in.config, "HF_DATASETS_CACHE", str(tmp_path))
    assert len(HubImages(config(Path("someone/photos")))) == 5


def test_a_restart_and_other_processes_see_the_same(datasets: Any, tmp_path: Path) -> None:
    """Latents are kept by the fingerprints, which belong to the content."""
    first = HubImages(config(saved(datasets, tmp_path / "saved", rows())))
    again = HubImages(config(tmp_path / "saved"))
    prints = [first.record(i).fingerprint for i in range(6)]
    assert prints == [again.record(i).fingerprint for i in range(6)] and len(set(prints)) == 6
    copy = pickle.loads(pickle.dumps(first))
    assert all((np.asarray(copy.open(i)) == np.asarray(first.open(i))).all() for i in range(6))


def test_an_absent_data_set_is_an_error_that_names_it(datasets: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        HubImages(config(tmp_path / "absent"))


def test_a_model_is_fine_tuned_on_it(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(datasets, tmp_path / "saved", rows())
    ldm.save(tiny_model(), tmp_path / "model")
    data = {"kind": "datasets", "path": "saved", "size": 32, "held_out": 0.2}
    stage = {"part": "fine-tune", "weights": "model", "data": data, "run": run("tuned", steps=2)}
    path = write(stage, tmp_path / "tuned.yaml")
    open_run(path).train(until=1, progress=False)
    open_run(path).train(progress=False)
    assert (tmp_path / "runs/tuned/checkpoint.pt").is_file()
