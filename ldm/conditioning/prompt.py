r"""The syntax of prompts: texts with weights, and blends of several texts.

A plain prompt needs none of this:

- ``(red:1.3) apple``: "red" with weight 1.3. Nested weights multiply: ``((red:1.2) apple:1.5)`` is "red"
  with 1.8 and " apple" with 1.5. Weight 1 changes nothing.
- ``a {cat:3|dog} face``: a blend of "a cat face" and "a dog face" with the shares 3/4 and 1/4; an alternative
  without a number has 1. Several braces give every combination, with the product of their shares. Braces
  without a bar are text; blends do not nest.
- ``\( \) \{ \} \| \: \\`` are these characters themselves; before any other character a backslash is text.

What stands behind the last colon of a parenthesis is its weight if it is a number from 0 to 10, a word stands
before the colon, and the number has a point where a digit stands before the colon: ``(iphone 14:1.3)``. All
else is text: ``apple (fruit)``, ``(ratio 16:9)``, ``(John 3:16)``, ``(style:anime)``, ``(red:11)``. Shares
follow the same rule, but need no word.

A weight whose parenthesis is not opened or closed, and a blend that is not closed, raise ValueError. So do a
prompt of more than 16,384 characters, more than 64 combinations or 65,536 characters in them together, and
nested weights that multiply to more than 1000.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from ldm.conditioning.words import words_in
from ldm.support.text import shown

ESCAPED = "(){}|:\\"
ESCAPE = re.compile(r"\\([(){}|:\\])")
SURROGATE = re.compile("[\ud800-\udfff]")
NUMBER = re.compile(r"\s*\+?(\d+(\.\d*)?|\.\d+)\s*")
WORD = re.compile(r"[^\d\s!-/:-@\[-`{-~]+")  # no digit, space or ASCII punctuation
WEIGHT_TOKENS = re.compile(rf"[():]|{WORD.pattern}")
UNCLOSED = re.compile(r":([\d.]+)")
HIGHEST_WEIGHT = 10.0
HIGHEST_PRODUCT = 1000.0  # of nested weights
MAX_BRANCHES = 64  # the largest number of alternatives of a prompt
MAX_CHARACTERS = 2**14  # of a prompt
MAX_COMBINED = 2**16  # characters of all alternatives together


def escape_prompt(text: str) -> str:
    """Return a prompt that stands for a text as it is, whatever signs of the syntax it has."""
    return re.sub(r"([(){}|:\\])", r"\\\1", text)


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

    The time is linear in the length of the prompt.

    Raises:
        ValueError: If the prompt is malformed, too long or no text, naming it and what was expected.
    """
    check_text(prompt, "prompt")
    if not any(char in prompt for char in ESCAPED):
        return (Branch(share=1.0, spans=(Span(text=prompt),)),)
    try:
        return tuple(
            Branch(share=share, spans=_weighted_spans(marked))
            for share, marked in _expand_blends(_unescape(prompt))
        )
    except ValueError as error:
        raise ValueError(f"prompt {shown(prompt)}: {error}") from None


def check_text(text: str, name: str) -> None:
    """Raise ValueError for more than `MAX_CHARACTERS` characters, or a lone surrogate, which no text has."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{name} {shown(text)}: expected at most {MAX_CHARACTERS} characters, got {len(text)}"
        )
    if (found := SURROGATE.search(text)) is not None:
        raise ValueError(
            f"{name} {shown(text)}: character {found.start()} is a lone surrogate; it was no valid UTF-8"
        )


def plain_texts(prompt: str) -> list[str]:
    """Return the texts of a prompt's alternatives, without weights."""
    return [branch.text for branch in parse(prompt)]


class _Marked(NamedTuple):
    """A text without its escapes, and the same with a backslash in place of each escaped character."""

    text: str
    marks: str  # only here are ( ) { } | : syntax

    def part(self, start: int, end: int) -> _Marked:
        return _Marked(self.text[start:end], self.marks[start:end])


def _unescape(prompt: str) -> _Marked:
    return _Marked(ESCAPE.sub(r"\1", prompt), ESCAPE.sub(r"\\", prompt))


def _expand_blends(prompt: _Marked) -> list[tuple[float, _Marked]]:
    """Return every combination of the alternatives of all blends, with shares that sum to 1."""
    parts: list[list[tuple[float, _Marked]]] = []
    count, end = 1, 0
    for opened, *bars, closed in _blends(prompt.marks):
        parts.append([(1.0, prompt.part(end, opened))])
        parts.append(_shares([prompt.part(a + 1, b) for a, b in itertools.pairwise((opened, *bars, closed))]))
        count, end = count * len(parts[-1]), closed + 1
        if count > MAX_BRANCHES:
            raise ValueError(
                f"its blends have at least {count} combinations, expected at most {MAX_BRANCHES}"
            )
    parts.append([(1.0, prompt.part(end, len(prompt.text)))])
    total = sum(count // len(part) * len(side.text) for part in parts for _, side in part)
    if total > MAX_COMBINED:
        raise ValueError(f"expected at most {MAX_COMBINED} characters in all combinations, got {total}")
    found = []
    for chosen in itertools.product(*parts):
        share = 1.0
        for part, _ in chosen:
            share *= part
        text, marks = ("".join(strings) for strings in zip(*(side for _, side in chosen), strict=True))
        found.append((share, _Marked(text, marks)))
    return found


def _blends(marks: str) -> list[list[int]]:
    """Return the indices of the opening brace, the bars and the closing brace of each blend."""
    found: list[list[int]] = []
    signs: list[int] = []  # of the brace that is open
    for sign in re.finditer(r"[{|}]", marks):
        if sign[0] == "{":
            if len(signs) > 1:
                raise ValueError(r"blends do not nest: write \{ for a brace that is text")
            signs = [sign.start()]
        elif signs and sign[0] == "|":
            signs.append(sign.start())
        elif signs:
            if len(signs) > 1:
                found.append([*signs, sign.start()])
            signs = []
    if len(signs) > 1:
        raise ValueError(r"a blend is not closed: expected } as in {cat|dog}, or \{ for a brace that is text")
    return found


def _shares(sides: list[_Marked]) -> list[tuple[float, _Marked]]:
    """Return the alternatives of a blend, each with its share."""
    found = []
    for side in sides:
        colon = side.marks.rfind(":")
        number = _number(side.marks, colon, len(side.marks)) if colon > side.marks.rfind(")") else None
        found.append((1.0, side) if number is None else (number, side.part(0, colon)))
    total = sum(share for share, _ in found)
    if total <= 0:
        raise ValueError("the shares of a blend sum to 0, expected a positive sum")
    return [(share / total, side) for share, side in found]


def _number(marks: str, colon: int, end: int) -> float | None:
    """Return the number between a colon and an index; None if it is text (the module states the rule)."""
    text = marks[colon + 1 : end]
    if not NUMBER.fullmatch(text) or float(text) > HIGHEST_WEIGHT:
        return None
    before = colon - 1
    while before > 0 and marks[before].isspace():
        before -= 1
    ratio = before >= 0 and marks[before].isdecimal() and "." not in text  # 16:9, 10:05
    return None if ratio else float(text)


class _Group(NamedTuple):
    """Parentheses with a weight: the indices of the closing one and of the colon."""

    weight: float
    colon: int
    close: int


def _weighted_spans(prompt: _Marked) -> tuple[Span, ...]:
    """Return the texts of one alternative with their weights; neighbours of the same weight are joined."""
    pieces: list[tuple[float, str]] = []
    whole = _Group(1.0, len(prompt.text), len(prompt.text))
    inside, position = [whole], 0

    def leave() -> None:
        nonlocal position
        group = inside.pop()
        pieces.append((group.weight, prompt.text[position : group.colon]))
        position = group.close + 1

    for start, group in sorted(_weight_groups(prompt).items()):
        while start > inside[-1].colon:
            leave()
        pieces.append((inside[-1].weight, prompt.text[position:start]))
        weight = inside[-1].weight * group.weight
        if weight > HIGHEST_PRODUCT:
            raise ValueError(f"nested weights multiply to {weight:g}, expected at most {HIGHEST_PRODUCT:g}")
        inside.append(group._replace(weight=weight))
        position = start + 1
    while inside:
        leave()
    runs = itertools.groupby((piece for piece in pieces if piece[1]), key=lambda piece: piece[0])
    spans = tuple(Span(text="".join(text for _, text in run), weight=weight) for weight, run in runs)
    return spans or (Span(text=""),)


def _weight_groups(prompt: _Marked) -> dict[int, _Group]:
    """Return the parentheses that hold a weight, by opening index."""
    found: dict[int, _Group] = {}
    opened: list[int] = []
    colon = close = word = before = -1  # the last of each, and the last word before the last colon
    for sign in WEIGHT_TOKENS.finditer(prompt.marks):
        i = sign.start()
        if sign[0] == "(":
            opened.append(i)
        elif sign[0] == ":":
            colon, before = i, word
        elif sign[0] != ")":
            word = i
        elif opened:
            start = opened.pop()
            weight = _number(prompt.marks, colon, i) if close < colon and start < before else None
            if weight is not None:
                found[start] = _Group(weight, colon, i)
            close = i
        else:
            if close < colon and before >= 0 and _number(prompt.marks, colon, i) is not None:
                raise ValueError(
                    r"a weight has no opening parenthesis: expected (red:1.3), or \) for a parenthesis that"
                    r" is text"
                )
            close = i
    if opened and _has_weight(prompt.marks, opened[0] + 1, {group.colon for group in found.values()}):
        raise ValueError(r"a weight is not closed: expected (red:1.3), or \( for a parenthesis that is text")
    return found


def _has_weight(marks: str, begin: int, used: Collection[int]) -> bool:
    """Return whether a weight stands directly behind a colon that is not in `used`, after index `begin`."""
    word = WORD.search(marks, begin)
    return word is not None and any(
        number.start() not in used and _number(marks, number.start(), number.end()) is not None
        for number in UNCLOSED.finditer(marks, word.end())
    )


def unknown_words(prompt: str, known: frozenset[str]) -> list[str]:
    """Return the words of a prompt that are not among the known ones, in order, each once."""
    return [
        word
        for word in dict.fromkeys(word for text in plain_texts(prompt) for word in words_in(text))
        if word not in known
    ]
