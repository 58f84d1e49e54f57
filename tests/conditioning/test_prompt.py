"""The syntax of prompts: weights, blends, escapes, and malformed prompts."""

from __future__ import annotations

import time

import pytest

from ldm.conditioning.prompt import MAX_CHARACTERS, parse, plain_texts


def parsed(prompt):
    """Return the shares of a prompt's alternatives, with their texts and weights."""
    return [
        (branch.share, [(span.text, round(span.weight, 6)) for span in branch.spans])
        for branch in parse(prompt)
    ]


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("(red:1.3) apple", [("red", 1.3), (" apple", 1)]),
        ("a (red apple:0.5)", [("a ", 1), ("red apple", 0.5)]),
        ("((red:1.2) apple:1.5)", [("red", 1.8), (" apple", 1.5)]),
        ("(a (red: 2 ) apple)", [("(a ", 1), ("red", 2), (" apple)", 1)]),
        ("(red:1.2)(blue:1.2)", [("redblue", 1.2)]),  # neighbours of equal weight are joined
        ("(at 12\\:30:.5)", [("at 12:30", 0.5)]),
        ("(((red:1.1)", [("((", 1), ("red", 1.1)]),
        ("(iphone 14:1.3)", [("iphone 14", 1.3)]),
        ("(a 3:2 print:1.2)", [("a 3:2 print", 1.2)]),
        ("(John 3:16:1.)", [("John 3:16", 1)]),
        ("(style:anime:0)", [("style:anime", 0)]),
    ],
)
def test_weights(prompt, spans):
    assert parsed(prompt) == [(1, spans)]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", ""),
        ("a red apple", "a red apple"),
        ("apple (fruit)", "apple (fruit)"),
        ("(note: blue)", "(note: blue)"),
        ("a photo (16:9)", "a photo (16:9)"),
        ("at (10:30), (3.5:2)", "at (10:30), (3.5:2)"),
        *((text, text) for text in ("(ratio 16:9)", "(aspect 2.35:1)", "(f/2:8)", "(ratio 16 : 9)")),
        *(
            (text, text)
            for text in ("(John 3:16)", "(time 10:30)", "at 10:30)", "(at 10:05", "(see John 3:16")
        ),
        *((text, text) for text in ("(style:anime)", "(red:11)", "(ISO:100)", "(red:)", "(red:abc)", "(:3")),
        *((text, text) for text in ("(red:1,3)", "(red:-1)", "(red:nan)", "(cat: 1.2.3)", "(cat:-)", "(:3)")),
        *((text, text) for text in ("(red:" + "9" * 5000 + ")", "(note: 3 apples", "(1:1.85)", "(red:１１)")),
        (":) sad :(", ":) sad :("),
        ("12:30, {x}, a|b", "12:30, {x}, a|b"),
        ("C:\\dir", "C:\\dir"),
        (r"\(red:1.3\)", "(red:1.3)"),
        (r"\{a\|b\}", "{a|b}"),
        (r"{a\|b}", "{a|b}"),
        ("(red:1) apple", "red apple"),
        ("((red:2):0.5) apple", "red apple"),
        ("\x00 ‏שלום 🍎", "\x00 ‏שלום 🍎"),
        (r"back\\slash", r"back\slash"),
    ],
)
def test_other_characters_are_text_and_weight_one_changes_nothing(prompt, text):
    assert parsed(prompt) == [(1, [(text, 1)])]


def test_blends_give_every_combination_with_shares_that_sum_to_one():
    assert parsed("a {cat:3|dog} face") == [(0.75, [("a cat face", 1)]), (0.25, [("a dog face", 1)])]
    both = parsed("{a|b:3} {c|d}")
    assert [share for share, _ in both] == [0.125, 0.125, 0.375, 0.375]
    assert plain_texts("{a|b:3} {c|d}") == ["a c", "a d", "b c", "b d"]
    assert parsed("{(red:1.3)|blue} apple") == [
        (0.5, [("red", 1.3), (" apple", 1)]),
        (0.5, [("blue apple", 1)]),
    ]
    assert plain_texts("{16:9|at 10:30|style:anime|a:11}") == ["16:9", "at 10:30", "style:anime", "a:11"]
    assert parsed("{:3|cat}") == [(0.75, [("", 1)]), (0.25, [("cat", 1)])]
    assert parsed("{cat|}") == [(0.5, [("cat", 1)]), (0.5, [("", 1)])]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(red:1.3 apple", r"prompt '\(red:1.3 apple': a weight is not closed"),
        ("((red:2) apple:.5", "not closed"),
        ("red:1.3)", "no opening parenthesis"),
        ("a (red) apple: 2 )", "no opening parenthesis"),
        ("{a|b", "not closed"),
        ("{a|{b|c}}", "do not nest"),
        ("{a:0|b:0}", "sum to 0"),
        ("{a|b}" * 7, "128 combinations"),
    ],
)
def test_malformed_weights_and_blends_raise(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse(prompt)


N = MAX_CHARACTERS
LONG = {
    "nested weights": "(" * (N // 5) + "a" + ":1)" * (N // 5),
    "nested text": "(" * (N // 2) + "a" + ")" * (N // 2 - 1),
    "weights": "(a:1.1)" * (N // 7),
    "closing": " )" * (N // 2),
    "opening": "(a:" * (N // 3),
    "digits": "(a: " + "1" * (N - 6) + "x)",
    "spaces": "(a:" + " " * (N - 5) + ")",
    "braces": "{" * N,
    "empty braces": "{}" * (N // 2),
    "bars": "{" + "|" * (N - 1),
    "blends": "{a|b}" * (N // 5),
    "colons": ":" * N,
    "escapes": r"\(" * (N // 2),
    "backslashes": "\\" * N,
}


@pytest.mark.parametrize("kind", LONG)
def test_the_time_is_linear_and_messages_are_short(kind):
    took = []
    for _ in range(3):  # the least, and of this thread alone: others of the process may be at work
        begin = time.thread_time()
        try:
            assert parse(LONG[kind])
        except ValueError as error:
            assert len(str(error)) < 1000
        took.append(time.thread_time() - begin)
    assert min(took) < 0.5


def test_weights_may_be_nested_as_deep_as_the_prompt_is_long():
    deep = "(" * 2000 + "a" + ":1)" * 2000
    assert parsed(f"{deep} b") == [(1, [("a b", 1)])]
    assert parsed("(" * 20 + "a" + ":1.1)" * 20) == [(1, [("a", round(1.1**20, 6))])]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a" * (N + 1), f"expected at most {N} characters, got {N + 1}"),
        ("{1a|b|c|d|e|f|g|h}" + "{a|b}" * 3 + "c" * 1100, "at most 65536 characters in all comb"),
        ("{a|b}" * 3000, "its blends have at least 128 combinations, expected at most 64"),
        ("((((a:10):10):10):10)", r"nested weights multiply to 10000, expected at most 1000"),
        ("a \udcff b", r"prompt 'a \\udcff b': character 2 is a lone surrogate"),
    ],
)
def test_prompts_beyond_the_limits_raise(prompt, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(prompt)
    assert len(str(caught.value)) < 1000


def test_weights_before_and_after_text_keep_their_order():
    assert parsed("a (b (c:2) d:0.5) e (f:3)") == [
        (1, [("a ", 1), ("b ", 0.5), ("c", 1), (" d", 0.5), (" e ", 1), ("f", 3)])
    ]
