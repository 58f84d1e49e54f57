r"""What a prompt says: texts with weights, and blends of several.

Syntax, of which nothing is needed for a plain prompt:

- ``(red:1.3) apple``: "red" with weight 1.3, a number from 0 to 10. Weights nest by multiplication:
  ``((red:1.2) apple:1.5)`` is "red" with 1.8 and " apple" with 1.5. Weight 1 changes nothing. Parentheses
  without a weight are text: ``apple (fruit)``.
- ``a {cat:3|dog} face``: a blend of "a cat face" and "a dog face" with the shares 3/4 and 1/4; an alternative
  without a number has 1. Several braces make every combination, with the product of their shares. Braces
  without a bar are text; blends do not nest.
- ``\( \) \{ \} \| \: \\`` are these characters themselves; before anything else a backslash is text.

ValueError where a parenthesis or brace that holds a weight or a bar is not closed or not opened, or a weight
is no number in its range.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from ldm.conditioning.words import words

ESCAPED = "(){}|:\\"
HIGHEST_WEIGHT, BRANCHES = 10.0, 64  # the largest weight, and the most alternatives that a prompt may come to
Chars = list[tuple[str, bool]]  # characters, and whether each was escaped


@dataclass(frozen=True, kw_only=True)
class Span:
    """A text and its weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One of a prompt's alternatives: its share (those of a prompt sum to 1) and its spans, neighbours of
    which differ in weight."""

    share: float
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The text without its weights."""
        return "".join(span.text for span in self.spans)


def parse(prompt: str) -> tuple[Branch, ...]:
    """The alternatives of a prompt, at least one; see the module for the syntax and its errors."""
    if not any(char in prompt for char in ESCAPED):
        return (Branch(share=1.0, spans=(Span(text=prompt),)),)
    try:
        branches = [
            Branch(share=share, spans=_spans(chars)) for share, chars in _alternatives(_unescape(prompt))
        ]
    except ValueError as error:
        raise ValueError(f"prompt {prompt!r}: {error}") from None
    return tuple(branches)


def plain_texts(prompt: str) -> list[str]:
    """The texts of a prompt's alternatives, without weights."""
    return [branch.text for branch in parse(prompt)]


def _unescape(prompt: str) -> Chars:
    found, i = [], 0
    while i < len(prompt):
        escaped = prompt[i] == "\\" and prompt[i + 1 : i + 2] in tuple(ESCAPED)
        found.append((prompt[i + escaped], bool(escaped)))
        i += 1 + escaped
    return found


def _alternatives(chars: Chars) -> list[tuple[float, Chars]]:
    """The combinations of all blends, with shares that sum to 1."""
    parts: list[list[tuple[float, Chars]]] = []
    i = 0
    while i < len(chars):
        close = _blend_end(chars, i) if chars[i] == ("{", False) else None
        if close is None:
            parts.append([(1.0, [chars[i]])])
            i += 1
            continue
        sides = [(*_weighed(side, "share"), side) for side in _split(chars[i + 1 : close])]
        total = sum(share for share, _, _ in sides)
        if total <= 0:
            raise ValueError("the shares of a blend sum to 0, expected more")
        parts.append([(share / total, side[:colon]) for share, colon, side in sides])
        i = close + 1
    if _count(parts) > BRANCHES:
        raise ValueError(f"its blends come to {_count(parts)} combinations, expected at most {BRANCHES}")
    found = []
    for chosen in itertools.product(*parts):
        share, text = 1.0, []
        for part, side in chosen:
            share *= part
            text += side
        found.append((share, text))
    return found


def _count(parts: list[list[tuple[float, Chars]]]) -> int:
    count = 1
    for part in parts:
        count *= len(part)
    return count


def _blend_end(chars: Chars, start: int) -> int | None:
    """Where the blend that begins here is closed; None if these braces are text."""
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


def _split(chars: Chars) -> list[Chars]:
    """The alternatives between bars."""
    sides: list[Chars] = [[]]
    for char in chars:
        if char == ("|", False):
            sides.append([])
        else:
            sides[-1].append(char)
    return sides


def _weighed(chars: Chars, what: str) -> tuple[float, int | None]:
    """The number behind the last colon, and where that colon stands; 1 and None where there is none, or words
    stand behind it."""
    colon = max((i for i, char in enumerate(chars) if char == (":", False)), default=None)
    if colon is None or (")", False) in chars[colon:]:
        return 1.0, None
    text = "".join(char for char, _ in chars[colon + 1 :])
    if re.fullmatch(r"\s*\+?(\d+\.?\d*|\.\d+)\s*", text) and float(text) <= HIGHEST_WEIGHT:
        return float(text), colon
    if text[:1].isspace() and not re.match(r"\s*[-+.]?\d", text):
        return 1.0, None  # "note: blue"
    raise ValueError(
        rf"{what} {text.strip()!r}: expected a number from 0 to {HIGHEST_WEIGHT:g}, as in (red:1.3), "
        r"or \: for a colon that is text"
    )


def _spans(chars: Chars) -> tuple[Span, ...]:
    """The texts of one alternative with their weights; neighbours of one weight are one."""
    opened = _groups(chars)
    pieces: list[tuple[str, float]] = []

    def walk(start: int, end: int, weight: float) -> None:
        i = start
        while i < end:
            if i in opened:
                close, own, stop = opened[i]
                walk(i + 1, stop, weight * own)
                i = close + 1
            else:
                pieces.append((chars[i][0], weight))
                i += 1

    walk(0, len(chars), 1.0)
    runs = itertools.groupby(pieces, key=lambda piece: piece[1])
    return tuple(Span(text="".join(char for char, _ in run), weight=weight) for weight, run in runs) or (
        Span(text=""),
    )


def _groups(chars: Chars) -> dict[int, tuple[int, float, int]]:
    """The parentheses that hold a weight: where each opens → (where it closes, its weight, where its text
    ends)."""
    found: dict[int, tuple[int, float, int]] = {}
    stack, text = [], ["\\" if escaped else char for char, escaped in chars]  # what is escaped is no syntax
    for i, char in enumerate(text):
        if char == "(":
            stack.append(i)
        elif char == ")" and stack:
            start = stack.pop()
            weight, own = _weighed(chars[start + 1 : i], "weight")
            if own is not None:
                found[start] = (i, weight, start + 1 + own)
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
    """The words of a prompt that are not among the known ones, in order, each once."""
    return [
        word
        for word in dict.fromkeys(word for text in plain_texts(prompt) for word in words(text))
        if word not in known
    ]
