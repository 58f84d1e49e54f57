"""Damaged, foreign and linked files in place of the cached kernels: none is loaded, all are replaced."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel_stand_in import ANY, CANARY, Workshop, compile_library, prebuilt, workshop

from ldm.speed.kernels import build, shared_library
from ldm.speed.kernels.shared_library import check_whole, load_library, read_cached, write_cached

__all__ = ["prebuilt", "workshop"]  # fixtures


@pytest.fixture(scope="session")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library that writes the file `ran` beside it when it is loaded, and answers 13."""
    path = tmp_path_factory.mktemp("canary") / "canary.so"
    return compile_library(CANARY, path, f'-DPLACE="{path.with_name("ran")}"')


def test_the_canary_sings(canary: Path, tmp_path: Path) -> None:
    """Otherwise the tests below would show nothing."""
    assert ctypes.CDLL(str(shutil.copy(canary, tmp_path))).answer() == 13
    canary.with_name("ran").unlink()


def replace_content(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], object]:
    """Return an attack that changes the content in place, and keeps the time of the last change."""

    def act(library: Path, canary: Path) -> None:
        status = library.stat()
        library.write_bytes(change(library.read_bytes()))
        os.utime(library, ns=(status.st_atime_ns, status.st_mtime_ns))

    return act


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def link(make: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
    """Return an attack that puts a link to the whole library, outside the folder, in its place."""

    def act(library: Path, canary: Path) -> None:
        elsewhere = library.parents[2] / "elsewhere.so"
        library.rename(elsewhere)
        make(library, elsewhere)

    return act


def pipe(library: Path, canary: Path) -> None:
    library.unlink()
    os.mkfifo(library)


ATTACKS: dict[str, Callable[[Path, Path], object]] = {
    "empty": replace_content(lambda data: b""),
    "one byte": replace_content(lambda data: data[:1]),
    "truncated": replace_content(lambda data: data[: len(data) // 2]),
    "without the last byte": replace_content(lambda data: data[:-1]),
    "one more byte": replace_content(lambda data: data + b"\0"),
    "zeros": replace_content(lambda data: bytes(len(data))),
    "a bit of the header": replace_content(lambda data: flip(data, 20)),
    "a bit of the code": replace_content(lambda data: flip(data, len(data) // 3)),
    "a bit of the hash": replace_content(lambda data: flip(data, len(data) - 1)),
    "foreign": lambda library, canary: shutil.copyfile(canary, library),
    "foreign, with the old hash": lambda library, canary: library.write_bytes(
        canary.read_bytes() + library.read_bytes()[-32:]
    ),
    "built for another key": lambda library, canary: write_cached(library, "0" * 64, canary.read_bytes()),
    "huge": lambda library, canary: os.truncate(library, 2**40),
    "writable by others": lambda library, canary: library.chmod(0o606),
    "writable by the group": lambda library, canary: library.chmod(0o660),
    "a symbolic link": link(lambda library, elsewhere: library.symlink_to(elsewhere)),
    "a hard link": link(lambda library, elsewhere: library.hardlink_to(elsewhere)),
    "a broken link": link(lambda library, elsewhere: library.symlink_to("/none")),
    "a circular link": link(lambda library, elsewhere: library.symlink_to(library)),
    "a pipe": pipe,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_not_the_library_is_replaced(workshop: Workshop, canary: Path, attack: str) -> None:
    assert workshop.answer() == 42
    library = workshop.library
    content = library.read_bytes()
    ATTACKS[attack](library, canary)
    assert workshop.answer() == 42 and workshop.runs == 4  # built again
    assert not canary.with_name("ran").exists()
    assert library.read_bytes() == content and not library.is_symlink() and library.stat().st_nlink == 1
    assert library.stat().st_mode & 0o777 == 0o600
    assert workshop.answer() == 42 and workshop.runs == 4  # and kept


def test_a_folder_in_place_of_the_library_is_a_reason(workshop: Workshop) -> None:
    workshop.answer()
    library = workshop.library
    library.unlink()
    library.mkdir()
    workshop.forget()
    with pytest.warns(UserWarning, match="Is a directory"), pytest.raises(build.NoKernels):
        build.library()


def test_files_of_another_user_are_not_read(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"x" * 100
    workshop.answer()
    write_cached(workshop.library, "key", data)
    assert read_cached(workshop.library, "key") == data
    monkeypatch.setattr(shared_library.os, "geteuid", lambda: os.getuid() + 1)
    assert read_cached(workshop.library, "key") is None


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs root's chown")
def test_a_library_or_a_folder_of_another_user_is_not_used(workshop: Workshop, canary: Path) -> None:
    workshop.answer()
    library = workshop.library
    key = build.library_key([str(workshop.compiler)], ANY)
    write_cached(library, key, canary.read_bytes())
    os.chown(library, 12345, -1)
    assert workshop.answer() == 42 and library.stat().st_uid == 0
    os.chown(workshop.kernels, 12345, -1)
    workshop.forget()
    with pytest.warns(UserWarning, match="belongs to another user .12345.") as caught:
        with pytest.raises(build.NoKernels, match="kernels' belongs to another user"):
            build.library()
    assert len(caught) == 1 and not canary.with_name("ran").exists()


def test_the_bytes_that_were_checked_are_loaded(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is exchanged, and then truncated, between the check and the load."""
    workshop.answer()
    library = workshop.library

    def late(data: bytes) -> ctypes.CDLL:
        library.write_bytes(b"")
        return load_library(data)

    monkeypatch.setattr(build, "load_library", late)
    assert workshop.answer() == 42


def test_a_cache_on_a_mount_that_forbids_execution_is_used(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is loaded from memory; a file of such a mount cannot be mapped for execution."""

    class OnSuchAMount(ctypes.CDLL):
        def __init__(self, name: str | None, *args: object, **options: object) -> None:
            if name is not None and Path(name).is_relative_to(workshop.folder):
                raise OSError(f"{name}: failed to map segment from shared object")
            super().__init__(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ctypes, "CDLL", OnSuchAMount)
    assert workshop.answer() == 42 and workshop.library.is_file()
    runs = workshop.runs
    assert workshop.answer() == 42 and workshop.runs == runs  # and found again
    with pytest.raises(OSError, match="failed to map segment"):
        ctypes.CDLL(str(workshop.library))


def test_libraries_loaded_one_after_the_other_are_not_confused(prebuilt: Path, tmp_path: Path) -> None:
    source = 'extern "C" int answer() { return 7; }'
    other = compile_library(source, tmp_path / "other.so")
    found = [load_library(path.read_bytes()).answer() for path in (prebuilt, other, prebuilt)]
    assert found == [42, 7, 42]


def test_a_library_that_is_not_whole_is_refused_before_it_is_mapped(prebuilt: Path) -> None:
    """Mapping a truncated library ends the process by SIGBUS."""
    data = prebuilt.read_bytes()
    check_whole(data)
    draw = random.Random(0)
    for length in [*range(64), *draw.sample(range(64, len(data)), 200), len(data) - 1]:
        with pytest.raises(ValueError, match="shared library"):
            check_whole(data[:length])
    for place, content in (
        (18, b"\xff\xff"),
        (4, b"\1"),
        (5, b"\2"),
        (0, b"MZ"),
        (54, b"\1"),
        (32, b"\xff" * 8),
    ):
        with pytest.raises(ValueError, match="shared library"):
            check_whole(data[:place] + content + data[place + len(content) :])


def test_without_files_in_memory_there_is_a_reason(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> object:
        return object()  # a C library without memfd_create

    with monkeypatch.context() as patch:
        patch.setattr(shared_library.ctypes, "CDLL", refused)
        with pytest.raises(OSError, match="memfd_create is not possible"):
            load_library(workshop.prebuilt.read_bytes())
