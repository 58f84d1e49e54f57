"""What a word is, for captions and for the warning about words that a model has never seen."""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """The words of a text, lower-case, in order: runs of letters and digits, with their apostrophes."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))
