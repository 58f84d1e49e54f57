"""The builder of the data set, with packages that the test writes and a stub renderer."""

import hashlib
import io
import json
import sys
import tarfile
import types

import numpy as np
import pytest

from ldm.data import EmojiData, emoji, held_out_image, names, packages


def tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, value in files.items():
            body = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return hashlib.sha256(path.read_bytes()).hexdigest()


ICONS = {
    "prefix": "x",
    "width": 32,
    "height": 32,
    "icons": {
        "red-apple": {"body": "<a/>"},
        "wide": {"body": "<b/>", "width": 64},
        "flag-france": {"body": "<c/>"},
        "womans-hat": {"body": "<d/>"},
    },
    "aliases": {"apple": {"parent": "red-apple"}},
}
ENTRIES = [
    {"label": "red apple", "hexcode": "1F34E", "tags": ["fruit", "Apple"]},
    {"label": "woman’s hat", "hexcode": "1F452-FE0F", "tags": []},
]


def test_which_icons_are_kept():
    assert list(names.kept_icons(ICONS)) == ["red-apple", "womans-hat"]
    for name in (
        "waving-hand-light-skin-tone",
        "a-button",
        "one-oclock",
        "keycap-1",
        "x",
        "7",
        "family-man",
        "couple-with-heart",
        "trade-mark",
        "man-dark",
    ):
        assert names.LEFT_OUT.search(name), name
    for name in ("light-bulb", "cat-face", "moon", "key", "kite"):
        assert not names.LEFT_OUT.search(name), name


def test_svg_documents_carry_the_icons_box():
    icons = {
        "width": 36,
        "height": 36,
        "icons": {"a-b": {"body": "<g/>"}, "c-d": {"body": "<g/>", "width": 20, "height": 20}},
    }
    kept = names.kept_icons(icons)
    assert (
        'viewBox="0 0 36 36"' in kept["a-b"]
        and 'viewBox="0 0 20 20"' in kept["c-d"]
        and kept["a-b"].endswith("><g/></svg>")
    )


def test_labels_are_found_by_code_then_by_spelling():
    table = names.LabelTable(ENTRIES, [{"1f34e": "apple"}, {}])
    assert table.find("apple") == ("red apple", ("fruit", "apple"))
    assert table.find("womans-hat") == ("woman's hat", ())
    assert table.find("unheard-of") == (None, ())


def icon_set(*icons, aliases=None, codes=None):
    return names.IconSet(
        documents=dict.fromkeys(icons, "<svg/>"),
        aliases=aliases or {},
        codes={icon: (code,) for icon, code in (codes or {}).items()},
    )


def test_names_are_unified_by_letters_then_by_code_then_by_alias():
    sets = {
        "noto": icon_set("red-apple", "bear", "pinata", "frog", codes={"bear": "1f43b", "pinata": "1fa85"}),
        "twemoji": icon_set(
            "redapple", "bear-head", "toad", aliases={"old-frog": "toad"}, codes={"bear-head": "1f43b"}
        ),
        "flat": icon_set(
            "bear-face", "frog-face", "zebra", aliases={"bear": "bear-face", "frog": "frog-face"}
        ),
        "emojione": icon_set("old-frog", "bear", "bear-face", aliases={"bear": "bear-face"}),
        "fxemoji": icon_set("redapple", "zebra", "unheard"),
    }
    assert names.unify_names(sets) == {
        "noto": {name: name for name in ("red-apple", "bear", "pinata", "frog")},
        "twemoji": {"red-apple": "redapple", "bear": "bear-head", "toad": "toad"},
        "flat": {"bear": "bear-face", "frog": "frog-face", "zebra": "zebra"},
        # "old-frog" is an alias of toad; "bear" is found by letters, before the alias of "bear-face"
        "emojione": {"toad": "old-frog", "bear": "bear"},
        "fxemoji": {"red-apple": "redapple", "zebra": "zebra"},  # a name that no other set has is left out
    }


def test_icons_are_renamed_by_the_table():
    made = names.unify_names({"noto": icon_set("merman"), "fluent": icon_set("man-merpeople", "piata")})
    assert made["fluent"] == {"merman": "man-merpeople", "pinata": "piata"}


def test_aliases_that_mirror_an_icon_are_ignored():
    icons = {**ICONS, "aliases": {"a": {"parent": "b"}, "b": {"parent": "red-apple"}}}
    icons["aliases"]["mirrored"] = {"parent": "womans-hat", "hFlip": True}
    read = names.IconSet.read(icons, {"1F34E-FE0F": "a", "1F452": "womans-hat"})
    assert read.aliases == {"a": "red-apple", "b": "red-apple"}
    assert read.codes == {"red-apple": ("1f34e",), "womans-hat": ("1f452",)}


def test_misnamed_icons_are_left_out_and_must_exist():
    read = names.IconSet.read(ICONS, {"1f34e": "red-apple"}, {"womans-hat"})
    assert list(read.documents) == ["red-apple"]
    with pytest.raises(ValueError, match=r"got \['unheard'\]"):
        names.IconSet.read(ICONS, {}, {"womans-hat", "unheard"})
    assert {"keyboard", "kiss", "sunglasses", "window"} < names.MISNAMED["fxemoji"]
    assert sorted(style for style, icons in names.MISNAMED.items() if "pistol" in icons) == [
        "emojione",
        "fxemoji",
        "noto-v1",
    ]


def test_an_icon_is_visible_by_the_rms_of_its_contrast_with_white():
    image = np.full((8, 8, 4), 255, np.uint8)
    assert not emoji.is_visible(image)
    for channel, alpha, share, level in [(0, 255, 64, 12), (1, 255, 16, 24), (2, 51, 64, 60)]:
        for difference, expected in ((0, True), (1, False)):  # RMS = level·(alpha/255)·√(share/64) = 12
            image[:] = (255, 255, 255, alpha)
            image.reshape(64, 4)[:share, channel] = 255 - level + difference
            assert emoji.is_visible(image) is expected
    image[:] = (0, 0, 0, 0)  # black, but transparent
    assert not emoji.is_visible(image)


def test_every_style_has_a_pinned_package():
    from ldm.data import STYLES

    assert tuple(packages.ICONS) == STYLES
    hashes = [package.sha256 for package in (*packages.ICONS.values(), packages.LABEL_PACKAGE)]
    assert len({*hashes}) == 8 and all(len(digest) == 64 for digest in hashes)


def test_plain_label():
    assert names.plain_label("“Piñata”: No. 1, T-Shirt") == "pinata no. 1 t-shirt"


def test_a_tarball_with_another_hash_is_refused(tmp_path):
    package = packages.Package(name="@x/y", version="1.0", sha256="0" * 64, licence="MIT")
    tarball(tmp_path / package.file_name, {"icons.json": ICONS})
    with pytest.raises(ValueError, match="expected 0000"):
        packages.fetch(package, tmp_path)


def test_the_error_without_npm_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="npm is needed"):
        packages.fetch(packages.LABEL_PACKAGE, tmp_path)


class SameProcess:
    """The process pool's interface in one process, because other processes do not see the stubs."""

    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def map(self, function, jobs, chunksize):
        return map(function, jobs)


def test_build_writes_what_open_reads(tmp_path, monkeypatch):
    cache = tmp_path / "set-packages"
    cache.mkdir()
    pinned = {}
    for style in ("noto", "fluent", "twemoji"):
        package = packages.Package(name=f"@x/{style}", version="1.0", sha256="", licence="MIT")
        digest = tarball(
            cache / package.file_name, {"icons.json": ICONS, "chars.json": {"1f34e": "red-apple"}}
        )
        pinned[style] = packages.Package(name=f"@x/{style}", version="1.0", sha256=digest, licence="MIT")
    labels = packages.Package(name="labels", version="2.0", sha256="", licence="MIT")
    digest = tarball(cache / labels.file_name, {"en/data.json": ENTRIES})
    monkeypatch.setattr(
        emoji, "LABEL_PACKAGE", packages.Package(name="labels", version="2.0", sha256=digest, licence="MIT")
    )
    monkeypatch.setattr(emoji, "ICONS", pinned)
    monkeypatch.setattr(emoji, "ProcessPoolExecutor", SameProcess)
    monkeypatch.setattr(
        emoji,
        "render_svg",
        lambda svg, size: np.full((size, size, 4), (*[svg.count("<d/>") + 1] * 3, 255), np.uint8),
    )
    monkeypatch.setitem(sys.modules, "resvg_py", types.SimpleNamespace(__resvg_version__="0"))

    manifest = emoji.build_emoji(tmp_path / "set", 16)
    data = EmojiData.open(tmp_path / "set")
    assert data.images.shape == (6, 16, 16, 4) and manifest["counts"] == {
        "noto": 2,
        "fluent": 2,
        "twemoji": 2,
    }
    assert data.index[data.find("womans-hat", "fluent")].label == "woman's hat"
    levels = [data.images[data.find(name)][..., :3].max() for name in ("womans-hat", "red-apple")]
    assert levels == [2, 1]
    assert [row.held_out for row in data.index] == [held_out_image(row.name, row.style) for row in data.index]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "index.json",
        "manifest.json",
        "pictures.npy",
    ]  # no temporary file
    assert (
        manifest["sha256"]["pictures.npy"]
        == hashlib.sha256((tmp_path / "set" / "pictures.npy").read_bytes()).hexdigest()
    )

    white = np.full((16, 16, 4), 255, np.uint8)
    grey = np.full((16, 16, 4), (100, 100, 100, 255), np.uint8)
    monkeypatch.setattr(emoji, "render_svg", lambda svg, size: white if "<d/>" in svg else grey)
    manifest = emoji.build_emoji(tmp_path / "set", 16)  # the woman's hat is white on white
    data = EmojiData.open(tmp_path / "set")
    assert manifest["shape"] == [3, 16, 16, 4] and data.images.shape == (3, 16, 16, 4)
    assert data.index.names() == ["red-apple"] and (data.images == grey).all()

    def fail(svg, size):
        raise ValueError("renderer broke")

    monkeypatch.setattr(emoji, "render_svg", fail)
    with pytest.raises(ValueError, match="renderer broke"):
        emoji.build_emoji(tmp_path / "set", 16)
    with pytest.raises(FileNotFoundError):  # a half-built data set does not open
        EmojiData.open(tmp_path / "set")
    assert not list((tmp_path / "set").glob(".*"))


def test_an_odd_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="size 7"):
        emoji.build_emoji(tmp_path, 7)
