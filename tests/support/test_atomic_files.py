"""Atomic writes: modes, leftovers, planted links, long names, threads."""

from __future__ import annotations

import ast
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ldm.support import files
from ldm.support.files import longest_name, open_atomically, staged_folder, write_atomically


def test_files_are_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.bin"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one" and [file.name for file in path.parent.iterdir()] == ["file.bin"]


def test_the_mode_of_a_file_is_kept_and_a_new_one_follows_the_umask(tmp_path: Path) -> None:
    private, new = tmp_path / "private", tmp_path / "new"
    private.write_bytes(b"old")
    private.chmod(0o600)
    before = os.umask(0o027)
    try:
        write_atomically(private, b"1")
        write_atomically(new, b"2")
    finally:
        os.umask(before)
    assert (private.read_bytes(), new.read_bytes()) == (b"1", b"2")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600 and stat.S_IMODE(new.stat().st_mode) == 0o640


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    here, elsewhere = files._system(), "0" * 8
    dead = tmp_path / f".ldm-{process.pid}-{'0' * 16}"  # as earlier versions named them
    folder = tmp_path / f".ldm-{process.pid}-{here}-{'0' * 16}"
    link = tmp_path / f".ldm-{process.pid}-{here}-{'1' * 16}"
    old = tmp_path / f".ldm-{process.pid}-{elsewhere}-{'0' * 16}"
    removed = dead, folder, link, old
    kept = (
        tmp_path / f".ldm-{os.getpid()}-{here}-{'0' * 16}",
        tmp_path / f".ldm-{process.pid}-{elsewhere}-{'1' * 16}",  # its process may run on another machine
        tmp_path / ".ldm-notes",
        tmp_path / f".ldm-{'9' * 30}-{'0' * 16}",  # no number of a process
    )
    folder.mkdir()
    (folder / "a").write_bytes(b"x")
    link.symlink_to(tmp_path)
    for path in (dead, old, *kept):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    files._cleaned.discard(tmp_path)
    write_atomically(tmp_path / "a", b"1")
    assert not any(map(os.path.lexists, removed)) and all(path.exists() for path in kept)


def test_leftovers_that_cannot_be_removed_do_not_prevent_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's leftovers in a shared folder, and those that another process removes meanwhile."""
    leftovers = [tmp_path / f".ldm-1-{digit * 16}" for digit in "01"]
    leftovers[0].write_bytes(b"x")
    leftovers[1].mkdir()
    monkeypatch.setattr(files, "is_running", lambda process: False)

    def refused(path: Path, **options: object) -> None:
        if path in leftovers:
            raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "unlink", refused)
        patch.setattr("os.rmdir", lambda *_, **__: refused(leftovers[1]))
        write_atomically(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1" and leftovers[0].exists()


def test_names_as_long_as_the_system_has_are_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * longest_name(tmp_path))
    write_atomically(path, b"1")
    assert path.read_bytes() == b"1" and len(list(tmp_path.iterdir())) == 1


def test_threads_may_write_one_file(tmp_path: Path) -> None:
    path, contents = tmp_path / "a", [bytes([i]) * 100_000 for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: write_atomically(path, data), contents))
    assert path.read_bytes() in contents and [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_link_that_is_planted_at_a_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if an attacker guessed the name, which is random."""
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_bytes(b"mine")
    folder.mkdir()
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 2 * size)
    for target in (victim, tmp_path / "absent"):
        planted = files.temporary_path(folder)
        planted.symlink_to(target)
        with pytest.raises(FileExistsError):
            write_atomically(folder / "a", b"new")
        with pytest.raises(FileExistsError):
            with files.temporary_folder(folder):
                raise AssertionError("expected no folder")
        planted.unlink()  # as it was not removed
    assert victim.read_bytes() == b"mine" and not (tmp_path / "absent").exists()
    assert not (folder / "a").exists()


def test_errors_name_the_file_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device.*/a'"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_mode_is_that_of_the_file_whatever_the_umask_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for umask in (0o000, 0o377):
        before = os.umask(umask)
        try:
            write_atomically(path, b"1", 0o600)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o666)


def test_a_folder_that_cannot_be_written_whole_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*/model/part/a'"):
        with staged_folder(tmp_path / "model", ["card"], lambda _: []) as stage:
            raise OSError(28, "No space left on device", str(stage / "part" / "a"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        with open_atomically(tmp_path / "a"):
            (tmp_path / "elsewhere").read_bytes()  # errors of other files keep their names


FUNCTIONS = {
    f"tempfile.{name}" for name in ("NamedTemporaryFile", "TemporaryDirectory", "mkstemp", "mkdtemp")
}
FUNCTIONS |= {
    "os.replace",
    "os.rename",
    "shutil.move",
    "shutil.copyfile",
    "shutil.copy",
    "np.save",
    "open_memmap",
}
METHODS = {"write_text", "write_bytes", "touch", "open_memmap", "tofile"}


def writing_calls(path: Path) -> Iterator[str]:
    """Yield the calls in a module that write a file by name."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        name, is_method = ast.unparse(call.func), isinstance(call.func, ast.Attribute)
        last = name.rpartition(".")[2]
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        modes = [str(each.value) for each in values if isinstance(each, ast.Constant)]
        by_name = all(keyword.arg != "fileobj" for keyword in call.keywords)
        opens = (
            last in ("open", "fdopen")
            and by_name
            and any(re.fullmatch("[rbt]*[wax+][bt+]*", mode) for mode in modes)
        )
        if opens or name in FUNCTIONS or is_method and last in METHODS:
            yield f"{path.name}: {ast.unparse(call)[:60]}"


def test_nothing_else_in_the_package_writes_files_by_name() -> None:
    """All writers use this mechanism: random names, whole files, leftovers removed, errors with the name."""
    package = Path(files.__file__).parents[1]
    others = [path for path in package.rglob("*.py") if path != Path(files.__file__)]
    assert list(writing_calls(Path(files.__file__)))
    assert [call for path in others for call in writing_calls(path)] == []
