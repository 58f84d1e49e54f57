"""How DALL·E Mini's programs clean a text before it is split into tokens.

`clean_for_min_dalle` follows min-dalle: emoji become words, letters are lower-cased, and what is not ASCII is
left out. `clean_for_dalle_mini` follows dalle-mini's own `TextNormalizer`, which the models were trained
with: it repairs encodings, resolves HTML, removes accents, addresses and repeated characters, and turns
punctuation to commas.

Emoji are named by Unicode's character names, which are those of the peers' tables for most emoji. Letters
without an ASCII letter in their decomposition, such as Cyrillic ones, are left out where dalle-mini
transcribes them; hashtags are split at capitals where it looks their words up in a list.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Mapping

QUOTE, DOT, SLASH = "\x01", "\x02", "\x03"  # stand for characters that are kept
# in this order; lower-case ASCII text
REPLACEMENTS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"\A ?\[\d+\]|\[\d+\] ?\Z", ""),  # references of Wikipedia
        (r"<[^<]+?>", " "),
        (r"http\S+", ""),
        (r"(?<=\d),(?=\d{3})", ""),
        (r"(\w)\.(\w)", rf"\1{DOT}\2"),
        (r"'(?=(?:[stdm]|ll|re|ve)\b)", QUOTE),
        (r"(\d)/(\d)", rf"\1{SLASH}\2"),
        (r"(\w)-(\w)", r"\1 \2"),
        (r"([%&/$*])", r" \1 "),
        (r"[_#\\]", " "),
        (r"['\"`]", ' " '),
        (r"[()\[\].,|:;?!=+~\-/{}]", ","),
        (QUOTE, "'"),
        (DOT, "."),
        (SLASH, "/"),
        (r"(\D)\1{3,}", r"\1"),
        (r'(?:\s*"+\s*)+', ' " '),
        (r"(?:\s*,+\s*)+", ", "),
        (r"\s+", " "),
    )
)
# the border of words in a hashtag: before a capital that follows another letter, and around digits
WORD_BORDER = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])")


def named_emoji(text: str, around: str = "") -> str:
    """Return a text with the name of each emoji, such as red_apple, in its place, between two `around`."""
    if text.isascii():
        return text
    return "".join(
        f"{around}{unicodedata.name(char, '').lower().replace(' ', '_').replace('-', '_')}{around}"
        if unicodedata.category(char) == "So"
        else char
        for char in text
    )


def clean_for_min_dalle(text: str) -> str:
    """Return a text as min-dalle reads it."""
    return named_emoji(text).lower().encode("ascii", errors="ignore").decode()


def clean_for_dalle_mini(text: str) -> str:
    """Return a text as dalle-mini's `TextNormalizer` leaves it; it begins with a space."""
    if not text.isascii():
        import ftfy

        text = ftfy.fix_text(text)
    text = named_emoji(html.unescape(html.unescape(text)), ":")
    text = unicodedata.normalize("NFKD", text).encode("ascii", errors="ignore").decode()
    text = re.sub(r"#(\w+)", lambda match: WORD_BORDER.sub(" ", match[1]), text).lower()
    for pattern, replacement in REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return f" {text.strip().removesuffix(',').removeprefix(',').strip()}"


CLEANINGS: Mapping[str, Callable[[str], str]] = {
    "min-dalle": clean_for_min_dalle,
    "dalle-mini": clean_for_dalle_mini,
}
