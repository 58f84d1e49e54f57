"""Standard output in any encoding, messages in one line, and images or output that cannot be written."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.support.text import escaped

if TYPE_CHECKING:
    from ldm.images.result import Images


def prepare_output() -> None:
    """Escape characters that the encoding of standard output lacks, which would otherwise be an error."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Write what is still buffered for standard output to nowhere, so that the flush at exit succeeds."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def complain(message: object) -> None:
    """Print a message in one line on standard error, where there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # it is closed, or its disk is full
            print(escaped(message), file=sys.stderr)


def check_output(path: str | Path, *, quality: int | None, seed: int | None = None, n: int = 1) -> Path:
    """Check before any work that images can be written to a file, and return its path.

    Args:
        path: The file.
        quality: Quality of a lossy format; None for the default.
        seed: The first seed, if every image is written to a file that its seed names. Default: None.
        n: Number of images. Default: 1.

    Raises:
        ValueError: For another suffix, a quality out of range, or a name that is too long.
        OSError: If the file cannot be written.
    """
    from ldm.images.files import check_quality, check_writable

    path = check_writable(path)
    check_quality(path, quality)
    if seed is not None:
        check_writable(path.with_name(f"{path.stem}-{seed + n - 1}{path.suffix}"))
    return path


def check_animation(path: Path | None) -> None:
    """Check before any work that a GIF can be written to a file, if one is named.

    Raises:
        ValueError: For another suffix.
        OSError: If the file cannot be written.
    """
    if path is not None:
        from ldm.images.files import check_writable

        check_writable(path, (".gif",))


def write_images(
    images: Images, path: str | Path, *, separate: bool = False, quality: int | None = None
) -> None:
    """Write images, print the paths, and write a PNG in the folder of temporary files where that fails.

    Raises:
        OSError: If the images cannot be written; the message names the PNG that holds them.
    """
    try:
        paths = images.save(path, separate=separate, quality=quality)
    except (OSError, ValueError) as error:
        elsewhere = Path(tempfile.gettempdir()) / f"ldm-{secrets.token_hex(8)}.png"
        try:
            (saved,) = images.save(elsewhere)
        except OSError:
            raise error from None
        raise OSError(f"{error}; the images are in {str(saved)!r}") from error
    for each in paths:
        print(each)
