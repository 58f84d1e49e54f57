"""The tokenizer: ids equal to open_clip's, lengths, parts of the vocabulary, and no slow imports."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from functools import cache
from typing import Any

import pytest
import torch

from ldm.models.text.bpe import BOS, EOT, SIZE, Tokenizer, all_symbols, byte_symbols, join_pairs, merges

STRINGS = [
    "",
    " ",
    "\n\t ",
    "a red apple",
    "A  Red\tAPPLE\n",
    "it's they're I've I'm he'll she'd CAN'T '",
    "'s'S's'",
    "a&b",
    "don’t “quoted” – dash… ‚low‘",
    "12345 3.14 1/2 ½ Ⅷ ² 四",
    "hello, world!!! (what?) [x] {y} <z> @home #1 50% a_b-c~d`e^f|g\\h",
    "&amp; &lt;b&gt; &amp;lt; &eacute; &#x1F34E; &nosuch;",
    "http://example.com/a?b=c&d=e",
    "schÃ¶n dâ€™accord",
    "naïve façade Straße İstanbul ſpace K",
    "ﬁne ﬂow ＦＵＬＬ",
    "ǅ ŉ ΐ ß ẞ",
    "\u0130\u0131",
    "🍎🦁 👩‍🚀 👨‍👩‍👧 🇫🇷 ❤️",
    "שלום עולם",
    "مرحبا بالعالم ١٢٣",
    "日本語のテキスト 한국어 ไทย",
    "e\u0301 a\u0308\u0323",
    "a\u200bb\u00adc\ufeffd\u2028e\u0085f\xa0g",
    "\x00\x01\x1b[31mred\x1b[0m\x7f",
    "\r\n line \r end",
    "<start_of_text> x <end_of_text>",
    "<START_OF_TEXT>",
    "<ſtart_of_text>",
    "\ufffd \U0010ffff \ue000",
    "supercalifragilisticexpialidocious" * 3,
    "a" * 29,
    "x" * 300,
]
PIECES = [
    *"abcdefghijklmnopqrstuvwxyzABCXYZ0123456789",
    *"       \t\n\r'\"!#$%&()*+,-./:;<=>?@[]^_`{|}~\\",
    *"éüñßſK\u0301µאבعم字漢½Ⅷ’“”🍎🦁\u200d\u200b\u0085\xa0\x00\x1b\ufb01Ã¶â€™",
    "&amp;",
    "&lt;",
    "&#39;",
    "'s",
    "'LL",
    " the ",
    " apple",
    "<end_of_text>",
]


@cache
def peer() -> Any:
    return pytest.importorskip("open_clip.tokenizer")


@cache
def ours() -> Tokenizer:
    return Tokenizer()


def fuzz(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    ranges = [(0, 0x7F), (0, 0xFF), (0, 0x7FF), (0, 0xD7FF), (0xE000, 0x10FFFF)]
    texts = []
    for i in range(count):
        if i % 2:
            texts.append("".join(rng.choice(PIECES) for _ in range(rng.randint(0, 40))))
        else:
            texts.append("".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 12))))
    return texts


def test_vocabulary_is_complete_and_without_duplicates():
    symbols = all_symbols()
    assert len(symbols) == len(set(symbols)) == SIZE == 49408
    assert len(set(byte_symbols())) == 256 and not any(symbol.isspace() for symbol in byte_symbols())
    assert (ours().bos_id, ours().eot_id, len(ours())) == (49406, 49407, 49408)


@pytest.mark.parametrize("text", STRINGS)
def test_ids_equal_open_clip(text):
    tokenizer = peer()._tokenizer
    ids = ours().encode(text)
    assert ids == tokenizer.encode(text)
    assert ours().decode(ids) == tokenizer.decode(ids)


def test_ids_equal_open_clip_on_random_strings():
    tokenizer = peer()._tokenizer
    wrong = [text for text in fuzz(0, 6000) if ours().encode(text) != tokenizer.encode(text)]
    assert not wrong


def test_every_symbol_equals_open_clips():
    assert dict(zip(all_symbols(), range(SIZE), strict=True)) == {
        **{symbol: i for symbol, i in peer()._tokenizer.encoder.items() if i < BOS},
        "<start_of_text>": BOS,
        "<end_of_text>": EOT,
    }


@pytest.mark.parametrize("length", [77, 16, 2])
def test_batches_equal_open_clip(length):
    texts = ["", "a red apple", "word " * 200, "an astronaut, riding a horse; in space 🚀"]
    assert torch.equal(
        ours()(texts, context_length=length, truncate=True), peer().tokenize(texts, context_length=length)
    )


def test_padding():
    ids = ours()(["a cat", "a red apple"], context_length=8, pad=49407)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [
        [49406, 320, 2368, 49407, 49407, 49407, 49407, 49407],
        [49406, 320, 736, 3055, 49407, 49407, 49407, 49407],
    ]
    assert ours()(["a cat", "a red apple"], context_length=None).tolist() == [
        [49406, 320, 2368, 49407, 0],
        [49406, 320, 736, 3055, 49407],
    ]
    assert ours()("a cat").shape == (1, 77)
    assert ours()([]).shape == (0, 77)


def test_too_long_names_the_count():
    assert ours()("word " * 75).shape == (1, 77)  # 75 tokens with start and end fit exactly
    with pytest.raises(ValueError, match=r"78 tokens.*77.*truncate"):
        ours()(["fine", "word " * 76])
    cut = ours()("word " * 76, truncate=True)
    assert cut[0, -1] == EOT and (cut[0, 1:-1] == ours().encode("word")[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"context_length": 1}, "context_length.*1"), ({"pad": 49408}, "49408"), ({"pad": -1}, "pad")],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        ours()("a cat", **options)


def test_decode_refuses_ids_out_of_range():
    with pytest.raises(ValueError, match="49408"):
        ours().decode([320, 49408])


def test_part_of_the_vocabulary():
    full = ours()
    small = Tokenizer(vocabulary=full.encode("a red apple on the left"))
    assert small.vocabulary is not None and list(small.vocabulary) == sorted(small.vocabulary)
    assert len(small) == 8 and {BOS, EOT} <= set(small.vocabulary)
    ids = small("the red apple", context_length=None)[0].tolist()
    assert [small.vocabulary[i] for i in ids] == [BOS, *full.encode("the red apple"), EOT]
    assert (ids[0], ids[-1]) == (small.bos_id, small.eot_id)
    assert small.decode(small.encode("the RED apple")) == "the red apple "
    assert Tokenizer(vocabulary=small.vocabulary).vocabulary == small.vocabulary


def test_words_outside_the_vocabulary_are_reported_and_left_out():
    full = ours()
    pieces = full.encode("snowplough")
    assert len(pieces) > 1  # a word of several tokens, of which the vocabulary has only the first
    small = Tokenizer(vocabulary=[*full.encode("a red apple"), pieces[0]])
    assert small.unknown("A zebra, a snowplough and a Zebra") == ["zebra", ",", "snowplough", "and"]
    assert small.encode("a snowplough apple") == small.encode("a apple")
    assert small.unknown("red apple") == [] == full.unknown("zebra 🦓")


def test_vocabulary_is_checked():
    with pytest.raises(ValueError, match="60000"):
        Tokenizer(vocabulary=[1, 60000])
    with pytest.raises(ValueError, match="pad"):
        Tokenizer(vocabulary=[1, 2])("", pad=4)


def test_plain_text_imports_neither_open_clip_nor_unicode_tables():
    code = (
        "import sys; from ldm.models.text.bpe import Tokenizer; t = Tokenizer(); t('a red apple, it\\'s on a"
        " blue background');bad = {'open_clip', 'ftfy', 'regex', 'torchvision'} & set(sys.modules); assert"
        " not bad, bad; t('\\u00e9\\u00e9');assert 'ftfy' in sys.modules and 'open_clip' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


def joined_one_by_one(symbols: list[str]) -> list[str]:
    """Return symbols joined by the merges as the paper says: look at all pairs before each merge."""
    while len(symbols) > 1:
        pairs = {f"{a} {b}" for a, b in zip(symbols, symbols[1:], strict=False)}
        best = min(pairs, key=lambda pair: merges().get(pair, SIZE))
        if best not in merges():
            break
        first, second = best.split(" ")
        joined, i = [], 0
        while i < len(symbols):
            pair = symbols[i : i + 2] == [first, second]
            joined.append(first + second if pair else symbols[i])
            i += 2 if pair else 1
        symbols = joined
    return symbols


def test_merges_are_applied_in_their_order():
    rng, letters = random.Random(3), "aehinorst"
    for length in (1, 2, 3, 7, 20, 60, 200):
        for _ in range(20):
            symbols = [rng.choice(letters) for _ in range(length)]
            symbols[-1] += "</w>"
            expected = joined_one_by_one(symbols)
            join_pairs(symbols, merges())
            assert [symbol for symbol in symbols if symbol] == expected


@pytest.mark.parametrize("word", ["a" * 16_000, "thequickbrown" * 1200, "🍎🌀" * 8000, "!" * 16_000])
def test_the_time_for_a_long_word_is_not_quadratic(word):
    begin = time.thread_time()
    assert len(Tokenizer().encode(word)) > 100
    assert time.thread_time() - begin < 2
