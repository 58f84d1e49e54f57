"""WebDataset shards: the samples that the package itself reads, at random places, and damaged shards."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from photos import drawn_photo, encoded, write_broken

from ldm.data.sources import shard_index
from ldm.data.sources.config import ShardData
from ldm.data.sources.shard_files import ShardFiles
from ldm.data.sources.shards import ShardImages, find_shards

webdataset = pytest.importorskip("webdataset")


@pytest.fixture
def shards(tmp_path):
    """Write three shards of four samples, with captions as text, as JSON, and none."""
    pattern = str(tmp_path / "photos-%02d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for i in range(12):
            image, caption = drawn_photo(i)
            sample = {"__key__": f"part/{i:03d}", "png": encoded(image)}
            if i % 3 == 0:
                sample["txt"] = f"{caption}\nanother"
            elif i % 3 == 1:
                sample["json"] = json.dumps({"caption": caption, "width": 48})
            writer.write(sample)
    return tmp_path


def open_shards(path, **options) -> ShardImages:
    return ShardImages(ShardData(kind="webdataset", path=str(path), size=32, **options))


def test_the_samples_are_those_of_the_package(shards):
    dataset = open_shards(shards)
    paths = [str(path) for path in sorted(shards.glob("*.tar"))]
    peer = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
    assert len(dataset) == len(peer) == 12
    for i in reversed(range(12)):  # in another order than they lie in
        assert dataset.record(i).name.endswith(f"{peer[i]['__key__']}.png")
        assert (np.asarray(dataset.open(i)) == np.asarray(peer[i]["png"])).all()
        expected = {0: (drawn_photo(i)[1], "another"), 1: (drawn_photo(i)[1],), 2: ()}[i % 3]
        assert dataset.record(i).captions == expected
    assert {problem.kind for problem in dataset.problems} == {"no caption"}


def test_shards_are_named_by_braces_or_by_their_folder(shards):
    files = sorted(shards.glob("*.tar"))
    assert find_shards(f"{shards}/photos-{{00..02}}.tar") == files == find_shards(str(shards))
    with pytest.raises(FileNotFoundError, match=r"no such file: .*photos-03.tar"):
        find_shards(f"{shards}/photos-{{00..03}}.tar")
    with pytest.raises(FileNotFoundError, match="expected files"):
        find_shards("pipe:cat photos.tar")


def test_a_copy_in_another_process_reads_the_same(shards):
    dataset = open_shards(shards)
    dataset.open(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert (np.asarray(copy.open(11)) == np.asarray(dataset.open(11))).all()


def test_a_shard_that_is_cut_off_is_named_and_the_rest_is_read(shards):
    last = shards / "photos-02.tar"
    last.write_bytes(last.read_bytes()[:3000])
    dataset = open_shards(shards)
    (damaged,) = (problem for problem in dataset.problems if problem.kind == "unreadable")
    assert damaged.name == "photos-02.tar" and 8 <= len(dataset) < 12
    with pytest.raises(ValueError, match="max_broken permits 0: unreadable: 1: photos-02.tar"):
        open_shards(shards, max_broken=0)


def write_shard(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", encoding="utf-8") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_every_kind_of_broken_file_is_counted_and_named(tmp_path):
    (tmp_path / "folder").mkdir()
    expected = write_broken(tmp_path / "folder")
    files = sorted(
        path for path in (tmp_path / "folder").iterdir() if path.is_file() and not path.is_symlink()
    )
    # "truncated" has two images; a sample is one
    write_shard(tmp_path / "a.tar", {path.name: path.read_bytes() for path in files})
    dataset = open_shards(tmp_path / "a.tar", max_broken=20)
    kinds = {problem.name.removeprefix("a.tar/"): problem.kind for problem in dataset.problems}
    late = {"truncated.png", "truncated.jpg"}
    named = {name: kind for name, kind in expected.items() if kind and name not in late}
    named = {name: kind for name, kind in named.items() if kind != "symlink loop" and name != "pipe.png"}
    named["alone"], named["notes"] = named.pop("alone.txt"), named.pop("notes.pdf")
    assert kinds == {**named, "truncated": "several images"}
    for i in range(len(dataset)):
        if dataset.record(i).name == "a.tar/truncated.jpg":
            with pytest.raises(ValueError, match="truncated|broken"):
                dataset.open(i)
        else:
            assert dataset.open(i).size == (48, 40)


def test_a_name_that_a_shard_has_twice_is_reported(tmp_path):
    image = encoded(drawn_photo(0)[0])
    with tarfile.open(tmp_path / "a.tar", "w", encoding="utf-8") as tar:
        for name, data in (("x.png", image), ("x.txt", b"first"), ("x.txt", b"second")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    dataset = open_shards(tmp_path / "a.tar")
    assert dataset.record(0).captions == ("first",)
    assert [problem[:2] for problem in dataset.problems] == [("a.tar/x.txt", "duplicate")]


# What is kept of a scan


@pytest.fixture
def kept(shards, tmp_path, monkeypatch):
    """Keep the scans of shards, however short they are, in a folder; return it."""
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shard_index, "LEAST_SECONDS", -1.0)
    return tmp_path / "home" / "scans"


def content(dataset: ShardImages) -> list:
    return [*(dataset.record(i) for i in range(len(dataset))), dataset.problems, dataset.spans.tolist()]


def test_a_restart_reads_no_shard(shards, kept, monkeypatch):
    first = open_shards(shards)
    assert len(list(kept.glob("shard-*.json"))) == 3

    def fail(*args, **options):
        raise AssertionError("a shard is read")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", fail)
        patch.setattr(ShardFiles, "read", fail)
        again = open_shards(shards)
    assert content(again) == content(first)
    assert (np.asarray(again.open(5)) == np.asarray(first.open(5))).all()


def test_a_changed_shard_is_read_again(shards, kept):
    first = open_shards(shards)
    path = shards / "photos-01.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"a red", b"a tan"))  # of the same size
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    captions = [dataset.record(8).captions for dataset in (first, open_shards(shards))]
    texts = [open_shards(shards).record(i).captions for i in range(4, 8)]
    assert texts != [first.record(i).captions for i in range(4, 8)] and captions[0] == captions[1]


@pytest.mark.parametrize("damage", [b"", b"{", b"{}", b"[1]", None])
def test_a_damaged_entry_is_made_again(shards, kept, damage):
    first = content(open_shards(shards))
    for path in kept.iterdir():
        entry = {**json.loads(path.read_text(encoding="utf-8")), "heights": []}
        path.write_bytes(json.dumps(entry).encode() if damage is None else damage)
    assert content(open_shards(shards)) == first


def test_the_limit_of_pixels_holds_for_what_is_kept(shards, kept, monkeypatch):
    open_shards(shards)
    monkeypatch.setenv("LDM_MAX_PIXELS", "100")
    with pytest.raises(ValueError, match="too large: 12"):
        open_shards(shards)


def test_a_folder_that_cannot_be_written_keeps_nothing(shards, kept):
    kept.parent.write_bytes(b"a file")
    assert len(open_shards(shards)) == len(open_shards(shards)) == 12
