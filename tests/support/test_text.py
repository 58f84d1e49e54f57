"""What files hold is shown in one line, without characters that a terminal acts on, and in bounded length."""

from __future__ import annotations

import sys
import unicodedata

import pytest
import torch

from ldm.support.text import LONGEST_TEXT, escaped, read_utf8, shown


def test_only_visible_characters_and_plain_spaces_pass():
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") or (char.isspace() and char != " "):
            assert escaped(char).startswith("\\") and escaped(char).isascii(), hex(code)
    assert escaped("name\x1b[2Kloads as sd\r\nx\u202ey\u200b\udc80") == (
        "name\\x1b[2Kloads as sd\\r\\nx\\u202ey\\u200b\\udc80"
    )
    for text in ("a red apple", "Über 東京 naïve ❤️ 🍎 ×", "C:\\folder"):
        assert escaped(text) == text
    for hidden in "\u3164\u2800\ufe01\u034f\U000e0101\U000e0041":  # no glyph, or one of no width
        assert escaped(f"a{hidden}b") != f"a{hidden}b"


def test_lengths_are_bounded():
    assert len(escaped("x" * 10**6)) == LONGEST_TEXT + 1
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep, deep]
    values = (
        "x" * 10**6,
        list(range(10**5)),
        {str(i): "y" * 999 for i in range(10**4)},
        10**9999,
        deep,
        b"z" * 10**6,
    )
    for value in values:
        assert len(shown(value)) <= 601
    assert (shown("it's"), shown(1.5), shown(None), shown(10**20)) == ('"it\'s"', "1.5", "None", str(10**20))
    assert shown("a\nb\u202e") == r"'a\nb\u202e'"
    assert shown({2: [1], "a": {}}) == "{2: [1], 'a': {}}"
    assert shown(dict.fromkeys(range(9), 1)) == "{0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, ...}"
    assert shown(torch.ones(2, 3)) == "<tensor of shape (2, 3)>"


def test_text_files_are_utf_8_and_of_a_stated_size(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé".encode())
    assert read_utf8(path, 5) == "é"
    with pytest.raises(ValueError, match=r"a\.txt': expected at most 4 bytes, got 5"):
        read_utf8(path, 4)
    path.write_bytes("é".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.txt' is not UTF-8, at byte 0"):
        read_utf8(path, 99)
