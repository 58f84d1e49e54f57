"""What the layout promises: imports point one way, importing is cheap, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ldm"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import those above it, and modules of its own line. Folders stand for all that is in them but
# what is listed by itself: the compiled kernels are built by a file that needs nothing of the library, and
# read weights as well as run networks.
ORDER = [
    "config files device words types fast.build",
    "schedule",
    "grid",
    "prediction",
    "denoiser",
    "guidance",
    "noise",
    "samplers",
    "conventions oracle plan resume",
    "nn",
    "models",
    "weights",
    "cards published unclip_cards published_unclip inspect",
    "images",
    "pipelines",
    "trace likelihood fast",
    "registry",
    "replay",
    "data",
    "training",
    "cli",
    "__main__",
]
RANK = {name: rank for rank, line in enumerate(ORDER) for name in line.split()}


def place(module: str) -> str:
    """The name in ORDER of a dotted module below ldm."""
    return module if module in RANK else module.split(".")[0]


def imports(path: Path) -> list[str]:
    """The modules of ldm that a file imports, wherever in it, below type-checking guards excepted."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldm."):
            found.append(node.module.removeprefix("ldm."))
        elif isinstance(node, ast.Import):
            found += [
                alias.name.removeprefix("ldm.") for alias in node.names if alias.name.startswith("ldm.")
            ]
    return found


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.name != "__init__.py"], ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_imports_point_up_the_list(path):
    own = place(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    assert own in RANK, f"{own} has no place in the list"
    for module in imports(path):
        assert RANK[place(module)] <= RANK[own], f"{path.name} imports ldm.{module}, which stands below it"


def test_samplers_import_types_and_grid_alone():
    for path in (PACKAGE / "samplers").glob("*.py"):
        outside = {place(module) for module in imports(path)} - {"samplers", "types", "grid", "config"}
        assert not outside, f"{path.name} imports {outside}"


@pytest.mark.parametrize("path", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_importing_ldm_does_no_work():
    heavy = ("torch", "open_clip", "torchvision", "PIL", "yaml", "huggingface_hub", "numpy")
    code = f"import sys, ldm; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.strip()
        == "[]"
    )


def test_the_library_imports_no_heavy_package_until_it_needs_one():
    heavy = ("open_clip", "torchvision", "PIL", "yaml", "huggingface_hub", "diffusers", "transformers")
    code = (
        f"import sys, ldm; [getattr(ldm, name) for name in ldm.__all__]; print([m for m in {heavy} if m in"
        " sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
        ).stdout.strip()
        == "[]"
    )


def test_there_are_at_most_25_public_names():
    import ldm

    assert len(ldm.__all__) <= 25 and all(getattr(ldm, name) is not None for name in ldm.__all__)
