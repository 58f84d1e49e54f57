r"""The syntax of prompts: texts with weights, and blends of several texts.

A plain prompt needs none of this:

- ``(red:1.3) apple``: "red" with weight 1.3, a number from 0 to 10. Nested weights multiply:
  ``((red:1.2) apple:1.5)`` is "red" with 1.8 and " apple" with 1.5. Weight 1 changes nothing. Parentheses
  without a weight are text: ``apple (fruit)``. So are those with nothing but digits, spaces and ASCII
  punctuation before the colon: ``(16:9)``, ``(10:30)``.
- ``a {cat:3|dog} face``: a blend of "a cat face" and "a dog face" with the shares 3/4 and 1/4; an alternative
  without a number has 1. Several braces give every combination, with the product of their shares. Braces
  without a bar are text; blends do not nest.
- ``\( \) \{ \} \| \: \\`` are these characters themselves; before any other character a backslash is text.

A parenthesis or brace that holds a weight or a bar but is not opened or closed, and a weight that is not a
number in its range, raise ValueError.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

from ldm.conditioning.words import words_in

ESCAPED = "(){}|:\\"
HIGHEST_WEIGHT = 10.0
NUMERIC = re.compile(r"[\d\s!-/:-@\[-`{-~]*")  # digits, spaces and ASCII punctuation
MAX_BRANCHES = 64  # the largest number of alternatives of a prompt
Chars = list[tuple[str, bool]]  # characters, and whether each was escaped


@dataclass(frozen=True, kw_only=True)
class Span:
    """A text and its weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One alternative of a prompt.

    Args:
        share: Its share; those of all alternatives of a prompt sum to 1.
        spans: Its texts and their weights, at least one; neighbours differ in weight.
    """

    share: float
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The text without weights."""
        return "".join(span.text for span in self.spans)


def parse(prompt: str) -> tuple[Branch, ...]:
    """Return the alternatives of a prompt, at least one; the module describes the syntax.

    Raises:
        ValueError: If the prompt is malformed, naming it and what was expected.
    """
    if not any(char in prompt for char in ESCAPED):
        return (Branch(share=1.0, spans=(Span(text=prompt),)),)
    try:
        branches = [
            Branch(share=share, spans=_weighted_spans(chars))
            for share, chars in _expand_blends(_unescape(prompt))
        ]
    except ValueError as error:
        raise ValueError(f"prompt {prompt!r}: {error}") from None
    return tuple(branches)


def plain_texts(prompt: str) -> list[str]:
    """Return the texts of a prompt's alternatives, without weights."""
    return [branch.text for branch in parse(prompt)]


def _unescape(prompt: str) -> Chars:
    """Return the characters of a prompt without escaping backslashes, each marked if it was escaped."""
    found, i = [], 0
    while i < len(prompt):
        escaped = prompt[i] == "\\" and prompt[i + 1 : i + 2] in tuple(ESCAPED)
        found.append((prompt[i + escaped], bool(escaped)))
        i += 1 + escaped
    return found


def _expand_blends(chars: Chars) -> list[tuple[float, Chars]]:
    """Return every combination of the alternatives of all blends, with shares that sum to 1."""
    parts: list[list[tuple[float, Chars]]] = []
    i = 0
    while i < len(chars):
        close = _blend_end(chars, i) if chars[i] == ("{", False) else None
        if close is None:
            parts.append([(1.0, [chars[i]])])
            i += 1
            continue
        sides = [(*_trailing_number(side, "share"), side) for side in _split_at_bars(chars[i + 1 : close])]
        total = sum(share for share, _, _ in sides)
        if total <= 0:
            raise ValueError("the shares of a blend sum to 0, expected a positive sum")
        parts.append([(share / total, side[:colon]) for share, colon, side in sides])
        i = close + 1
    count = math.prod(len(part) for part in parts)
    if count > MAX_BRANCHES:
        raise ValueError(f"its blends have {count} combinations, expected at most {MAX_BRANCHES}")
    found = []
    for chosen in itertools.product(*parts):
        share, text = 1.0, []
        for part, side in chosen:
            share *= part
            text += side
        found.append((share, text))
    return found


def _blend_end(chars: Chars, start: int) -> int | None:
    """Return the index of the brace that closes the blend opened at `start`; None if they are text."""
    bar = False
    for i in range(start + 1, len(chars)):
        if chars[i] == ("{", False):
            if bar:
                raise ValueError(r"blends do not nest: write \{ for a brace that is text")
            return None
        if chars[i] == ("}", False):
            return i if bar else None
        bar = bar or chars[i] == ("|", False)
    if bar:
        raise ValueError(r"a blend is not closed: expected } as in {cat|dog}, or \{ for a brace that is text")
    return None


def _split_at_bars(chars: Chars) -> list[Chars]:
    """Return the alternatives of a blend."""
    sides: list[Chars] = [[]]
    for char in chars:
        if char == ("|", False):
            sides.append([])
        else:
            sides[-1].append(char)
    return sides


def _trailing_number(chars: Chars, what: str) -> tuple[float, int | None]:
    """Return the number after the last colon and the colon's index; (1, None) if no number is meant.

    Args:
        chars: The inside of parentheses, or an alternative of a blend.
        what: "weight" or "share", for error messages.
    """
    colon = max((i for i, char in enumerate(chars) if char == (":", False)), default=None)
    if colon is None or (")", False) in chars[colon:]:
        return 1.0, None
    before = "".join(char for char, _ in chars[:colon])
    if what == "weight" and NUMERIC.fullmatch(before):
        return 1.0, None  # "16:9"
    text = "".join(char for char, _ in chars[colon + 1 :])
    if re.fullmatch(r"\s*\+?(\d+\.?\d*|\.\d+)\s*", text) and float(text) <= HIGHEST_WEIGHT:
        return float(text), colon
    if text[:1].isspace() and not re.match(r"\s*[-+.]?\d", text):
        return 1.0, None  # "note: blue"
    raise ValueError(
        rf"{what} {text.strip()!r}: expected a number from 0 to {HIGHEST_WEIGHT:g}, as in (red:1.3), "
        r"or \: for a colon that is text"
    )


def _weighted_spans(chars: Chars) -> tuple[Span, ...]:
    """Return the texts of one alternative with their weights; neighbours of the same weight are joined."""
    opened = _weight_groups(chars)
    pieces: list[tuple[str, float]] = []

    def walk(start: int, end: int, weight: float) -> None:
        i = start
        while i < end:
            if i in opened:
                close, factor, stop = opened[i]
                walk(i + 1, stop, weight * factor)
                i = close + 1
            else:
                pieces.append((chars[i][0], weight))
                i += 1

    walk(0, len(chars), 1.0)
    runs = itertools.groupby(pieces, key=lambda piece: piece[1])
    return tuple(Span(text="".join(char for char, _ in run), weight=weight) for weight, run in runs) or (
        Span(text=""),
    )


def _weight_groups(chars: Chars) -> dict[int, tuple[int, float, int]]:
    """Return the parentheses that hold a weight, by opening index: closing index, weight, end of the text."""
    found: dict[int, tuple[int, float, int]] = {}
    stack, text = (
        [],
        ["\\" if escaped else char for char, escaped in chars],
    )  # escaped characters are not syntax
    for i, char in enumerate(text):
        if char == "(":
            stack.append(i)
        elif char == ")" and stack:
            start = stack.pop()
            weight, colon = _trailing_number(chars[start + 1 : i], "weight")
            if colon is not None:
                found[start] = (i, weight, start + 1 + colon)
                text[start : i + 1] = " " * (i + 1 - start)
        elif char == ")" and re.search(r":\s*[\d.]+\s*$", "".join(text[:i])):
            raise ValueError(
                r"a weight has no opening parenthesis: expected (red:1.3), or \) for a parenthesis that is"
                r" text"
            )
    if stack and re.search(r":\s*\d", "".join(text[stack[0] + 1 :])):
        raise ValueError(r"a weight is not closed: expected (red:1.3), or \( for a parenthesis that is text")
    return found


def unknown_words(prompt: str, known: frozenset[str]) -> list[str]:
    """Return the words of a prompt that are not among the known ones, in order, each once."""
    return [
        word
        for word in dict.fromkeys(word for text in plain_texts(prompt) for word in words_in(text))
        if word not in known
    ]
