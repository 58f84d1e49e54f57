"""Check the documentation: links, paths, names, commands and code."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from ldm.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    + [*(ROOT / "ldm" / "assets").rglob("*.md")]
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HISTORY = "CHANGELOG.md"  # names files and modules that no longer exist
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
LINK = re.compile(r"\]\(([^)\s]+)\)|href=\"([^\"]+)\"|src=\"([^\"]+)\"")
REPOSITORY_PATH = re.compile(
    r"(?:ldm|docs|tests|benchmarks|notebooks|configs)/[\w./-]*\w|[A-Z]+\.md|\.ci/run"
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def text_of(path: Path) -> str:
    """Return the Markdown of a page, or of a notebook's Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def prose_of(path: Path) -> str:
    """Return the text without fenced code."""
    return CODE_BLOCK.sub("", text_of(path))


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE)}


def inline_code(path: Path) -> list[str]:
    return [re.sub(r"\s+", " ", code) for code in INLINE_CODE.findall(prose_of(path))]


def resolve(name: str) -> object:
    """Return the object of a dotted name below ldm; raise AttributeError if there is none."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=relative)
def test_links_resolve(path):
    for groups in LINK.findall(prose_of(path)):
        target = next(filter(None, groups))
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{relative(path)} links to {target}, which does not exist"
        assert linked.is_relative_to(ROOT), f"{relative(path)} links to {target} outside the repository"
        if anchor:
            assert anchor in anchors(linked), f"{relative(path)} links to {target}: no such heading"


@pytest.mark.parametrize("path", [p for p in [*PAGES, *NOTEBOOKS] if p.name != HISTORY], ids=relative)
def test_paths_named_in_the_text_exist(path):
    for code in inline_code(path):
        if REPOSITORY_PATH.fullmatch(code):
            assert (ROOT / code).exists(), f"{relative(path)} names {code}, which does not exist"


@pytest.mark.parametrize("path", [p for p in [*PAGES, *NOTEBOOKS] if p.name != HISTORY], ids=relative)
def test_modules_and_functions_named_in_the_text_exist(path):
    for code in inline_code(path):
        for name in re.findall(r"^(ldm(?:\.\w+)+)(?=$|\(|\[)", code):
            try:
                resolve(name)
            except AttributeError:
                raise AssertionError(f"{relative(path)} names {name}, which does not exist") from None


def test_modules_that_the_changelog_points_to_exist():
    table = (ROOT / HISTORY).read_text(encoding="utf-8").split("### What moved where")[1]
    rows = [row.strip("| ").split(" | ", 1) for row in table.splitlines() if row.startswith("| `ldm")]
    assert rows
    for _, new in rows:
        for name in re.findall(r"`(ldm\.[\w.]+)`", new):
            importlib.import_module(name)


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_scripts_named_in_the_text_have_the_options_named(path):
    for code in inline_code(path):
        match = re.match(r"(?:python )?(?:benchmarks/)?(\w+\.py)((?: .*)?)$", code)
        if not match:
            continue
        scripts = [ROOT / folder / match[1] for folder in ("benchmarks", "notebooks") if match[0]]
        script = next((file for file in scripts if file.exists()), None)
        if script is None:
            assert not match[2], f"{relative(path)} names the script {match[1]}, which does not exist"
            continue
        source = script.read_text(encoding="utf-8") + (ROOT / "benchmarks" / "common.py").read_text(
            encoding="utf-8"
        )
        source += (ROOT / "benchmarks" / "text_to_image.py").read_text(encoding="utf-8")  # shares its options
        for flag in re.findall(r"--[\w-]+", match[2]):
            assert f'"{flag}"' in source, f"{relative(path)}: {match[1]} has no option {flag}"


def commands_of(path: Path) -> list[list[str]]:
    """Return the command lines of `ldm` in a page, from inline code and shell blocks, split into words."""
    blocks = [code for language, code in CODE_BLOCK.findall(text_of(path)) if language == "bash"]
    lines = [line for block in blocks for line in re.split(r"\n|&&", block.replace("\\\n", " "))]
    return [
        shlex.split(code)[1:] for code in map(str.strip, [*lines, *inline_code(path)]) if code[:4] == "ldm "
    ]


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=relative)
def test_commands_named_in_the_text_exist(path):
    """Placeholders are in capitals; anything that is not one word is a prompt."""
    commands = {name: command for command in COMMANDS for name in (command.name, *command.aliases)}
    for words in commands_of(path):
        if " ".join(words[:2]) in commands:
            words = [" ".join(words[:2]), *words[2:]]
        elif not re.fullmatch(r"[a-z-]+", words[0]) or words[0].startswith("-"):
            words = ["generate", *words]
        assert words[0] in commands, f"{relative(path)} names the command {words[0]!r}, which does not exist"
        options = {"--help", "-h", *commands[words[0]].parser()._option_string_actions}
        for word in words[1:]:
            if word.startswith("-") and len(word) > 2 or word == "-o":
                assert word in options, f"{relative(path)}: ldm {words[0]} has no option {word}"


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_python_code_compiles(path):
    for language, code in CODE_BLOCK.findall(text_of(path)):
        if language == "python" and not code.startswith("sampler(denoise"):  # a signature
            compile(code, relative(path), "exec")


def test_readme_has_at_most_700_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    """Execute every Python block; the one built by hand asserts equality with the pipeline itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # which a file that is read belongs to
    blocks = [
        code for language, code in CODE_BLOCK.findall(text_of(ROOT / "README.md")) if language == "python"
    ]
    assert blocks
    namespace: dict[str, object] = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), namespace)
    image = namespace["image"]
    assert isinstance(image, torch.Tensor) and image.shape == (1, 3, 128, 128)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["architecture", "samplers", "editing", "unclip", "speed"])
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    """Execute the blocks of the pages that need no weights of others."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for language, code in CODE_BLOCK.findall(text_of(ROOT / "docs" / f"{page}.md")):
        if language == "python" and not code.startswith("sampler(denoise"):
            exec(compile(code, page, "exec"), namespace)
