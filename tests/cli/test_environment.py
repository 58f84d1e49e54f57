"""The command line where something is missing or strict: encodings, output, devices, memory, warnings."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.__main__ import main
from ldm.cli.parsing import parse_text
from ldm.images.files import read_recipe

ROOT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def work_folder(tmp_path, monkeypatch):
    ldm.save(tiny_model(), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)


def run(*arguments: str | bytes, python: tuple[str, ...] = (), **environment: str):
    """Run `ldm` in a process of its own, with outputs as bytes."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *python, "-m", "ldm", *arguments],
        capture_output=True,
        env={**os.environ, **own, **environment},
        check=False,
    )


def test_prompts_are_utf8_in_every_locale(work_folder):
    made = run("red äpfel 🍎", "--weights", "tiny", "-o", "ü.png", "--steps", "1", **ASCII)
    assert made.returncode == 0 and made.stdout == "ü.png\n".encode()
    assert read_recipe("ü.png")["prompt"] == "red äpfel 🍎"
    assert rb"never seen '\xe4pfel', '\U0001f34e'" in made.stderr
    made = run("red", "--weights", "tiny", "-o", "é.png", "--steps", "1", PYTHONIOENCODING="ascii")
    assert made.returncode == 0 and made.stdout == b"\\xe9.png\n" and Path("é.png").is_file()


@pytest.mark.parametrize("environment", [{}, ASCII])
def test_bytes_that_are_not_utf8_are_refused(environment):
    made = run(b"red \xff", **environment)
    assert made.returncode == 2 and made.stderr.count(b"\n") == 1
    assert made.stderr.startswith(rb"error: argument prompt: 'red \udcff': expected UTF-8")


def test_surrogates_of_other_texts_stay_as_they_are():
    assert parse_text("\ud800 a") == "\ud800 a"


def test_output_that_cannot_be_written_is_one_line():
    shell = f"{sys.executable} -m ldm models > /dev/full; echo $?"
    made = subprocess.run(["bash", "-c", shell], capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    assert made.stdout == "2\n" and made.stderr == "error: [Errno 28] No space left on device\n"


def test_without_standard_streams_the_status_tells(work_folder):
    for streams, status in (("2>&-", "2"), (">&- 2>&-", "2"), (">/dev/full 2>/dev/full", "2")):
        shell = f"(PYTHONPATH={ROOT} {sys.executable} -m ldm cat --steps 0 {streams}); echo $?"
        made = subprocess.run(["bash", "-c", shell], capture_output=True, encoding="utf-8", check=True)
        assert made.stdout == f"{status}\n" and made.stderr == ""


STRICT = ("-W", "error", "-bb", "-X", "dev", "-X", "warn_default_encoding")


@pytest.mark.parametrize(
    "command",
    [
        ["red apple", "--weights", "tiny", "-o", "a.png", "--steps", "1"],
        ["variations", "in.png", "--weights", "tiny", "-o", "a.webp", "--steps", "1"],
        ["models"],
        ["grid"],
        ["inspect", "tiny"],
        ["train", str(ROOT / "configs" / "emoji-ldm"), "--dry-run"],
        ["--help"],
    ],
    ids=lambda command: command[0],
)
def test_no_warning_is_issued_where_warnings_are_errors(work_folder, command):
    tiny_model().text_to_image("red apple", steps=1, progress=False).save("in.png")
    made = run(*command, python=STRICT)
    assert made.returncode == 0 and made.stderr == b""


def test_a_warning_that_is_an_error_is_one_line(work_folder):
    made = run("zeppelin", "--weights", "tiny", python=("-W", "error"))
    assert made.returncode == 2
    assert made.stderr == b"error: emoji-ldm has never seen 'zeppelin': the image may not show it\n"


def opens_without_encoding(source: str) -> list[int]:
    """Return the lines where a text file is opened in the encoding of the locale."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(key.arg == "encoding" for key in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        modes = [each.value for each in node.args if isinstance(each, ast.Constant)]
        text = isinstance(node.func, ast.Attribute) and name in ("read_text", "write_text")
        text |= isinstance(node.func, ast.Name) and name == "open" and not any("b" in str(m) for m in modes)
        text |= name == "open" and any(mode in ("r", "w", "a", "x") for mode in modes)
        text |= name in ("run", "Popen", "check_output") and any(key.arg == "text" for key in node.keywords)
        found += [node.lineno] * text
    return found


def test_every_text_file_is_opened_with_an_encoding():
    wrong = ["open('a')", "p.read_text()", "p.open('w')", "run(c, text=True)", "p.write_text('b')"]
    assert all(opens_without_encoding(source) for source in wrong)
    files = [
        file for name in ("ldm", "tests", "benchmarks", "notebooks") for file in (ROOT / name).rglob("*.py")
    ]
    found = {str(file): opens_without_encoding(file.read_text(encoding="utf-8")) for file in files}
    assert not {file: lines for file, lines in found.items() if lines}


@pytest.mark.parametrize(
    "device", ["meta", "abacus", "", "hpu", "cuda:99", *(["mps"] if sys.platform != "darwin" else [])]
)
@pytest.mark.parametrize("command", [["cat"], ["train", "absent.yaml"]], ids=lambda command: command[0])
def test_a_device_that_cannot_be_used_is_one_line(command, device, capsys, monkeypatch):
    monkeypatch.setattr("ldm.registry.loading.load", lambda *_, **__: pytest.fail("loaded"))
    assert main([*command, "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: device '{device}' is not available: ") and error.count("\n") == 1


def test_memory_that_is_missing_is_one_line(work_folder, capsys, monkeypatch):
    def exhaust(*_, **__):
        torch.empty(2**60)

    monkeypatch.setattr("ldm.models.unet.UNet.forward", exhaust)
    assert main(["cat", "--weights", "tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "allocate memory" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cat", "--size", "100000"], "100000×100000 is 10000000000 pixels, expected at most 67108864"),
        (["cat", "--steps", "1", "--sampler", "dpm_adaptive", "--spacing", "x"], "unknown spacing 'x'"),
        (["cat", "--n", "100000"], "n: expected a whole number from 1 to 65536, got 100000"),
        (["cat", "--guidance", "nan"], "guidance: expected a finite number, got nan"),
        (["cat", "--seed", "9" * 30], "seed: expected 0 to 2**63"),
        (["a" * 20_000], "expected at most 16384 characters, got 20000"),
        (["image", "cat", ".", "-o", "out.png"], "image: no such file: '.'"),
        (["image", "cat", "x" * 5000, "-o", "out.png"], "File name too long"),
        (["cat", "-o", "."], "expected a file name that ends in"),
        (
            ["edit", "cat", "cat", "--emphasis", "cat=nan"],
            "emphasis of 'cat': expected a finite number, got nan",
        ),
        (["outpaint", "cat", "in.png", "--left", "1000000000"], "expected at most 67108864"),
    ],
)
def test_wrong_values_are_one_line(work_folder, arguments, message, capsys):
    tiny_model().text_to_image("red apple", steps=1, progress=False).save("in.png")
    assert main([*arguments, "--weights", "tiny"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1 and len(error) < 2200


@pytest.mark.parametrize("command", [["image", "cat"], ["variations"]], ids=lambda command: command[0])
def test_an_image_of_225_megapixels_is_one_line(work_folder, command, capsys):
    Image.new("1", (15_000, 15_000)).save("large.png")
    assert main([*command, "large.png", "--weights", "tiny", "-o", "out.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not Path("out.png").exists()
    assert "'large.png' is not a readable image: " in error and "225000000 pixels" in error


FOREIGN = {
    "a folder without code": {"ldm/notes.txt": "of the user"},
    "the modules of another project": {"ldm/util.py": "raise SystemExit(9)", "ldm/models/__init__.py": ""},
    "a package of another project": {"ldm/__init__.py": ""},
    "a module": {"ldm.py": "raise SystemExit(9)"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_called_ldm_beside_the_command(tmp_path, files):
    """The console script and `python -P -m ldm` never look there; `python -m ldm` prefers other packages."""
    for name, text in files.items():
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text(text, encoding="utf-8")
    script = tmp_path / "script"  # what pip writes for the entry point of setup.py
    start = "import sys\nfrom ldm.cli.commands import run_command_line\nsys.exit(run_command_line())\n"
    script.write_text(start, encoding="utf-8")
    works = {"script": [str(script)], "module": ["-m", "ldm"], "safe": ["-P", "-m", "ldm"]}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name, command in works.items():
        if name == "safe" and sys.version_info < (3, 11):
            continue
        made = subprocess.run(
            [sys.executable, *command, "--help"],
            cwd=tmp_path / "work",
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if name == "module" and ("ldm.py" in files or "ldm/__init__.py" in files):
            assert made.stderr.count("\n") <= 1  # Python finds the other code, and this library never runs
        else:
            assert made.returncode == 0 and made.stdout.startswith("usage: ldm"), made.stderr
