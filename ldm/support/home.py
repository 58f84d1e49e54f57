"""The library's own folder, and folders that nobody but their user can change."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

MAX_LINKS = 40  # symbolic links in one path, as Linux allows


def library_home() -> Path:
    """Return the library's own folder, LDM_HOME (default: ~/.cache/ldm); it need not exist.

    Raises:
        FileNotFoundError: If LDM_HOME is not set and the user has no home folder.
    """
    named = os.environ.get("LDM_HOME")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "ldm"
    except RuntimeError:
        raise FileNotFoundError("the user has no home folder: set LDM_HOME to a folder") from None


def make_folder(folder: Path) -> Path:
    """Make a folder, and those on the way that are missing, for the user alone, whatever the umask is.

    Returns:
        The folder.
    """
    for place in (*reversed(folder.absolute().parents), folder):
        if not os.path.lexists(place):
            _make(place)
    return folder


def private_folder(folder: Path) -> Path:
    """Return the real path of a folder, made if it is missing, which only the user can change.

    Every folder on the way, and every symbolic link, must belong to the user or to root. Nobody else may be
    permitted to write there, except on the way in folders with the sticky bit, such as /tmp, where only
    owners can rename entries. Missing folders are made with the mode 0700, whatever the umask is.

    Raises:
        PermissionError: If another user can change the folder; the message says why.
        OSError: If the folder cannot be made.
    """
    here, left, links = Path("/"), list(reversed(folder.absolute().parts[1:])), 0
    _check_folder(here, last=not left)
    while left:
        name = left.pop()
        if name == "..":
            here = here.parent
            continue
        place = here / name
        if not os.path.lexists(place):
            _make(place)
        status = place.lstat()
        if not stat.S_ISLNK(status.st_mode):
            _check_folder(place, last=not left)
            here = place
            continue
        _check_owner(place, status, last=False)
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
        target = Path(os.readlink(place))
        here = Path("/") if target.is_absolute() else here
        left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return here


def _make(place: Path) -> None:
    with suppress(FileExistsError):  # another process has made it
        place.mkdir(mode=0o700)
        place.chmod(0o700)


def _check_folder(place: Path, *, last: bool) -> None:
    """Raise OSError unless a path is a folder that only the user, or on the way root, can change."""
    status = place.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    _check_owner(place, status, last=last)
    writers = [
        who for who, bit in (("its group", stat.S_IWGRP), ("everybody", stat.S_IWOTH)) if status.st_mode & bit
    ]
    if writers and (last or not status.st_mode & stat.S_ISVTX):
        raise PermissionError(f"{str(place)!r} can be changed by {writers[-1]} (chmod go-w prevents it)")


def _check_owner(place: Path, status: os.stat_result, *, last: bool) -> None:
    """Raise PermissionError unless a file belongs to the user, or to root if it is not the last of a path."""
    if status.st_uid != os.geteuid() and (last or status.st_uid != 0):
        raise PermissionError(f"{str(place)!r} belongs to another user ({status.st_uid})")
