"""The library's own folder, and folders that only their user can change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm.support import home
from ldm.support.home import library_home, private_folder


def test_the_home_is_the_variable_or_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_HOME", "/a/b")
    assert library_home() == Path("/a/b")
    monkeypatch.setenv("LDM_HOME", "")
    monkeypatch.setenv("HOME", "/users/me")
    assert library_home() == Path("/users/me/.cache/ldm")


def test_missing_folders_are_made_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for umask in (0o000, 0o277):
        before = os.umask(umask)
        try:
            made = private_folder(Path(f"a{umask}") / "b" / ".." / "c")
        finally:
            os.umask(before)
        assert made == tmp_path / f"a{umask}" / "c"
        assert {path.stat().st_mode & 0o777 for path in (made, made.parent, made.parent / "b")} == {0o700}
        assert private_folder(made) == made


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777, 0o720, 0o702])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(PermissionError, match=r"a' can be changed by (its group|everybody) \(chmod go-w"):
        private_folder(folder)
    inner = folder / "b"
    if mode & 0o1000:  # in a sticky folder only owners rename their files
        assert private_folder(inner) == inner
    else:
        with pytest.raises(PermissionError, match="a' can be changed by"):
            private_folder(inner)
        assert not inner.exists()


def test_links_are_followed_and_what_they_lead_through_is_checked(tmp_path: Path) -> None:
    unsafe, safe = tmp_path / "unsafe", tmp_path / "safe"
    (unsafe / "inner").mkdir(parents=True)
    safe.mkdir(mode=0o700)
    unsafe.chmod(0o777)
    (tmp_path / "good").symlink_to("safe/../safe")
    (tmp_path / "bad").symlink_to(unsafe / "inner")
    (tmp_path / "round").symlink_to("round")
    assert private_folder(tmp_path / "good" / "new") == safe / "new"
    with pytest.raises(PermissionError, match="unsafe' can be changed by everybody"):
        private_folder(tmp_path / "bad")
    with pytest.raises(OSError, match="symbolic links"):
        private_folder(tmp_path / "round" / "a")


def test_what_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("", encoding="utf-8")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(NotADirectoryError, match="/a"):
            private_folder(path)


def test_only_the_user_and_on_the_way_root_own_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match=rf"belongs to another user \({os.getuid()}\)"):
        private_folder(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root's chown")
def test_folders_and_links_of_another_user_are_refused(tmp_path: Path) -> None:
    middle = tmp_path / "middle"
    private_folder(middle / "end")
    (tmp_path / "link").symlink_to(middle)
    assert private_folder(tmp_path / "link" / "end") == middle / "end"
    os.lchown(tmp_path / "link", 12345, -1)
    with pytest.raises(PermissionError, match=r"link' belongs to another user \(12345\)"):
        private_folder(tmp_path / "link" / "end")
    os.chown(middle, 12345, -1)
    with pytest.raises(PermissionError, match=r"middle' belongs to another user \(12345\)"):
        private_folder(middle / "end")
