"""Image files from anywhere: limits before decoding, known formats, and one class of errors."""

from __future__ import annotations

import ast
import io
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.images.files import read_recipe
from ldm.images.opening import MAX_PIXELS, READ_FORMATS, check_pixels, decode_image
from ldm.images.pixels import to_pixels
from ldm.support.files import BoundedFile


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bytes(width: int, height: int, *chunks: bytes) -> bytes:
    """Return a black gray PNG of one bit per pixel; the chunks are put before its pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(height * (1 + -(-width // 8))), 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


@pytest.fixture
def undecoded(monkeypatch):
    """Fail if any pixels are decoded."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))


@pytest.mark.parametrize(("width", "height"), [(15_000, 15_000), (8192, 8193), (MAX_PIXELS + 1, 1)])
@pytest.mark.parametrize("read", [to_pixels, read_recipe])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path, undecoded, read, width, height
):
    (path := tmp_path / "large.png").write_bytes(png_bytes(width, height))
    with pytest.raises(ValueError, match=rf"large\.png' is not a readable image: .*{width * height}"):
        read(path)


def test_the_limit_holds_in_memory_and_a_variable_sets_another(tmp_path, monkeypatch):
    (path := tmp_path / "a.png").write_bytes(png_bytes(20, 10))
    images = (path, Image.new("L", (20, 10)), np.zeros((10, 20)), torch.zeros(3, 10, 20), [path])
    monkeypatch.setenv("LDM_MAX_PIXELS", "200")
    assert all(to_pixels(image).shape == (1, 3, 10, 20) for image in images)
    monkeypatch.setenv("LDM_MAX_PIXELS", "199")
    for image in images:
        with pytest.raises(ValueError, match=r"20×10 is 200 pixels, expected at most 199; LDM_MAX_PIXELS"):
            to_pixels(image)
    for wrong in ("0", "-1", "many", "1e9", "9" * 30, "٣"):
        monkeypatch.setenv("LDM_MAX_PIXELS", wrong)
        with pytest.raises(ValueError, match="LDM_MAX_PIXELS: expected a positive whole number, got"):
            check_pixels(1, 1)
    monkeypatch.setenv("LDM_MAX_PIXELS", "")
    check_pixels(MAX_PIXELS, 1)


@pytest.mark.parametrize("name", READ_FORMATS)
def test_the_documented_formats_are_read(tmp_path, name):
    Image.new("RGB", (4, 2), "white").save(tmp_path / "image", format=name)
    assert torch.equal(to_pixels(tmp_path / "image"), torch.ones(1, 3, 2, 4))


@pytest.mark.parametrize("name", ["PPM", "TGA", "PCX", "ICO", "EPS", "PDF"])
def test_other_formats_are_refused(tmp_path, name):
    Image.new("RGB", (4, 2), "white").save(tmp_path / "image", format=name)
    with pytest.raises(ValueError, match="is not a readable image: cannot identify"):
        to_pixels(tmp_path / "image")


@pytest.mark.parametrize("name", ["GIF", "TIFF"])
def test_recipes_are_read_from_the_formats_that_are_written(tmp_path, name):
    Image.new("RGB", (4, 2)).save(tmp_path / "image", format=name)
    with pytest.raises(ValueError, match="is not a readable image: cannot identify"):
        read_recipe(tmp_path / "image")


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_images_is_used_with_a_warning(tmp_path, name):
    frames = [Image.new("RGB", (4, 2), color) for color in ("white", "black", "red")]
    frames[0].save(tmp_path / "image", format=name, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.warns(UserWarning, match="image' holds several images; the first is used") as caught:
        assert torch.equal(to_pixels(tmp_path / "image"), torch.ones(1, 3, 2, 4))
    assert caught[0].filename == __file__


def test_a_tiff_of_many_pages_is_opened_at_once(tmp_path):
    path, buffer = tmp_path / "pages.tiff", io.BytesIO()
    Image.new("RGB", (4, 2), "red").save(buffer, "TIFF")
    data = bytearray(buffer.getvalue())
    start = int.from_bytes(data[4:8], "little")
    end = start + 2 + 12 * int.from_bytes(data[start : start + 2], "little")
    page = bytes(data[start:end])
    for _ in range(20_000):  # each page has the offset of the next one behind its directory
        data[end : end + 4] = len(data).to_bytes(4, "little")
        end = len(data) + len(page)
        data += page + bytes(4)
    path.write_bytes(data)
    begin = time.thread_time()
    with pytest.warns(UserWarning, match="pages.tiff' holds several images; the first is used"):
        assert to_pixels(path)[0, :, 0, 0].tolist() == [1, 0, 0]
    assert time.thread_time() - begin < 1


def compressed_text(key: bytes, size: int) -> bytes:
    return png_chunk(b"zTXt", key + b"\0\0" + zlib.compress(b"a" * size, 9))


@pytest.mark.parametrize("name", [b"IDAT", b"tEXt", b"IEND"])
def test_a_chunk_that_states_gigabytes_takes_no_more_memory_than_the_file(tmp_path, name):
    (path := tmp_path / "a.png").write_bytes(png_bytes(4, 2, struct.pack(">I", 0x7FFFFFFF) + name + bytes(9)))
    with BoundedFile(path) as file:
        assert file.read(4) == path.read_bytes()[:4] and file.read(2**62) == path.read_bytes()[4:]
        assert file.read(5) == file.read() == b"" and file.seek(1) == 1
        assert file.read(None) == path.read_bytes()[1:]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**28, hard))
    try:
        with pytest.raises(ValueError, match=r"a\.png' is not a readable image: (?!.*MemoryError)"):
            to_pixels(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


DAMAGED = {
    "empty": b"",
    "text": b"not an image",
    "header": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "text bomb": png_bytes(4, 2, compressed_text(b"ldm", 50_000_000)),
    "many text bombs": png_bytes(4, 2, *(compressed_text(b"k%d" % i, 1_000_000) for i in range(80))),
    "profile bomb": png_bytes(4, 2, png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000), 9))),
    "raw EXIF": png_bytes(
        4, 2, png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\nzz"))
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused_by_name(tmp_path, kind):
    (path := tmp_path / "damaged.png").write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match=r"^image: '.*damaged\.png' is not a readable image: "):
        to_pixels(path)


@pytest.mark.parametrize("name", READ_FORMATS)
def test_truncated_files_are_refused_by_name(tmp_path, name):
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 50).convert("RGB").save(buffer, format=name)
    for keep in (3, 20, len(buffer.getvalue()) // 2):
        (path := tmp_path / "cut").write_bytes(buffer.getvalue()[:keep])
        with pytest.raises(ValueError, match=r"^image: '.*cut' is not a readable image: "):
            to_pixels(path)


@pytest.mark.parametrize(
    "error",
    [
        SyntaxError("x"),
        struct.error("x"),
        KeyError("x"),
        IndexError(),
        EOFError(),
        MemoryError(),
        OSError(5, "x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_any_class_is_one_of_the_file(tmp_path, monkeypatch, error):
    (path := tmp_path / "a.png").write_bytes(png_bytes(4, 2))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    with pytest.raises(ValueError, match=r"^mask: '.*a\.png' is not a readable image: ."):
        decode_image(path, fail, name="mask")
    with pytest.raises(ValueError, match="^image: ."):
        to_pixels(Image.new("RGB", (4, 2)))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000, '{"n": ' + "9" * 10_000 + "}"])
def test_a_recipe_that_cannot_be_parsed_is_damaged(tmp_path, text):
    chunk = png_chunk(b"iTXt", b"ldm\0\0\0\0\0" + text.encode())
    (path := tmp_path / "a.png").write_bytes(png_bytes(4, 2, chunk))
    with pytest.raises(ValueError, match=r"the recipe in '.*a\.png' is not valid JSON: .{0,300}$"):
        read_recipe(path)


def test_images_with_and_without_opacity_make_a_batch():
    gray, color, clear = Image.new("L", (4, 2), 255), Image.new("RGB", (4, 2)), Image.new("RGBA", (4, 2))
    expected = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 4)
    assert torch.equal(to_pixels([gray, color, clear]), expected)
    assert torch.equal(to_pixels([torch.ones(2, 4), color, clear]), expected)


def test_every_image_file_is_opened_with_the_formats_to_accept():
    """Pillow's readers of other formats are older and less tested."""
    opened, without = 0, []
    for path in Path(ldm.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = [
            each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) and each.module == "PIL"
        ]
        modules = {
            name.asname or name.name for each in imported for name in each.names if name.name == "Image"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"{name}.open" for name in modules}:
                opened += 1
                if not any(keyword.arg == "formats" for keyword in node.keywords):
                    without.append(f"{path}:{node.lineno}")
    assert opened and without == []
