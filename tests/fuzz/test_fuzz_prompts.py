"""Damaged prompts: read by the syntax, the tokenizers and the table of things, or refused with a reason."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path

from fuzzing import Target, check
from mutations import mixed, mutated_bytes
from text_mutations import mutated_prompt
from tiny_latent_diffusion import WORDS

from ldm.conditioning.prompt import parse, unknown_words
from ldm.conditioning.reading import split_windows, word_positions
from ldm.conditioning.things import Lexicon
from ldm.models.text.bpe import Tokenizer
from ldm.models.text.unigram import Unigram
from ldm.models.text.wordpiece import WordPiece
from ldm.registry.latent.assembly import word_pieces

PROMPTS = [
    "a red apple",
    "(red:1.3) apple on a {blue:2|green} background, ((soft:1.2) light:1.5)",
    "two noto cat faces to the left of a Fluent Rocket, 16:9 \\(photo\\)",
    "une pomme « rouge » – 3½ kg, 猫と犬, ñandú, it’s 🐱 &amp; more",
    "",
]
LEXICON = Lexicon(
    nouns={
        "cat face": ("cat-face",),
        "cat faces": ("cat-face",),
        "rocket": ("rocket",),
        "cat": ("cat-face",),
    },
    styles=("noto", "fluent", "noto-v1"),
    grammar=frozenset(("a", "two", "to", "the", "left", "of", "on", "blue", "background")),
)


@functools.cache
def tokenizers() -> tuple[Tokenizer, Tokenizer, WordPiece, Unigram]:
    full = Tokenizer()
    some = Tokenizer(vocabulary=[i for word in WORDS for i in full.encode(word)])
    return full, some, word_pieces(None), Unigram.spelling()


def read(path: Path) -> None:
    """Parse a prompt; what it says is then read by every tokenizer, none of which may refuse it."""
    prompt = path.read_bytes().decode("utf-8", errors="surrogatepass")
    branches = parse(prompt)
    assert abs(sum(branch.share for branch in branches) - 1) < 1e-6
    try:
        use(prompt)
    except ValueError as error:
        raise AssertionError(f"a prompt that was parsed: {error}") from None


def use(prompt: str) -> None:
    unknown_words(prompt, frozenset(WORDS))
    full, some, pieces, unigram = tokenizers()
    for branch in parse(prompt):
        text = branch.text
        for tokenizer in (full, some):
            windows = split_windows(branch.spans, tokenizer.word_ids, 75)
            placed = word_positions(branch.spans, tokenizer.word_ids, 75, 77)
            assert sum(len(window.ids) for window in windows) == sum(len(where) for _, where in placed)
            assert all(0 <= i < len(tokenizer) for window in windows for i in window.ids)
            tokenizer.unknown(text)
        full.decode(full.encode(text))
        pieces.encode(text)
        unigram.encode(text)
        things = LEXICON.read(text, slots=2)
        assert len(things.mentions) <= 2 and len(things.words) == len(things.slots)
        assert isinstance(things.text, str)


def mutated_utf8(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one of the prompts with its bytes damaged, as far as they are text."""
    return mutated_bytes(seeds, rng).decode(errors="replace").encode()


def test_damaged_prompts(tmp_path: Path) -> None:
    target = Target(name="prompts", read=read, names="prompt")
    mutate = mixed(mutated_prompt, mutated_prompt, mutated_utf8)
    check(target, [prompt.encode() for prompt in PROMPTS], mutate, tmp_path)
