"""Long prompts, weights and blends through a small tower: closed forms, independence of the batch."""

from __future__ import annotations

import pytest
import torch
from tiny_latent_diffusion import tiny_model

from ldm.conditioning.bert import BertConditioner
from ldm.conditioning.conditioner import TextConditioner, TextConvention, TwoTowers
from ldm.conditioning.prompt import Span
from ldm.conditioning.reading import split_windows
from ldm.models.clip.towers import TextConfig, TextTower
from ldm.models.text.bert import BertConfig, LDMBert
from ldm.models.text.bpe import Tokenizer
from ldm.models.text.wordpiece import (
    WORDPIECE_END,
    WORDPIECE_PAD,
    WORDPIECE_START,
    WORDPIECE_UNKNOWN,
    WordPiece,
)

PADDED = TextConvention(length=12, pad=49407, pooled=True)
MASKED = TextConvention(length=None, pad=0, masked=True, pooled=True)
LONG = (  # 18 tokens: two windows, of 10 and 8
    "a cat and a dog and a red apple on a blue table by the sea at night"
)


def tower(convention, context_length=12):
    torch.manual_seed(0)
    network = TextTower(
        TextConfig(vocab_size=49408, context_length=context_length, width=16, layers=2, heads=2, embed_dim=16)
    )
    torch.nn.init.normal_(network.positional_embedding, std=0.5)
    return TextConditioner(network.eval(), Tokenizer(), convention)


@pytest.fixture(scope="module", params=[PADDED, MASKED], ids=["padded", "masked"])
def text(request):
    return tower(request.param)


@torch.no_grad()
def test_a_prompt_of_one_window_gets_the_tower_s_states(text):
    ids = Tokenizer()(
        ["a red apple", "a cat"], context_length=text.convention.length, pad=text.convention.pad
    )
    out = text.tower(ids)
    for prompts in (["a red apple", "a cat"], ["(a red:1) apple", "{a cat}"[1:-1]]):
        cond = text(prompts)
        assert torch.equal(cond.context, out.tokens) and torch.equal(cond.pooled, out.pooled)


@torch.no_grad()
def test_the_windows_of_a_long_prompt_follow_each_other(text):
    words = LONG.split()
    cond, parts = text([LONG]), [text([" ".join(words[:10])]), text([" ".join(words[10:])])]
    assert torch.allclose(cond.context, torch.cat([part.context for part in parts], 1), atol=1e-6)
    assert torch.allclose(cond.pooled, (10 * parts[0].pooled + 8 * parts[1].pooled) / 18, atol=1e-6)
    assert cond.context_mask is None or bool(cond.context_mask.all())


@torch.no_grad()
def test_weights_extrapolate_from_the_empty_prompt(text):
    plain, empty = text(["a red apple"]), text([""])
    # the state at the position of "red", or the last one
    e = empty.context[0, 2] if text.convention.length else empty.context[0, -1]
    for weight in (0.0, 0.5, 1.7):
        cond = text([f"a (red:{weight}) apple"])
        assert torch.allclose(cond.context[0, 2], e + weight * (plain.context[0, 2] - e), atol=1e-5)
        assert torch.equal(cond.context[0, [0, 1, 3]], plain.context[0, [0, 1, 3]])
        without = text(["a apple"]).pooled
        assert torch.allclose(cond.pooled, plain.pooled + (weight - 1) * (plain.pooled - without), atol=1e-5)
    assert torch.allclose(text(["a (red:0) apple"]).pooled, text(["a apple"]).pooled, atol=1e-5)


@torch.no_grad()
def test_a_blend_is_the_mean_of_its_alternatives(text):
    a, b = text(["a red apple"]), text(["a blue apple"])
    cond = text(["a {red:3|blue} apple"])
    assert torch.allclose(cond.context, 0.75 * a.context + 0.25 * b.context, atol=1e-6)
    assert torch.allclose(cond.pooled, 0.75 * a.pooled + 0.25 * b.pooled, atol=1e-6)
    alone = text(["{cat:1|dog:0}"])
    assert torch.allclose(alone.pooled, text(["cat"]).pooled, atol=1e-6)
    longer = text(["{a cat|" + LONG + "}"])  # alternatives of different lengths
    assert longer.context.shape[1] == text([LONG]).context.shape[1]
    assert torch.allclose(longer.pooled, (text(["a cat"]).pooled + text([LONG]).pooled) / 2, atol=1e-6)


@torch.no_grad()
def test_a_condition_does_not_depend_on_the_other_prompts(text):
    prompts = ["a cat", LONG, "(red:1.5) apple", "", "{a cat|" + LONG + "}"]
    batch = text(prompts)
    for i, prompt in enumerate(prompts):
        alone = text([prompt])
        own = batch.context[i] if batch.context_mask is None else batch.context[i][batch.context_mask[i]]
        expected = alone.context[0] if alone.context_mask is None else alone.context[0][alone.context_mask[0]]
        assert torch.allclose(own, expected, atol=1e-5) and torch.allclose(
            batch.pooled[i], alone.pooled[0], atol=1e-5
        )


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 9, 10, 11, 20, 21, 75, 76, 150, 300])
def test_every_token_of_1_to_300_has_its_position(text, n):
    prompt = " ".join(["cat", "dog", "red", "sea"][i % 4] for i in range(n))
    cond, found = text([prompt]), text.places(prompt)
    assert [word for word, _ in found] == prompt.split()
    places = [place for _, own in found for place in own]
    assert len(places) == n == len(set(places)) and max(places) < cond.context.shape[1]
    assert torch.equal(text([prompt]).context, cond.context)
    changed = text([" ".join([*prompt.split()[:-1], "moon"])])  # the last word is not cut off
    differs = (changed.context - cond.context).abs().amax(-1)[0] > 1e-6
    assert bool(differs[places[-1]]) and not bool(differs[: places[-1]].any())


def test_a_word_is_divided_only_if_it_is_longer_than_a_window():
    words = {"ab": [("a", (1,)), ("b", (2, 3))], "long": [("long", tuple(range(7)))]}
    assert [w.ids for w in split_windows([Span(text="ab"), Span(text="ab")], words.get, 4)] == [
        [1, 2, 3, 1],
        [2, 3],
    ]
    assert [w.ids for w in split_windows([Span(text="ab"), Span(text="ab")], words.get, 5)] == [
        [1, 2, 3, 1],
        [2, 3],
    ]
    assert [w.ids for w in split_windows([Span(text="ab"), Span(text="long")], words.get, 3)] == [
        [1, 2, 3],
        [0, 1, 2],
        [3, 4, 5],
        [6],
    ]
    assert [w.ids for w in split_windows([Span(text="")], lambda text: [], 4)] == [[]]


@torch.no_grad()
@pytest.mark.parametrize(
    "prompt",
    ["🍎", "שלום עולם", "‏مرحبا‎ red", "\x00\x07 apple \x1b[31m", "x" * 500, "é" * 200, " \n\t ", "(🍎:1.3)"],
)
def test_any_text_is_encoded_deterministically(text, prompt):
    first, second = text([prompt]), text([prompt])
    assert torch.equal(first.context, second.context) and bool(first.context.isfinite().all())


def test_unknown_words_are_named():
    small = tiny_model().text
    assert small.unknown("a (red:1.3) {apple|zeppelin}, 🍎 \x07") == ["zeppelin", ",", "🍎", "\x07"]
    assert (
        small.unknown("a red apple") == []
        and tower(MASKED).unknown("🍎 zeppelin") == []
        and tower(MASKED).unknown("a\x00b") == ["\x00"]
    )
    bert = BertConditioner(
        LDMBert(BertConfig(vocabulary=10, width=8, layers=1, heads=1, head_dim=8, length=5)),
        WordPiece([WORDPIECE_PAD, WORDPIECE_UNKNOWN, WORDPIECE_START, WORDPIECE_END, "a", "##b"]),
    )
    assert bert.unknown("(a:2) ab zeppelin") == ["zeppelin"]
    assert bert(["a ab a ab"]).context.shape == (1, 10, 8) and bert.places("a ab ab") == [
        ("a", [1]),
        ("ab", [2, 3]),
        ("ab", [6, 7]),
    ]


@torch.no_grad()
def test_both_towers_of_sdxl_use_the_same_windows():
    towers = TwoTowers(tower(PADDED), tower(PADDED))
    cond = towers([LONG, "a cat"])
    assert cond.context.shape == (2, 24, 32) and cond.context_mask.sum(1).tolist() == [24, 12]
    assert towers.places(LONG)[11] == ("blue", [14])
