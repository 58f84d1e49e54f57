"""The index, the held-out images, and opening a data set."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from ldm.data import (
    PALETTE,
    THING_COLOURS,
    EmojiData,
    Facts,
    ImageIndex,
    ImageRecord,
    Thing,
    are_held_out,
    held_out_background,
    held_out_colour,
    held_out_count,
    held_out_image,
    held_out_pair,
)

NAMES = [f"name-{i}" for i in range(6000)]


@pytest.mark.parametrize(
    ("share", "held"),
    [
        (0.05, [held_out_image(name, "noto") for name in NAMES]),
        (0.1, [held_out_background(n, c) for n in NAMES for c in PALETTE if c != "white"]),
        (0.1, [held_out_colour(n, c) for n in NAMES for c in THING_COLOURS]),
        (0.1, [held_out_count(n, c) for n in NAMES for c in (2, 3, 4)]),
        (0.2, [held_out_pair(a, b) for a in NAMES[:200] for b in NAMES if a < b]),
    ],
    ids=["images", "backgrounds", "colours", "counts", "pairs"],
)
def test_held_out_shares(share, held):
    deviation = (share * (1 - share) / len(held)) ** 0.5  # of the mean of independent draws
    assert np.mean(held) == pytest.approx(share, abs=5 * deviation)


def test_what_is_never_held_out():
    assert not any(held_out_background(name, colour) for name in NAMES for colour in (None, "white"))
    assert not any(held_out_colour(name, None) or held_out_count(name, 1) for name in NAMES)
    assert not any(held_out_pair(name, name) for name in NAMES)


def test_images_and_backgrounds_are_held_out_as_before():
    """Trained models have not seen these, so the hash must not change."""

    def fraction(*key):
        digest = hashlib.sha256("\n".join(("ldm emoji held-out 1", *key)).encode()).hexdigest()
        return int(digest[:16], 16) / 2**64

    for n in NAMES[:500]:
        assert held_out_image(n, "noto") == (fraction("picture", n, "noto") < 0.05)
        assert held_out_background(n, "red") == (fraction("pair", n, "red") < 0.1)


def test_pairs_have_no_order():
    assert all(held_out_pair(a, b) == held_out_pair(b, a) for a in NAMES[:40] for b in NAMES[:40])


def test_facts_are_held_out_if_any_combination_is():
    held = next(n for n in NAMES if held_out_colour(n, "blue"))
    free = next(n for n in NAMES if not held_out_colour(n, "blue") and not held_out_pair(held, n))
    assert are_held_out(Facts(things=(Thing(name=held, colour="blue"),)))
    assert not are_held_out(Facts(things=(Thing(name=held),)))
    both = (Thing(name=free, colour="blue"), Thing(name=held, colour="blue"))
    assert are_held_out(Facts(things=both, relation="and"))
    assert not are_held_out(Facts(things=(both[0], Thing(name=held)), relation="and"))
    other = next(n for n in NAMES if held_out_pair(n, held))
    assert are_held_out(Facts(things=(Thing(name=held), Thing(name=other)), relation="left"))
    counted = next(n for n in NAMES if held_out_count(n, 3))
    assert are_held_out(Facts(things=(Thing(name=counted),), count=3))
    shown = next(n for n in NAMES if held_out_background(n, "red") and not held_out_background(free, "red"))
    things = (Thing(name=free), Thing(name=shown))
    assert are_held_out(Facts(things=things, relation="and", background="red"))


def test_held_out_does_not_depend_on_the_process():
    code = (
        "from ldm.data import held_out_image as h, held_out_background as b, held_out_pair as p\n"
        "print([(h(f'n{i}', 'noto'), b(f'n{i}', 'red'), p(f'n{i}', 'm')) for i in range(99)])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            encoding="utf-8",
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1 and "True" in runs.pop()


def test_styles_and_backgrounds_are_held_out_independently():
    names = [f"name-{i}" for i in range(2000)]
    assert [held_out_image(n, "noto") for n in names] != [held_out_image(n, "fluent") for n in names]
    assert [held_out_background(n, "red") for n in names] != [held_out_background(n, "blue") for n in names]
    assert [held_out_background(n, "red") for n in names] != [held_out_colour(n, "red") for n in names]


def test_values_outside_the_choices_are_refused():
    with pytest.raises(ValueError, match="did you mean 'yellow'"):
        held_out_background("red-apple", "yelow")
    with pytest.raises(ValueError, match="colour 'gray'"):
        held_out_colour("red-apple", "gray")
    with pytest.raises(ValueError, match="count 5"):
        held_out_count("red-apple", 5)


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
    assert drawn.index.tags["cat-face"] == ("kitty", "cat")
    rows = [
        ImageRecord(name=f"n-{i}", style="noto", tags=("common", *(["rare"] if i < 3 else []), "n 3", "de"))
        for i in range(4)
    ]
    index = ImageIndex(rows)
    # "n 3" is a name, "de" too short, "common" on 4 names
    assert index.tags == {f"n-{i}": ("rare",) for i in range(3)}


def test_a_tag_stands_for_the_names_that_contain_it():
    tags = {
        "red-apple": ("apple", "fruit"),
        "green-apple": ("apple",),
        "pie": ("apple", "dessert"),
        "apple-pie-x": (),
    }
    index = ImageIndex(ImageRecord(name=name, style="noto", tags=own) for name, own in tags.items())
    assert index.tags == {"red-apple": ("apple", "fruit"), "green-apple": ("apple",), "pie": ("dessert",)}


def test_words_that_state_facts_stand_for_no_name():
    rows = [
        ImageRecord(name="tangerine", style="noto", label="orange", tags=("orange", "two", "citrus")),
        ImageRecord(name="shoe", style="noto", label="flat", tags=("on the left", "blue shoe")),
    ]
    index = ImageIndex(rows)
    assert index.nouns("tangerine") == ("tangerine", "citrus") and index.nouns("shoe") == (
        "shoe",
        "blue shoe",
    )
    assert index.reads_otherwise("blue", "shoe") and not index.reads_otherwise("red", "shoe")


def test_nouns_that_a_reader_would_take_for_others():
    names = ("heart-with-arrow", "blue-heart", "purple-square", "red-square", "house", "houses", "rock")
    index = ImageIndex(
        [
            *(ImageRecord(name=name, style="noto") for name in names),
            ImageRecord(name="horns", style="noto", tags=("rock on", "sign of the horns")),
        ]
    )
    assert index.reads_otherwise("blue", "heart with arrow")
    assert index.reads_otherwise("blue", "hearts with arrow")  # "blue hearts" is a plural
    assert not index.reads_otherwise("red", "heart with arrow")
    assert index.reads_otherwise("purple", "square") and index.reads_otherwise("purple", "squares")
    assert not index.reads_otherwise("purple", "houses")
    assert index.names_other("houses", "house") and not index.names_other("houses", "houses")
    assert not index.names_other("homes", "house")
    assert index.tags == {"horns": ("sign of the horns",)}


def test_a_label_that_is_another_name_is_not_used():
    rows = [
        ImageRecord(name="bear-face", style="noto", label="bear"),
        ImageRecord(name="bear", style="noto", label="bear"),
        ImageRecord(name="ring", style="noto", label="hoop"),
    ]
    assert ImageIndex(rows).labels == {"ring": "hoop"}


def test_rows_of_a_name(drawn):
    styles = [drawn.index[i].style for i in drawn.index.rows_of["ring"]]
    assert styles == ["noto", "fluent", "twemoji"] and set(drawn.index.rows_of) == set(drawn.index.names())


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
    rows = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    (folder / "index.json").write_text(json.dumps(rows[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match="18 images but 17 rows"):
        EmojiData.open(folder)
    np.save(folder / "pictures.npy", np.zeros((17, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(N, P, P, 4\)"):
        EmojiData.open(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pictures.npy", b"", r"pictures\.npy': no NumPy array"),
        ("pictures.npy", b"\x93NUMPY damaged", r"pictures\.npy': no NumPy array"),
        ("index.json", b"[{", r"index\.json': no JSON"),
        ("index.json", b"{}", r"index\.json': expected a list of rows, got \{\}"),
        ("index.json", b'[{"style": "noto"}]', r"index\.json': row 0: missing key 'name'"),
        ("index.json", b'[{"name": "cat", "style": "nota"}]', r"row 0\.style: 'nota'; did you mean 'noto'"),
        (
            "index.json",
            b'[{"name": "", "style": "noto"}]',
            r"index\.json': row 0: name: expected words, got ''",
        ),
        ("index.json", b'[{"name": "cat", "style": "noto", "held": 1}]', r"row 0: unknown key 'held'"),
        ("index.json", b'[{"name": "cat", "style": "noto", "tags": 1}]', r"row 0\.tags: expected a list"),
        ("manifest.json", b"[]", r"manifest\.json'"),
    ],
)
def test_damaged_files_are_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        EmojiData.open(folder)


def test_a_data_set_without_images_is_refused(folder):
    np.save(folder / "pictures.npy", np.zeros((0, 64, 64, 4), np.uint8))
    (folder / "index.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"with at least one image, got uint8 \(0, 64, 64, 4\)"):
        EmojiData.open(folder)
