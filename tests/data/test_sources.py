"""Readers of image files: what is found, what is reported, and that nothing is dropped silently."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from photos import drawn_photo, encoded, write_broken, write_photos
from PIL import Image

from ldm.data.sources import folder, scanning
from ldm.data.sources.config import ClassData, FolderData
from ldm.data.sources.decoding import decode
from ldm.data.sources.folder import FolderImages
from ldm.support.config import build


def open_folder(place, **options) -> FolderImages:
    return FolderImages(FolderData(kind="folder", path=str(place), **{"size": 32, **options}))


def captions(dataset: FolderImages) -> dict[str, tuple[str, ...]]:
    records = [dataset.record(i) for i in range(len(dataset))]
    return {record.name: record.captions for record in records}


def test_every_kind_of_broken_file_is_counted_and_named(tmp_path):
    expected = write_broken(tmp_path)
    dataset = open_folder(tmp_path, max_broken=20)
    kinds = {problem.name: problem.kind for problem in dataset.problems}
    # the pixels of a truncated file are missed only when it is decoded
    late = {"truncated.png", "truncated.jpg"}
    assert kinds == {name: kind for name, kind in expected.items() if kind and name not in late}
    found = {dataset.record(i).name: i for i in range(len(dataset))}
    trained = {name for name, kind in expected.items() if kind in ("", "several frames", "no caption")}
    assert set(found) == trained | late | {name for name, kind in expected.items() if kind == "duplicate"}
    for name, i in found.items():
        if name in late:
            with pytest.raises(ValueError, match="truncated|broken"):
                dataset.open(i)
        else:
            image = dataset.open(i)
            assert image.mode == "RGB" and image.size == (48, 40), name
    assert captions(dataset)["Äpfel und 梨 🍐.png"] == ("a caption of Äpfel und 梨 🍐.png",)
    assert captions(dataset)["bare.png"] == ()


def test_too_many_broken_files_stop_with_their_names(tmp_path):
    write_broken(tmp_path)
    with pytest.raises(ValueError, match=r"5 broken files, data.max_broken permits 4: .*; empty.png \(it is"):
        open_folder(tmp_path, max_broken=4)
    assert len(open_folder(tmp_path, max_broken=5))


def test_an_empty_folder_and_an_absent_one_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no image to train on: there is no image file"):
        open_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_folder(tmp_path / "absent")
    (tmp_path / "a.txt").write_text("a caption", encoding="utf-8")
    with pytest.raises(ValueError, match="no image to train on: caption without an image: 1: a.txt"):
        open_folder(tmp_path)


@pytest.mark.parametrize(("rule", "kept"), [("keep", 3), ("skip", 2), ("stop", None)])
def test_images_without_a_caption(tmp_path, rule, kept):
    (write_photos(tmp_path, 3) / "0001.txt").unlink()
    if kept is None:
        with pytest.raises(ValueError, match="no caption: 1: 0001.png"):
            open_folder(tmp_path, uncaptioned=rule)
        return
    dataset = open_folder(tmp_path, uncaptioned=rule)
    assert len(dataset) == kept
    assert [(p.name, p.kind) for p in dataset.problems] == [("0001.png", "no caption")]


def test_captions_are_lines_of_text_or_metadata(tmp_path):
    write_photos(tmp_path, 4)
    (tmp_path / "0000.txt").write_text("one  caption\n\n another \n", encoding="utf-8-sig")
    rows = [
        {"file_name": "0001.png", "text": "of metadata"},
        {"file_name": "0002.png", "caption": ["first", "second"], "other": 1},
        {"file_name": "absent.png", "text": "of nothing"},
        {"file_name": "0003.png", "title": "the wrong key"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metadata.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "inner").mkdir()
    drawn_photo(9)[0].save(tmp_path / "inner" / "x.PNG")
    (tmp_path / "inner" / "metadata.csv").write_text(
        'file_name,text\nx.PNG,"a caption, with a comma"\n', encoding="utf-8"
    )
    dataset = open_folder(tmp_path)
    assert captions(dataset) == {
        "0000.png": ("one caption", "another"),
        "0001.png": ("of metadata",),
        "0002.png": ("first", "second"),
        "0003.png": ("a red disc".replace("red", "yellow"),),  # its text file, as metadata have none for it
        "inner/x.PNG": ("a caption, with a comma",),
    }
    assert [(p.name, p.kind) for p in dataset.problems] == [
        ("metadata.jsonl, line 3", "caption without an image"),
        ("metadata.jsonl, line 4", "bad metadata"),
    ]


def test_class_folders(tmp_path):
    for name in ("tabby_cat", "red-fox"):
        write_photos(tmp_path / name, 2)
        for text in (tmp_path / name).glob("*.txt"):
            text.unlink()
    config = ClassData(kind="classes", path=str(tmp_path), size=32, template="a photo of a {}")
    assert set(captions(FolderImages(config)).values()) == {
        ("a photo of a tabby cat",),
        ("a photo of a red fox",),
    }


def test_pixels_are_upright_on_the_background_with_eight_bits(tmp_path):
    left = np.zeros((4, 6, 3), dtype=np.uint8)
    left[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    turned = decode(encoded(Image.fromarray(left), "PNG", exif=exif), (255, 255, 255))
    assert turned.size == (4, 6) and (np.asarray(turned)[:3] == 255).all()
    clear = Image.new("RGBA", (3, 3), (10, 20, 30, 0))
    assert np.asarray(decode(encoded(clear), (1, 2, 3)))[0, 0].tolist() == [1, 2, 3]
    half = Image.new("RGBA", (3, 3), (0, 0, 0, 128))
    assert np.asarray(decode(encoded(half), (255, 255, 255)))[0, 0, 0] == pytest.approx(127, abs=1)
    deep = Image.fromarray(np.full((3, 3), 65535 // 2, dtype=np.uint16))
    assert np.asarray(decode(encoded(deep), (0, 0, 0)))[0, 0].tolist() == [127] * 3
    indexed = Image.new("P", (3, 3))
    indexed.putpalette([9, 8, 7, *[0] * 765])
    assert np.asarray(decode(encoded(indexed), (0, 0, 0)))[0, 0].tolist() == [9, 8, 7]


def test_a_large_jpeg_is_reduced_to_no_less_than_is_needed():
    data = encoded(drawn_photo(0, width=1600, height=1200)[0], "JPEG")
    assert decode(data, (0, 0, 0)).size == (1600, 1200)
    small = decode(data, (0, 0, 0), least=128)
    assert min(small.size) >= 256 and max(small.size) < 1600


def test_the_fingerprint_changes_with_the_file(tmp_path):
    write_photos(tmp_path, 1)
    before = open_folder(tmp_path).record(0).fingerprint
    assert open_folder(tmp_path).record(0).fingerprint == before
    os.utime(tmp_path / "0000.png", ns=(1, 1))
    assert open_folder(tmp_path).record(0).fingerprint != before


def test_a_data_set_can_be_sent_to_another_process(tmp_path):
    dataset = open_folder(write_photos(tmp_path, 3))
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy.record(i) for i in range(3)] == [dataset.record(i) for i in range(3)]


def test_a_restart_looks_at_new_and_changed_files_only(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(folder, "LEAST_SECONDS", -1.0)
    photos = write_photos(tmp_path / "photos", 6)
    (photos / "0005.png").write_bytes(b"no image")
    first, seen = open_folder(photos), []
    look = scanning.image_header

    def note(file):
        seen.append(Path(file.name).name)
        return look(file)

    monkeypatch.setattr(scanning, "image_header", note)
    again = open_folder(photos)
    assert seen == ["0005.png"]  # what cannot be read is tried again
    assert again.problems == first.problems and captions(again) == captions(first)
    drawn_photo(9)[0].save(photos / "0002.png")
    drawn_photo(8, width=60)[0].save(photos / "0006.png")
    seen.clear()
    later = open_folder(photos)
    assert seen == ["0002.png", "0005.png", "0006.png"] and later.record(5).width == 60
    for path in (tmp_path / "home" / "scans").iterdir():
        path.write_text('{"fingerprints": [1], "heights": 3}', encoding="utf-8")
    assert captions(open_folder(photos)) == captions(later)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "size"),
        ({"held_out": 1.0}, "held_out"),
        ({"mirror": 2.0}, "mirror"),
        ({"background": [0, 0, 300]}, "background"),
        ({"buckets": {"step": 512}}, "buckets: no size"),
        ({"crops": 1}, "unknown key 'crops'; did you mean 'crop'"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(FolderData, {"kind": "folder", "path": "photos", **options})
