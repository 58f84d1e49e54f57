"""The lower bounds of dependencies exclude releases with published advisories, and admit those installed."""

from __future__ import annotations

import ast
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

SETUP = Path(__file__).parents[1] / "setup.py"
# the last release that an advisory names which concerns this library
AFFECTED = {
    "torch": "2.10.0",  # CVE-2026-4538; CVE-2026-24747 up to 2.9.1, CVE-2025-32434 up to 2.5.1
    "pillow": "12.2.0",  # CVE-2026-55798, CVE-2026-59197 to 59200; CVE-2026-25990 up to 12.1.0
    "tqdm": "4.66.2",  # CVE-2024-34062
    "PyYAML": "5.3.1",  # CVE-2020-14343
    "numpy": "1.22.1",  # CVE-2021-41495
    "huggingface_hub": "0.13.3",  # files written outside the cache on Windows
}
AFFECTED_EXTRAS = {"datasets": "5.0.0"}  # PYSEC-2026-3716


def requirements() -> list[Requirement]:
    """Return what `install_requires` in setup.py lists."""
    for node in ast.walk(ast.parse(SETUP.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return [Requirement(text) for text in ast.literal_eval(node.value)]
    raise AssertionError("no install_requires")


def extras() -> list[Requirement]:
    """Return what `extras_require` in setup.py lists."""
    for node in ast.walk(ast.parse(SETUP.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            lists = [each for each in ast.walk(node) if isinstance(each, ast.List)]
            texts = [each.value for found in lists for each in found.elts if isinstance(each, ast.Constant)]
            return [Requirement(text) for text in texts]
    raise AssertionError("no extras_require")


@pytest.mark.parametrize("name", AFFECTED_EXTRAS)
def test_bounds_of_extras(name: str) -> None:
    found = [each for each in extras() if each.name == name]
    assert found and not any(each.specifier.contains(AFFECTED_EXTRAS[name]) for each in found)


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_bounds(requirement: Requirement) -> None:
    assert requirement.specifier, "expected a lower bound"
    if requirement.name in AFFECTED:
        assert not requirement.specifier.contains(AFFECTED[requirement.name])
    if requirement.marker is None or requirement.marker.evaluate():
        assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_every_advisory_belongs_to_a_requirement() -> None:
    assert AFFECTED.keys() <= {requirement.name for requirement in requirements()}


def test_the_readme_states_the_lower_bound_of_torch() -> None:
    (torch,) = (each for each in requirements() if each.name == "torch")
    readme = (SETUP.parent / "README.md").read_text(encoding="utf-8")
    assert f"Any torch from {str(torch.specifier).removeprefix('>=')} works" in readme
