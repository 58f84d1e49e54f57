"""The conditioner of a model with exemplars: the text by slot words, the things by images from a library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.exemplar_library import ExemplarLibrary
from ldm.conditioning.prompt import parse, plain_texts
from ldm.conditioning.reading import encode_prompts, weighted_mean, word_positions
from ldm.conditioning.things import SLOT_WORDS, Lexicon, Mention, ReadText
from ldm.diffusion.cond import Cond
from ldm.models.exemplars import ExemplarEncoder, multiplied
from ldm.support.device import computing_dtype


@dataclass(frozen=True, kw_only=True)
class _Alternative:
    """One alternative of a prompt: its share, and what each of its spans says."""

    share: float
    spans: tuple[ReadText, ...]

    @property
    def mentions(self) -> tuple[Mention, ...]:
        return self.spans[-1].mentions


class ExemplarConditioner(nn.Module):
    """A text tower that reads slot words, and an encoder of exemplars.

    The context of a prompt is the tokens of its exemplars, L for each slot and masked where the prompt names
    fewer things, followed by the tokens of its text.

    Args:
        text: The text tower, trained on words of grammar, its `known_words`, and on slot words.
        encoder: The encoder of exemplars, whose tokens are as wide as the text's.
        library: The exemplars.

    Raises:
        ValueError: If it is not known which words the text tower was trained on, its padding is not masked,
            the widths differ, or the encoder reads images of another size than the library's.
    """

    def __init__(
        self,
        text: TextConditioner,
        encoder: ExemplarEncoder,
        library: ExemplarLibrary,
    ) -> None:
        super().__init__()
        if text.known_words is None:
            raise ValueError("the text tower does not state the words that it was trained on")
        if not text.convention.masked:
            raise ValueError("the padding of the text tower is not masked: expected text: {masked: true}")
        if encoder.config.width != text.width:
            raise ValueError(
                f"exemplar tokens are {encoder.config.width} wide, the text's are"
                f" {text.width}: expected the same"
            )
        if encoder.config.size != library.size:
            raise ValueError(
                f"the encoder reads {encoder.config.size} pixels, the library has"
                f" {library.size}: expected the same"
            )
        self.text = text
        self.encoder = encoder
        self.library = library
        self.grammar = text.known_words

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.text.width

    @property
    def lexicon(self) -> Lexicon:
        """What a prompt may consist of, with what was added to the library."""
        return Lexicon(nouns=self.library.nouns, styles=self.library.styles, grammar=self.grammar)

    def forward(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, *, seeds: Sequence[int] = ()
    ) -> Cond:
        """Return the condition of B prompts.

        Args:
            prompts: B prompts, with weights and blends as everywhere.
            size: Not read.
            seeds: B seeds, which choose the exemplars that a prompt leaves open. A single prompt may have
                several seeds; if it names a thing, it has a condition for each. Default: 0 for all.

        Returns:
            A Cond with context (B, K·L + M, D), its mask, and exemplars (B, K, 4, S, S).

        Raises:
            ValueError: If there are several prompts and another number of seeds.
        """
        lexicon = self.lexicon
        read = {prompt: self._read(prompt, lexicon) for prompt in dict.fromkeys(prompts)}
        texts = {prompt: self._text(prompt, alternatives) for prompt, alternatives in read.items()}
        if len(prompts) == 1 and any(alternative.mentions for alternative in read[prompts[0]]):
            prompts = list(prompts) * max(1, len(seeds))
        seeds = seeds or [0] * len(prompts)
        if len(prompts) > 1 and len(seeds) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts and {len(seeds)} seeds: expected one seed for each prompt"
            )
        conds = []
        for prompt, seed in zip(prompts, seeds, strict=False):
            tokens, mask, images = self._exemplars(read[prompt], seed)  # (1, K·L, D), (1, K·L)
            text = texts[prompt]
            assert text.context is not None and text.context_mask is not None
            context = torch.cat([tokens, text.context], dim=1)
            mask = torch.cat([mask, text.context_mask], dim=1)
            conds.append(Cond(context=context, context_mask=mask, exemplars=images))
        return Cond.cat(conds)

    def _read(self, prompt: str, lexicon: Lexicon) -> list[_Alternative]:
        """Return the alternatives of a prompt; the things of each have the slots in their order."""
        found = []
        for branch in parse(prompt):
            spans: list[ReadText] = []
            for span in branch.spans:
                taken = spans[-1].mentions if spans else ()
                spans.append(lexicon.read(span.text, slots=self.encoder.config.slots, taken=taken))
            found.append(_Alternative(share=branch.share, spans=tuple(spans)))
        return found

    def _text(self, prompt: str, alternatives: Sequence[_Alternative]) -> Cond:
        """Return the condition of a prompt's text, context (1, M, D) with its mask."""
        # spans are tokenized in order, alternative by alternative
        spans = iter([span for alternative in alternatives for span in alternative.spans])

        def tokenize(_: str) -> list[tuple[str, tuple[int, ...]]]:
            return self._ids(next(spans))

        return encode_prompts([prompt], tokenize, self.text.encode, self.text.room)

    def _ids(self, read: ReadText) -> list[tuple[str, tuple[int, ...]]]:
        """Return the words of a text with the ids of what the tower reads in their place."""
        words = (
            (word, word if slot is None else SLOT_WORDS[slot])
            for word, slot in zip(read.words, read.slots, strict=True)
        )
        tokenizer = self.text.tokenizer
        return [(word, tuple(tokenizer.encode(own))) for word, own in words]

    def _exemplars(self, alternatives: Sequence[_Alternative], seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens of a prompt's exemplars (1, K·L, D), their mask, and the images (1, K, 4, S, S).

        Of a blend, tokens and images are the means of its alternatives', weighted by their shares.
        """
        config = self.encoder.config
        device = self.encoder.embed_in.weight.device
        shares = [alternative.share for alternative in alternatives]
        images = [self._chosen(alternative.mentions, seed) for alternative in alternatives]
        tokens = [
            self._encoded(own, len(alternative.mentions))
            for own, alternative in zip(images, alternatives, strict=True)
        ]
        slots = torch.arange(config.slots, device=device).repeat_interleave(config.tokens)  # (K·L,)
        most = max(len(alternative.mentions) for alternative in alternatives)
        mixed = weighted_mean([multiplied(own) for own in images], shares)
        return weighted_mean(tokens, shares), (slots < most)[None], mixed

    def _chosen(self, mentions: Sequence[Mention], seed: int) -> Tensor:
        """Return the images of things, (1, K, 4, S, S) float32, transparent where there is no thing."""
        config, device = self.encoder.config, self.encoder.embed_in.weight.device
        images = torch.zeros(1, config.slots, 4, config.size, config.size, dtype=torch.float32, device=device)
        for slot, mention in enumerate(mentions):
            images[0, slot] = self.library.pixels(self.library.choose(mention, seed, slot))
        return images

    def _encoded(self, images: Tensor, things: int) -> Tensor:
        """Return the tokens of the first of images (1, K, 4, S, S), (1, K·L, D), zero for the others."""
        config, dtype = self.encoder.config, computing_dtype(self.encoder)
        images = images.to(self.encoder.embed_in.weight.device, dtype)  # (1, K, 4, S, S)
        tokens = images.new_zeros(1, config.slots * config.tokens, config.width)
        if things:
            tokens[:, : things * config.tokens] = self.encoder(images[:, :things])
        return tokens

    def places(self, prompt: str) -> list[tuple[str, list[int]]]:
        """Return the words of a prompt that the model reads, and their positions in the context.

        The phrase of a thing has the positions of its exemplar's tokens and of its slot word. Of a blend
        only the first alternative counts.
        """
        config = self.encoder.config
        first = self._read(prompt, self.lexicon)[0]
        spans = iter(first.spans)
        found = word_positions(
            parse(prompt)[0].spans, lambda _: self._ids(next(spans)), self.text.room, self.text.padded_length
        )
        slots = [slot for span in first.spans for slot in span.slots]
        offset = config.slots * config.tokens
        placed = []
        for (word, positions), slot in zip(found, slots, strict=True):
            own = [] if slot is None else list(range(slot * config.tokens, (slot + 1) * config.tokens))
            placed.append((word, own + [offset + position for position in positions]))
        return placed

    def unknown(self, prompt: str) -> list[str]:
        """Return the words of a prompt that are left out, in order, each once.

        These are words that are neither grammar nor nouns of the library, and things beyond the number of
        slots.
        """
        lexicon, slots = self.lexicon, self.encoder.config.slots
        texts = plain_texts(prompt)
        return list(dict.fromkeys(word for text in texts for word in lexicon.read(text, slots=slots).unknown))

    def networks(self) -> dict[str, nn.Module]:
        """Return the text tower as "text", and the encoder as "exemplars"."""
        return {**self.text.networks(), "exemplars": self.encoder}
