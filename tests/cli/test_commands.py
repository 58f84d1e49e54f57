"""The command line on a tiny model: prompts, replay, tools and errors."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.__main__ import main
from ldm.images.files import read_recipe


@pytest.fixture(autouse=True)
def work_folder(tmp_path, monkeypatch):
    ldm.save(tiny_model(), tmp_path / "assets" / "emoji-ldm")
    monkeypatch.setattr("ldm.catalog.lookup.ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_prompt_becomes_a_png_with_its_recipe(capsys):
    assert main(["a red apple", "-o", "apple.png", "--seed", "3", "--steps", "5", "--size", "32x48"]) == 0
    assert capsys.readouterr().out.strip() == "apple.png"
    recipe = read_recipe("apple.png")
    assert pixels("apple.png").shape == (48, 32, 3)
    assert (recipe["prompt"], recipe["seed"], recipe["steps"], recipe["model"]) == (
        "a red apple",
        [3],
        5,
        "emoji-ldm",
    )
    assert recipe["weights"] and recipe["versions"]["torch"]


def test_several_images_make_a_grid_or_files():
    assert main(["cat", "-o", "a.png", "--n", "4"]) == 0
    assert pixels("a.png").shape == (64, 64, 3)
    assert main(["cat", "-o", "b.png", "--n", "4", "--separate"]) == 0
    assert (pixels("b-3.png") == pixels("a.png")[32:, 32:]).all()


@pytest.mark.parametrize(
    "options",
    [[], ["--sampler", "ddpm"], "--sampler ddim --dtype float32 --negative apple --guidance 1.5".split()],
)
def test_replay_reproduces_the_pixels_exactly(options):
    assert main(["a red apple", "-o", "a.png", "--n", "2", "--seed", "5", *options]) == 0
    assert main(["replay", "a.png"]) == 0
    assert (pixels("a.png") == pixels("a-replay.png")).all()
    assert read_recipe("a.png") == read_recipe("a-replay.png")


def test_replay_of_one_file_of_several():
    assert main(["cat", "-o", "a.png", "--n", "3", "--separate"]) == 0
    assert main(["replay", "a-1.png", "-o", "again.png"]) == 0
    assert (pixels("a-1.png") == pixels("again.png")).all()


def test_replay_refuses_other_weights(tmp_path, capsys):
    import torch

    assert main(["cat", "-o", "a.png"]) == 0
    other = tiny_model()
    with torch.no_grad():
        other.denoiser.net.conv_in.bias.add_(1)
    ldm.save(other, tmp_path / "assets" / "emoji-ldm")
    assert main(["replay", "a.png"]) == 2 and "other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["cat"], "cat"),
        (["generate", "cat"], "cat"),
        (["text-to-image", "cat"], "cat"),
        (["--n", "1", "cat"], "cat"),
        ([""], ""),
        (["--", "inpaint"], "inpaint"),
        (["generate", "inpaint"], "inpaint"),
        (["generate", "generate"], "generate"),
        (["--seed", "0", "train"], "train"),
    ],
)
def test_a_bare_prompt_is_short_for_generate(arguments, prompt):
    *start, last = arguments
    assert main(["-o", "a.png", *arguments] if start == ["--"] else [*arguments, "-o", "a.png"]) == 0
    recipe = read_recipe("a.png")
    assert recipe["prompt"] == prompt and recipe["task"] == "text_to_image"


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp"])
def test_replay_reads_each_format_and_writes_the_same(suffix, capsys):
    assert main(["red apple", "-o", f"a.{suffix}", "--seed", "2"]) == 0
    assert main(["replay", f"a.{suffix}"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"a.{suffix}", f"a-replay.{suffix}"]
    assert Path(f"a.{suffix}").read_bytes() == Path(f"a-replay.{suffix}").read_bytes()
    assert main(["replay", f"a.{suffix}", "-o", "exact.png"]) == 0
    assert main(["red apple", "-o", "b.png", "--seed", "2"]) == 0
    assert (pixels("exact.png") == pixels("b.png")).all()  # the pixels before compression


def test_quality_is_an_option_of_the_lossy_formats():
    for name, quality in (("a.jpg", "10"), ("b.jpg", "95"), ("c.jpg", "100")):
        assert main(["cat", "-o", name, "--quality", quality]) == 0
    assert main(["cat", "-o", "default.jpg"]) == 0 and main(["replay", "c.jpg", "--quality", "10"]) == 0
    sizes = [Path(name).stat().st_size for name in ("a.jpg", "b.jpg", "c.jpg")]
    assert sizes == sorted(set(sizes))
    assert Path("default.jpg").read_bytes() == Path("b.jpg").read_bytes()
    assert Path("c-replay.jpg").read_bytes() == Path("a.jpg").read_bytes()


def test_unknown_words_are_named_on_standard_error(capsys):
    assert main(["purple zeppelin", "-o", "a.png"]) == 0
    assert "warning: emoji-ldm has never seen 'purple', 'zeppelin'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cat", "-o", "none/a.png"], "no folder 'none'"),
        (["cat", "-o", "a.bmp"], "'a.bmp': expected a file name that ends in .png, .jpg, .jpeg or .webp"),
        (["cat", "--quality", "50"], "'ldm.png' is a PNG, which is lossless"),
        (
            ["cat", "-o", "a.jpg", "--quality", "101"],
            "quality: expected a whole number from 1 to 100, got 101",
        ),
        ([], 'expected a prompt or a command, such as ldm "a red apple" (see `ldm --help`)'),
        (["cat", "--colour"], "unrecognized arguments: --colour (see `ldm generate --help`)"),
        (
            ["inpant", "cat", "a.png"],
            "arguments: cat a.png (see `ldm generate --help`); did you mean the command 'inpaint'?",
        ),
        (["inpaint", "cat"], "arguments are required: image, mask (see `ldm inpaint --help`)"),
        (["cat", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["cat", "--size", "1x2x3"], "'1x2x3': expected SIDE or WIDTHxHEIGHT in pixels"),
        (["cat", "--device", "abacus"], "device 'abacus' is not available"),
        (["train", "absent.yaml", "--device", "abacus"], "device 'abacus' is not available"),
        (["replay", "absent.webp"], "absent.webp"),
        (["cat", "--n", "0"], "at least 1, got 0"),
        (["cat", "--steps", "0"], "from 1 to 1000"),
        (["cat", "--steps", "1001"], "from 1 to 1000"),
        (["cat", "--size", "33"], "expected a multiple of 4"),
        (["cat", "--sampler", "dimm"], "did you mean 'ddim'"),
        (["cat", "--model", "emoji"], "did you mean 'emoji-ldm'"),
        (["cat", "--weights", "nowhere"], "nowhere"),
        (
            ["cat", "--model", "taesd", "--weights", "random"],
            "'taesd' is a single network, which generates no images",
        ),
        (["cat", "--dtype", "int3"], "dtype 'int3'"),
        (["replay", "absent.png"], "absent.png"),
        (["train", "absent.yaml"], "absent.yaml"),
        (["inspect", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_wrong_input_is_one_line_on_standard_error_and_writes_no_file(arguments, message, capsys, tmp_path):
    before = set(tmp_path.rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (
        message in captured.err
        and captured.err.startswith("error: ")
        and captured.err.count("\n") == 1
        and not captured.out
    )
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [["-o", "none/a.png"], ["-o", "a.bmp"], ["-o", "a"], ["--quality", "50"]], ids=" ".join
)
def test_an_output_is_checked_before_the_model_is_loaded(monkeypatch, arguments):
    monkeypatch.setattr("ldm.registry.loading.load", lambda *_, **__: pytest.fail("loaded"))
    assert main(["cat", *arguments]) == 2


@pytest.mark.parametrize("arguments", [["cat", "--separate"], ["cat", "--separate", "--n", "11"]])
def test_a_name_that_a_seed_makes_too_long_is_refused_before_the_model_is_loaded(
    monkeypatch, capsys, arguments
):
    monkeypatch.setattr("ldm.registry.loading.load", lambda *_, **__: pytest.fail("loaded"))
    longest = 255 - len(".png") - len("-10" if "11" in arguments else "-0")
    assert main([*arguments, "-o", "x" * (longest + 1) + ".png"]) == 2
    assert "expected a file name of at most 255 bytes" in capsys.readouterr().err


def test_images_that_cannot_be_written_in_the_end_are_written_elsewhere(monkeypatch, capsys, tmp_path):
    """The folder is removed while the images are generated."""
    (tmp_path / "out").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    save = ldm.Images.save

    def late(images, path, **options):
        if Path(path).parent.name == "out":
            (tmp_path / "out").rmdir()
        return save(images, path, **options)

    monkeypatch.setattr(ldm.Images, "save", late)
    assert main(["a red apple", "-o", "out/a.jpg", "--n", "2"]) == 2
    error = capsys.readouterr().err
    (saved,) = (tmp_path / "temporary").rglob("*.png")
    assert error == f"error: 'out/a.jpg': there is no folder 'out'; the images are in {str(saved)!r}\n"
    assert pixels(saved).shape == (32, 64, 3) and read_recipe(saved)["prompt"] == "a red apple"


def test_models_grid_and_inspect_print_their_report(capsys, tmp_path):
    assert main(["models"]) == 0 and main(["grid", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "\nemoji-ldm: " in out and "dpmpp_2m: 3 steps, 3 evaluations" in out
    assert main(["inspect", str(tmp_path / "assets" / "emoji-ldm" / "unet.safetensors")]) == 0
    assert "float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate memory"),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_an_error_of_the_library_is_one_line(error, message, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("ldm.registry.loading.load", fail)
    assert main(["cat"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("ldm.registry.loading.load", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["cat"])


def test_an_interruption_ends_with_status_130(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ldm.registry.loading.load", interrupt)
    assert main(["cat"]) == 130 and capsys.readouterr().err == "interrupted\n"


def test_warnings_are_shown_as_before_afterwards():
    shown = warnings.showwarning
    assert main(["cat", "-o", "a.png"]) == 0 and warnings.showwarning is shown


def test_a_reader_that_ends_early_is_not_an_error():
    command = f"{sys.executable} -m ldm models | head -1; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        encoding="utf-8",
        cwd=Path(__file__).parents[2],
        check=True,
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == 2 and lines[1] in ("0", "141") and ran.stderr == ""
