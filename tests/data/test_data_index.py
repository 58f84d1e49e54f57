"""The index, what is held out, and opening a data set."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ldm.data import PALETTE, EmojiData, ImageRecord, PictureIndex, held_out_pair, held_out_picture


def test_held_out_shares_are_five_per_cent():
    # 6,000 and 54,000 independent draws at 5 %: five standard deviations are 1.4 and 0.47 points
    names = [f"name-{i}" for i in range(6000)]
    assert np.mean([held_out_picture(name, "noto") for name in names]) == pytest.approx(0.05, abs=0.014)
    grounds = [ground for ground in PALETTE if ground != "white"]
    assert np.mean([held_out_pair(name, ground) for name in names for ground in grounds]) == pytest.approx(
        0.05, abs=0.0047
    )


def test_held_out_does_not_depend_on_the_process():
    code = (
        "from ldm.data import held_out_picture as h, held_out_pair as p\n"
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


def test_styles_and_grounds_are_held_out_independently():
    names = [f"name-{i}" for i in range(2000)]
    assert [held_out_picture(n, "noto") for n in names] != [held_out_picture(n, "fluent") for n in names]
    assert [held_out_pair(n, "red") for n in names] != [held_out_pair(n, "blue") for n in names]


def test_white_is_never_a_held_out_pair():
    assert not any(held_out_pair(f"name-{i}", ground) for i in range(2000) for ground in (None, "white"))


def test_a_ground_outside_the_palette_is_refused():
    with pytest.raises(ValueError, match="did you mean 'yellow'"):
        held_out_pair("red-apple", "yelow")


def test_train_and_held_out_part_the_rows(many):
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


def test_said_tags_leave_out_other_names_and_common_tags(drawn):
    assert drawn.index.said_tags[drawn.find("cat-face")] == ("kitty", "cat")
    index = PictureIndex(
        [
            ImageRecord(
                name=f"n-{i}", style="noto", tags=("common",) + (("rare",) if i < 8 else ()) + ("n 3", "de")
            )
            for i in range(9)
        ]
    )
    assert (
        index.said_tags[0] == ("rare",) and index.said_tags[8] == ()
    )  # "n 3" is a name, "de" too short, "common" on 9 names


def test_a_picture_twice_is_refused():
    with pytest.raises(ValueError, match="more than once"):
        PictureIndex([ImageRecord(name="ring", style="noto")] * 2)


def test_open(folder, drawn):
    data = EmojiData.open(folder)
    assert isinstance(data.pictures, np.memmap) and np.array_equal(data.pictures, drawn.pictures)
    assert data.index.rows == drawn.index.rows and len(data) == 18
    assert list(data.held_out) == [data.find("ring", "fluent")]


def test_open_says_how_to_build_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m ldm\.data\.emoji --out"):
        EmojiData.open(tmp_path / "nowhere")


def test_open_refuses_what_does_not_fit(folder):
    rows = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(ValueError, match="18 pictures but 17 rows"):
        EmojiData.open(folder)
    np.save(folder / "pictures.npy", np.zeros((17, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(N, P, P, 4\)"):
        EmojiData.open(folder)
