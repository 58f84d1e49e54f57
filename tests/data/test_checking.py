"""`ldm data check`: every image is decoded, every problem is printed, and the contact sheet shows images."""

from __future__ import annotations

from photos import write_broken, write_photos
from PIL import Image

from ldm.cli.commands import run_command_line
from ldm.data.sources.emoji import WholeEmoji


def test_every_problem_is_printed_once_and_the_status_tells_of_broken_files(tmp_path, capsys):
    photos = tmp_path / "photos"
    write_broken(write_photos(photos, 30))
    sheet = tmp_path / "sheet.png"
    assert run_command_line(["data", "check", str(photos), "--size", "32", "--sheet", str(sheet)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "kind: folder",
        "images: 38",
        "unreadable: 6: ",
        "truncated.jpg (",
        "truncated.png (",
        "text.png (it is not an image",
        "empty.png (it is empty)",
        "pipe.png (it is neither a file nor a folder)",
        "too large: 1: giant.png (",
        "too small: 1: one pixel.png (1×1 pixels",
        "several frames: 1: animated.gif",
        "symlink loop: 2: ",
        "caption without an image: 1: alone.txt",
    ):
        assert text in printed, text
    assert Image.open(sheet).width > 500
    assert run_command_line(["data", "check", str(photos), "--size", "32", "--max-broken", "5"]) == 1


def test_a_folder_without_images_is_an_error(tmp_path, capsys):
    assert run_command_line(["data", "check", str(tmp_path)]) == 2
    assert "no image to train on: there is no image file" in capsys.readouterr().err


def test_buckets_are_counted(tmp_path, capsys):
    write_photos(tmp_path, 3)
    write_photos(tmp_path / "wide", 2, width=96, height=40)
    assert run_command_line(["data", "check", str(tmp_path), "--size", "32", "--buckets", "8"]) == 0
    assert "sizes in training: 32×32: 3, 40×24: 2" in capsys.readouterr().out


def test_the_emoji_data_set_is_a_data_set(drawn, shared_folder, capsys):
    dataset = WholeEmoji(drawn)
    assert len(dataset) == 17 and dataset.record(0).captions[0] == "red disc"
    assert dataset.open(0).getpixel((0, 0)) == (255, 255, 255)
    assert run_command_line(["data", "check", str(shared_folder), "--size", "64"]) == 0
    assert "kind: emoji\nimages: 17" in capsys.readouterr().out
