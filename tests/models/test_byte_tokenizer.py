"""The byte-level tokenizer of DALL·E Mini and the cleaning of texts, against min-dalle and transformers."""

from __future__ import annotations

import json

import pytest
import torch
from dalle_peers import min_dalle_models
from tiny_dalle import MERGES, vocabulary

from ldm.models.text.byte_bpe import BYTE_WORDS, ByteTokenizer
from ldm.models.text.cleaning import clean_for_dalle_mini, clean_for_min_dalle

TEXTS = ("a red apple", "  two  spaces ", "Apples, RE apple!", "naïve café – apple", "x" * 30, "")


def test_ids_and_padding() -> None:
    tokenizer, ids = ByteTokenizer(vocabulary(), MERGES), vocabulary()
    assert tokenizer.encode("apple a") == [ids["Ġapple"], ids["Ġa"]]
    assert tokenizer.encode("red") == [ids["Ġre"], ids["d"]]
    rows, cut = tokenizer(["apple", "", "r" * 20], 8)
    assert rows.dtype == torch.int64 and cut == ["r" * 20]
    assert rows[0].tolist() == [0, ids["Ġapple"], 2, 1, 1, 1, 1, 1]
    assert rows[1].tolist() == [0, 2, 1, 1, 1, 1, 1, 1]
    assert rows[2].tolist() == [0, ids["Ġ"], *[ids["r"]] * 5, 2]


def test_spelling_needs_no_file() -> None:
    tokenizer = ByteTokenizer.spelling()
    assert len(tokenizer) == 260 and len(tokenizer.encode("a cat")) == 6


def test_it_equals_min_dalle() -> None:
    min_dalle_models()
    from min_dalle.text_tokenizer import TextTokenizer

    peer, ours = TextTokenizer(vocabulary(), list(MERGES)), ByteTokenizer(vocabulary(), MERGES)
    for text in TEXTS:
        assert [0, *ours.encode(text), 2] == peer.tokenize(text), text


def test_words_equal_those_of_transformers(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary()), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    peer = transformers.BartTokenizer.from_pretrained(tmp_path)
    ours = ByteTokenizer(vocabulary(), MERGES, cleaning="dalle-mini")
    for text in TEXTS:
        clean = clean_for_dalle_mini(text)
        assert [0, *ours.encode(text), 2] == peer(clean)["input_ids"], text


def test_splitting() -> None:
    assert BYTE_WORDS.findall(" a cat's 12 toys!") == [" a", " cat", "'s", " 12", " toys", "!"]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("A Red\tApple", "a red\tapple"),
        ("naïve café", "nave caf"),
        ("a 🍎 b", "a red_apple b"),
        ("日本", ""),
    ],
)
def test_cleaning_for_min_dalle(text: str, clean: str) -> None:
    assert clean_for_min_dalle(text) == clean


# what dalle-mini's TextNormalizer returns for these texts
@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("A Red Apple.", " a red apple"),
        ("naïve café", " naive cafe"),
        ("a 🍎 b", " a, red apple, b"),
        ("Tom &amp;amp; Jerry", " tom & jerry"),
        ("it's 1,000,000 o'clock", " it's 1000000 o \" clock"),
        ("see http://x.org/y now", " see now"),
        ("a well-known (old) car", " a well known, old, car"),
        ("they'll say 'hello' \"there\"", ' they\'ll say " hello " there "'),
        ("x - y, 1/2/3", " x, y, 1/2, 3"),
        ("snake_case \\ back", " snake case back"),
        ("100% * $5 & more", " 100 % * $ 5 & more"),
        (",,,", " "),
        ("<b>bold</b> 3/4 50%", " bold 3/4 50 %"),
        ("sooooo  big!!!!", " so big"),
        ("[12] reference [3]", " reference"),
        ("u.s. of 1.5", " u.s, of 1.5"),
        ("#BlueSky2", " blue sky 2"),
    ],
)
def test_cleaning_for_dalle_mini(text: str, clean: str) -> None:
    assert clean_for_dalle_mini(text) == clean


@pytest.mark.parametrize(
    ("ids", "merges", "message"),
    [
        ({"<s>": 0}, (), "lacks <pad>"),
        ({**vocabulary(), "z z": "x"}, (), "expected ids"),
        ({**vocabulary(), "zz": 0}, (), "given twice"),
        ({**vocabulary(), "zz": -1}, (), "expected ids"),
        ({**vocabulary(), "zz": True}, (), "expected ids"),
        (vocabulary(), ("abc",), "two symbols"),
        (vocabulary(), (["a", "b"],), "two symbols"),
        (vocabulary(), ("a b c",), "two symbols"),
    ],
)
def test_damaged_content_is_refused(ids: dict, merges: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByteTokenizer(ids, merges)


def test_unknown_cleaning_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'min-dalle'"):
        ByteTokenizer(vocabulary(), MERGES, cleaning="min-dale")


def test_long_texts_take_a_time_that_grows_with_their_length() -> None:
    for text in ('"' * 50_000, " " * 50_000, "<" * 50_000, "a." * 30_000, "," * 50_000):
        clean_for_dalle_mini(text)
    assert len(ByteTokenizer(vocabulary(), MERGES).encode("ap" * 20_000)) > 20_000
