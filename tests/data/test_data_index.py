"""The index, the held-out images, and opening a data set."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ldm.data import PALETTE, EmojiData, ImageIndex, ImageRecord, held_out_image, held_out_pair


def test_held_out_shares_are_five_per_cent():
    # 6,000 and 54,000 independent draws at 5 %: five standard deviations are 1.4 and 0.47 points
    names = [f"name-{i}" for i in range(6000)]
    assert np.mean([held_out_image(name, "noto") for name in names]) == pytest.approx(0.05, abs=0.014)
    colours = [colour for colour in PALETTE if colour != "white"]
    assert np.mean([held_out_pair(name, colour) for name in names for colour in colours]) == pytest.approx(
        0.05, abs=0.0047
    )


def test_held_out_does_not_depend_on_the_process():
    code = (
        "from ldm.data import held_out_image as h, held_out_pair as p\n"
        "print([(h(f'n{i}', 'noto'), p(f'n{i}', 'red')) for i in range(99)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1 and "True" in runs.pop()


def test_styles_and_backgrounds_are_held_out_independently():
    names = [f"name-{i}" for i in range(2000)]
    assert [held_out_image(n, "noto") for n in names] != [held_out_image(n, "fluent") for n in names]
    assert [held_out_pair(n, "red") for n in names] != [held_out_pair(n, "blue") for n in names]


def test_white_is_never_a_held_out_pair():
    assert not any(held_out_pair(f"name-{i}", colour) for i in range(2000) for colour in (None, "white"))


def test_a_background_outside_the_palette_is_refused():
    with pytest.raises(ValueError, match="did you mean 'yellow'"):
        held_out_pair("red-apple", "yelow")


def test_train_and_held_out_partition_the_rows(many):
    assert sorted([*many.train, *many.held_out]) == list(range(len(many)))
    assert all(many[i].held_out for i in many.held_out) and not any(many[i].held_out for i in many.train)
    assert sorted(np.concatenate(list(many.train_of.values()))) == list(many.train)
    assert set(many.names("noto", held_out=False)) == {many[i].name for i in many.train_of["noto"]}


def test_find(drawn):
    row = drawn.index[drawn.find("red disc", "twemoji")]
    assert (row.name, row.style) == ("red-disc", "twemoji")
    with pytest.raises(ValueError, match="nearest: red-disc"):
        drawn.find("red-disk")
    with pytest.raises(ValueError, match="did you mean 'fluent'"):
        drawn.find("ring", "fluant")


def test_caption_tags_are_neither_names_nor_common(drawn):
    assert drawn.index.caption_tags[drawn.find("cat-face")] == ("kitty", "cat")
    index = ImageIndex(
        [
            ImageRecord(
                name=f"n-{i}", style="noto", tags=("common",) + (("rare",) if i < 8 else ()) + ("n 3", "de")
            )
            for i in range(9)
        ]
    )
    assert (
        index.caption_tags[0] == ("rare",) and index.caption_tags[8] == ()
    )  # "n 3" is a name, "de" too short, "common" on 9 names


def test_a_repeated_image_is_refused():
    with pytest.raises(ValueError, match="more than once"):
        ImageIndex([ImageRecord(name="ring", style="noto")] * 2)


def test_open(folder, drawn):
    data = EmojiData.open(folder)
    assert isinstance(data.images, np.memmap) and np.array_equal(data.images, drawn.images)
    assert data.index.rows == drawn.index.rows and len(data) == 18
    assert list(data.held_out) == [data.find("ring", "fluent")]


def test_the_error_without_a_data_set_names_the_build_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m ldm\.data\.emoji --out"):
        EmojiData.open(tmp_path / "nowhere")


def test_files_that_do_not_fit_each_other_are_refused(folder):
    rows = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(ValueError, match="18 images but 17 rows"):
        EmojiData.open(folder)
    np.save(folder / "pictures.npy", np.zeros((17, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(N, P, P, 4\)"):
        EmojiData.open(folder)
