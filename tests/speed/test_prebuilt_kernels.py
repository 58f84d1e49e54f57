"""Kernels that are built with the package: no build at run time, no stale library, no need of a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_stand_in import compile_library

from ldm.speed.kernels import build, prebuilt
from ldm.speed.kernels.choice import kernel_choice
from ldm.speed.kernels.shared_library import write_cached
from ldm.support.processor import processor_sets

ROOT = Path(__file__).parents[2]
FUNCTIONS = "\n".join(f'extern "C" int {name}() {{ return 42; }}' for name in build.FUNCTIONS)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Let the package's folder of libraries, and the cache, be new, and return the set that is chosen."""
    monkeypatch.setattr(prebuilt, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CXX", "/none/g++")
    (tmp_path / "prebuilt").mkdir()
    build.built_library.cache_clear()
    isa = kernel_choice().isa
    if isa is None:
        pytest.skip(kernel_choice().reason)
    yield isa
    build.built_library.cache_clear()


def test_the_library_of_the_package_is_used_without_a_compiler(package, tmp_path):
    made = compile_library(FUNCTIONS, tmp_path / "made.so")
    write_cached(
        tmp_path / "prebuilt" / f"{package.name}.so", prebuilt.prebuilt_key(package), made.read_bytes()
    )
    assert build.library().has_bf16() == 42 and not (tmp_path / "home").exists()


@pytest.mark.parametrize("damage", ["other sources", "truncated", "not a library"])
def test_a_stale_or_damaged_library_is_not_loaded(package, tmp_path, damage):
    made = compile_library(FUNCTIONS, tmp_path / "made.so").read_bytes()
    key = "0" * 64 if damage == "other sources" else prebuilt.prebuilt_key(package)
    path = tmp_path / "prebuilt" / f"{package.name}.so"
    write_cached(path, key, b"text" * 99 if damage == "not a library" else made)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="there is no such program"), pytest.raises(build.NoKernels):
        build.library()


def test_the_key_follows_the_sources_and_the_instruction_set(tmp_path, monkeypatch):
    keys = {prebuilt.prebuilt_key(isa) for isa in processor_sets()}
    shutil.copytree(prebuilt.HERE, tmp_path / "kernels")
    monkeypatch.setattr(prebuilt, "HERE", tmp_path / "kernels")
    assert {prebuilt.prebuilt_key(isa) for isa in processor_sets()} == keys
    (tmp_path / "kernels" / "simd.h").write_text("// new", encoding="utf-8")
    changed = {prebuilt.prebuilt_key(isa) for isa in processor_sets()}
    assert len(keys) == len(changed) == len(processor_sets()) and not keys & changed


PROBE = """
import ldm
from ldm.speed.kernels.ops import CompiledOps
ops = CompiledOps()
assert ldm.__file__.startswith({folder!r}), ldm.__file__
"""


@pytest.mark.slow
def test_an_installed_wheel_builds_nothing_at_run_time(tmp_path):
    """Without a compiler the wheel is built too, for every platform and without libraries."""
    if not prebuilt.can_prebuild() or not processor_sets():
        pytest.skip("no compiler, or no instruction set with kernels")
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "build", "*.egg-info", "data", "runs"))
    names = {}
    for case, compiler in (("with", None), ("without", "/none/g++")):
        env = {name: value for name, value in os.environ.items() if name != "CXX"}
        env |= {"CXX": compiler} if compiler else {}
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "-w", str(tmp_path / case), str(tree)], env=env, check=True)
        shutil.rmtree(tree / "build", ignore_errors=True)
        (wheel,) = (tmp_path / case).glob("*.whl")
        names[case], target = wheel.name, tmp_path / f"{case}-installed"
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(target),
            str(wheel),
        ]
        subprocess.run(install, check=True)
        env |= {"PYTHONPATH": str(target), "LDM_HOME": str(tmp_path / "home"), "CXX": "/none/g++"}
        done = subprocess.run(
            [sys.executable, "-c", PROBE.format(folder=str(target))],
            env=env,
            cwd=tmp_path,
            capture_output=True,
        )
        assert (done.returncode == 0) == (case == "with"), done.stderr.decode()
        assert b"NoKernels" in done.stderr or case == "with"
        assert not (tmp_path / "home" / "kernels").exists() or case == "without"
    assert names["without"].endswith("-py3-none-any.whl") and "-py3-none-linux_" in names["with"]
