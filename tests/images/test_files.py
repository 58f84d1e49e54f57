"""Image files: each format carries the recipe, and what cannot be written is refused before sampling."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import in_fresh_process, kill_at_random
from PIL import Image

from ldm.images.files import check_writable, read_recipe, write_image
from ldm.images.result import Images

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".JPG")
RECIPE = {
    "prompt": "ein Apfel 🍎 }",
    "seed": [0],
    "guidance": 2.5,
    "negative": None,
    "weights": {"unet": "0"},
}


def smooth_images(n: int = 1) -> Images:
    """Return images that lossy formats hardly change."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 48), indexing="ij")
    tensor = torch.stack([x, y, 1 - x])[None].repeat(n, 1, 1, 1)
    return Images(tensor=tensor, seeds=tuple(range(n)), prompts=("x",) * n, recipe=RECIPE)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_format_carries_the_recipe(tmp_path, suffix):
    made, path = smooth_images(2), tmp_path / f"a{suffix}"
    assert made.save(path) == [path] and read_recipe(path) == RECIPE
    first, second = made.save(tmp_path / f"b{suffix}", separate=True)
    assert read_recipe(second) == {**RECIPE, "index": 1}
    assert first.name == f"b-0{suffix}" and second.name == f"b-1{suffix}"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, first.name, second.name])


@pytest.mark.parametrize(("suffix", "error"), [(".png", 0), (".jpg", 4), (".webp", 8)])
def test_pixels_are_exact_in_png_and_close_in_lossy_formats(tmp_path, suffix, error):
    made = smooth_images()
    (path,) = made.save(tmp_path / f"a{suffix}")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(pixels - made.numpy()[0]).max() <= error


@pytest.mark.parametrize(("suffix", "name"), [(".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP")])
def test_the_suffix_selects_the_format(tmp_path, suffix, name):
    (path,) = smooth_images().save(tmp_path / f"a{suffix}")
    with Image.open(path) as image:
        assert image.format == name


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_lower_quality_makes_a_smaller_file(tmp_path, suffix):
    noise = Images(tensor=torch.rand(1, 3, 64, 64), seeds=(0,), prompts=("",))
    sizes = [
        noise.save(tmp_path / f"{quality}{suffix}", quality=quality)[0].stat().st_size
        for quality in (10, 50, None, 100)
    ]
    assert sizes == sorted(set(sizes))
    for wrong in (0, 101, 50.5):
        with pytest.raises(ValueError, match=f"from 1 to 100, got {wrong}"):
            noise.save(tmp_path / f"a{suffix}", quality=wrong)
    with pytest.raises(ValueError, match=r"quality 50: .*a\.png' is a PNG, which is lossless"):
        noise.save(tmp_path / "a.png", quality=50)


def test_jpeg_keeps_the_resolution_of_colors(tmp_path):
    stripes = torch.zeros(1, 3, 16, 16)
    stripes[:, 0, :, ::2] = 1
    stripes[:, 2, :, 1::2] = 1  # red and blue columns of one pixel, which chroma subsampling would mix
    (path,) = Images(tensor=stripes, seeds=(0,), prompts=("",)).save(tmp_path / "a.jpg")
    pixels = np.asarray(Image.open(path)).astype(int)
    assert np.abs(pixels - (stripes[0] * 255).permute(1, 2, 0).numpy()).max() < 40


@pytest.mark.parametrize("length", [60_000, 65_489, 65_490, 65_600, 131_100, 1_000_000])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_recipes_of_any_length_are_kept(tmp_path, suffix, length):
    """A segment of a JPEG has at most 64 KiB; a PNG's text and WebP's EXIF have no limit."""
    image, recipe = smooth_images().pil()[0], {"prompt": "é" + "x" * length}
    write_image(tmp_path / f"a{suffix}", image, recipe)
    assert read_recipe(tmp_path / f"a{suffix}") == recipe
    with Image.open(tmp_path / f"a{suffix}") as opened:
        assert opened.size == image.size and opened.convert("RGB").getpixel((0, 0))[2] > 240


def test_a_recipe_without_one_of_its_comments_is_none(tmp_path):
    path = tmp_path / "a.jpg"
    write_image(path, smooth_images().pil()[0], {"prompt": "x" * 200_000})
    whole = path.read_bytes()
    start = whole.index(b"ldm 2/4 ") - 4  # the marker and the length
    assert whole[start : start + 4] == b"\xff\xfe\xff\xf9"
    path.write_bytes(whole[:start] + whole[start + 2 + 0xFFF9 :])
    with pytest.raises(ValueError, match="no recipe inside"):
        read_recipe(path)
    assert Image.open(path).size == (48, 32)


def test_a_recipe_that_no_reader_would_take_is_refused(tmp_path):
    for suffix in (".png", ".jpg", ".webp"):
        with pytest.raises(ValueError, match="the recipe has 17000014 bytes, expected at most 16777216"):
            write_image(tmp_path / f"a{suffix}", Image.new("RGB", (8, 8)), {"prompt": "x" * 17_000_000})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "most"), [(".webp", 16_383), (".jpg", 65_500)])
def test_a_side_that_a_format_cannot_hold_is_refused(tmp_path, suffix, most):
    write_image(tmp_path / f"a{suffix}", Image.new("RGB", (most, 2)), {})
    with pytest.raises(
        ValueError, match=rf"{most + 1}×2 pixels, .* has at most {most}; use \.png, or write the"
    ):
        write_image(tmp_path / f"b{suffix}", Image.new("RGB", (most + 1, 2)), {})
    write_image(tmp_path / "b.png", Image.new("RGB", (most + 1, 2)), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"a{suffix}", "b.png"])


def test_separate_files_are_all_checked_before_the_first(tmp_path):
    name = "x" * 249
    with pytest.raises(ValueError, match="expected a file name of at most 255 bytes"):
        smooth_images(12).save(tmp_path / f"{name}.png", separate=True)
    (tmp_path / "a-1.png").mkdir()
    with pytest.raises(IsADirectoryError):
        smooth_images(2).save(tmp_path / "a.png", separate=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a-1.png"]


def test_what_cannot_be_written_is_refused(tmp_path):
    for name in ("a.bmp", "a", ".png"):
        with pytest.raises(ValueError, match=r"ends in \.png, \.jpg, \.jpeg or \.webp"):
            check_writable(tmp_path / name)
    with pytest.raises(ValueError, match=r"ends in \.gif$"):
        check_writable(tmp_path / "a.png", (".gif",))
    with pytest.raises(FileNotFoundError, match="no folder"):
        check_writable(tmp_path / "none" / "a.png")
    (tmp_path / "d.webp").mkdir()
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path / "d.webp")
    with pytest.raises(PermissionError, match="cannot be written"):
        check_writable("/proc/a.png")


def test_webp_needs_a_pillow_that_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: name != "webp")
    with pytest.raises(ValueError, match=r"no WebP; choose \.png or \.jpg"):
        check_writable(tmp_path / "a.webp")
    assert check_writable(tmp_path / "a.jpg") == tmp_path / "a.jpg"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_file_without_a_recipe_is_refused(tmp_path, suffix):
    plain = Image.new("RGB", (16, 16))
    plain.save(tmp_path / f"plain{suffix}")
    exif = Image.Exif()
    exif[0x8769] = {0x9286: b"ASCII\0\0\0a comment of another program"}
    plain.save(tmp_path / f"comment{suffix}", exif=exif)
    for name in ("plain", "comment"):
        with pytest.raises(ValueError, match="no recipe inside"):
            read_recipe(tmp_path / f"{name}{suffix}")
    (tmp_path / f"not{suffix}").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a readable image"):
        read_recipe(tmp_path / f"not{suffix}")
    with pytest.raises(FileNotFoundError):
        read_recipe(tmp_path / f"absent{suffix}")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    (path,) = smooth_images().save(tmp_path / f"cut{suffix}")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"cut{suffix}"):
        read_recipe(path)


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_damaged_recipe_is_refused(tmp_path, monkeypatch, suffix, text):
    monkeypatch.setattr("ldm.images.files.json.dumps", lambda *_, **__: text)
    write_image(tmp_path / f"a{suffix}", Image.new("RGB", (16, 16)), {})
    with pytest.raises(ValueError, match="the recipe in .*(is not valid JSON|expected a mapping)"):
        read_recipe(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_the_exif_comment_is_json_for_other_programs(tmp_path, suffix):
    write_image(tmp_path / f"a{suffix}", Image.new("RGB", (16, 16)), {"prompt": "é"})
    with Image.open(tmp_path / f"a{suffix}") as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b'ASCII\0\0\0{"ldm": {"prompt": "\\u00e9"}}'


def noise(seed: int) -> Images:
    g = torch.Generator().manual_seed(seed)
    return Images(tensor=torch.rand(1, 3, 64, 64, generator=g), seeds=(seed,), prompts=("",))


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_threads_save_four_hundred_images(tmp_path):
    """Half of them under one name, and half under their own."""
    made = [noise(seed) for seed in range(4)]
    common = tmp_path / "common.png"

    def save(i: int) -> None:
        made[i % 4].save(common if i % 2 else tmp_path / f"{i}.png")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(400)))
    assert len(list(tmp_path.iterdir())) == 201
    own = [each.numpy()[0] for each in made]
    assert all((pixels_of(tmp_path / f"{i}.png") == own[i % 4]).all() for i in range(0, 400, 2))
    assert any((pixels_of(common) == each).all() for each in own)


def kill_while_saving(folder: str, kills: int) -> list[str]:
    """Kill processes that save images over each other; return the names in the folder at the end."""
    path, made = Path(folder) / "a.png", [noise(seed) for seed in range(3)]
    own = [each.numpy()[0] for each in made]
    made[0].save(path)

    def save_on() -> None:
        while True:
            for each in made:
                each.save(path)

    def check() -> None:
        assert any((pixels_of(path) == each).all() for each in own)

    kill_at_random(save_on, kills, 0.05, check)
    in_fresh_process(Path(__file__), "save_once", folder)
    return sorted(each.name for each in Path(folder).iterdir())


def save_once(folder: str) -> bool:
    """Save an image, which removes what killed processes left."""
    noise(0).save(Path(folder) / "a.png")
    return True


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_one_image_or_the_other(tmp_path, kills):
    assert in_fresh_process(Path(__file__), "kill_while_saving", str(tmp_path), kills) == ["a.png"]
