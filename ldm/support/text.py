"""Text and values that come from files, as messages and reports may show them.

A file can hold characters that move the cursor, turn the reading direction or end a line, and values of any
size. `escaped` is for texts, `shown` for values; their results are in one line and can be printed anywhere.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

LONGEST_TEXT = 2000  # characters of a text that are shown
# Characters without a glyph that Python counts as printable: joiners, fillers, variation selectors (except
# U+FE0F, which belongs to emoji).
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\ufe00-\ufe0e\U000e0100-\U000e01ef]"
)


def escaped(text: object, longest: int = LONGEST_TEXT) -> str:
    """Return a text in one line, with escapes such as \\x1b in place of characters that are not visible.

    These are control characters, line ends, all spaces but the plain one, characters that turn the reading
    direction, characters without width, and lone surrogates.

    Args:
        text: The text, or an object that `str` converts.
        longest: Number of characters after which the text is cut, which is then marked by "…". Default:
            `LONGEST_TEXT`.
    """
    text = str(text)
    if len(text) > longest:
        text = text[:longest] + "…"
    if text.isprintable() and INVISIBLE.search(text) is None:
        return text
    return "".join(
        char if char.isprintable() and INVISIBLE.match(char) is None else _escape(char) for char in text
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


class _Bounded(reprlib.Repr):
    """A `repr` of bounded length, also for numbers that Python refuses to write as decimals."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 8, 8, 6

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 200 else f"<whole number of {x.bit_length()} bits>"

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Return the first entries; the method of the base class sorts all of them first."""
        first = dict(islice(x.items(), self.maxdict))
        more = ", ..." if len(x) > len(first) else ""
        if level <= 0:
            return "{...}" if x else "{}"
        items = (
            f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in first.items()
        )
        return f"{{{', '.join(items)}{more}}}"

    def repr_Tensor(self, x: Any, level: int) -> str:
        return f"<tensor of shape {tuple(x.shape)}>"

    repr_Parameter = repr_ndarray = repr_Tensor


_BOUNDED = _Bounded()


def shown(value: Any) -> str:  # Any: a value from a file
    """Return the `repr` of a value, shortened if it is long or deep, with invisible characters escaped."""
    return escaped(_BOUNDED.repr(value), 600)


@contextmanager
def errors_of(path: str | Path) -> Iterator[None]:
    """Let a ValueError of the block name the file that it is about, unless its message does."""
    where = shown(str(path))
    try:
        yield
    except ValueError as error:
        if where in str(error) or str(path) in str(error):
            raise
        raise ValueError(f"{where}: {error}") from None


def read_utf8(path: Path, most: int) -> str:
    """Return the text of a file, without a byte order mark.

    Args:
        path: The file.
        most: Size in bytes that it may have.

    Raises:
        ValueError: If it is larger, or not UTF-8; the message names it.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        size = path.stat().st_size
        raise ValueError(f"{shown(str(path))}: expected at most {most:,} bytes, got {size:,}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(str(path))} is not UTF-8, at byte {error.start}") from None
