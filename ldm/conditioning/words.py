"""The words of a text, for captions and for the warning about words that a model was not trained on."""

from __future__ import annotations

import re


def words_in(text: str) -> list[str]:
    """Return the lower-case words of a text, in order: runs of letters and digits, with inner apostrophes."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))
