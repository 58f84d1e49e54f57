"""A small library in place of the kernels, and a compiler that copies it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.speed.kernels import build
from ldm.speed.kernels.choice import KernelChoice
from ldm.support.processor import InstructionSet

SOURCE = 'extern "C" int answer() { return 42; }\n'
ANY = InstructionSet(name="any", machine="any", features=frozenset(), flags=())
CHOICE = KernelChoice(ANY, "a test")
CANARY = """
#include <cstdio>
extern "C" int answer() { return 13; }
__attribute__((constructor)) void run() { if (FILE* file = fopen(PLACE, "w")) fclose(file); }
"""


def compile_library(source: str, path: Path, *flags: str) -> Path:
    """Compile a source to a shared library; skip the test if there is no compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path.with_suffix(".cpp").write_text(source, encoding="utf-8")
    command = ["g++", "-shared", "-fPIC", *flags, str(path.with_suffix(".cpp")), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="session")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the small library, whose `answer` is 42."""
    return compile_library(SOURCE, tmp_path_factory.mktemp("prebuilt") / "answer.so")


class Workshop:
    """A folder of sources, a fake compiler and the library's own folder, in place of the real ones."""

    def __init__(self, folder: Path, prebuilt: Path) -> None:
        self.folder, self.prebuilt = folder, prebuilt
        self.sources, self.home, self.compiler = folder / "sources", folder / "home", folder / "compiler"
        self.log, self.kernels = folder / "log", folder / "home" / "kernels"
        self.sources.mkdir()
        (self.sources / "tiny.cpp").write_text(SOURCE, encoding="utf-8")
        self.log.touch()
        self.set_compiler(f'cat "{prebuilt}" > "$out"')

    def set_compiler(self, action: str, version: str = "echo fake 1") -> None:
        """Set what the compiler does, as a shell script in which `out` is the file to write."""
        self.compiler.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then {version}; exit $?; fi\n'
            f'echo "$@" >> "{self.log}"\nfor out in "$@"; do :; done\n{action}\n',
            encoding="utf-8",
        )
        self.compiler.chmod(0o755)

    @property
    def runs(self) -> int:
        """How many times the compiler was asked to compile or link."""
        return len(self.log.read_text(encoding="utf-8").splitlines())

    @property
    def library(self) -> Path:
        """The library in the cache, the only file there."""
        (path,) = self.kernels.iterdir()
        return path

    def forget(self) -> None:
        """Let this process look for the library again, as a new process does."""
        build.built_library.cache_clear()

    def answer(self) -> int:
        """Return what the library that a new process finds answers."""
        self.forget()
        return int(build.library().answer())


@pytest.fixture
def workshop(tmp_path: Path, prebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """Let the kernels be the small library, on a machine that claims to be able to run them."""
    made = Workshop(tmp_path, prebuilt)
    monkeypatch.setattr(build, "kernel_choice", lambda: CHOICE)
    monkeypatch.setattr(build, "read_prebuilt", lambda isa: None)
    monkeypatch.setattr(build, "HERE", made.sources)
    monkeypatch.setattr(build, "SOURCES", ("tiny.cpp",))
    monkeypatch.setattr(build, "FUNCTIONS", ("answer",))
    monkeypatch.setenv("LDM_HOME", str(made.home))
    monkeypatch.setenv("CXX", str(made.compiler))
    monkeypatch.delenv("LDM_KERNELS", raising=False)
    made.forget()
    yield made
    made.forget()
