"""WebDataset shards: the samples that the package itself reads, at random places, and damaged shards."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from photos import drawn_photo, encoded

from ldm.data.sources.config import ShardData
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
