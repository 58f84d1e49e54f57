"""The conditioner of a model with exemplars.

The text is read with slot words in place of things, and the things are images from a library, in a layout.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.exemplar_index import ExemplarIndex
from ldm.conditioning.exemplar_library import Exemplar, ExemplarLibrary
from ldm.conditioning.layouts import LAYOUT_ROWS, LAYOUT_STEPS, draw_layouts, layout_denoiser, slots_of
from ldm.conditioning.prompt import parse, plain_texts
from ldm.conditioning.read_prompts import Alternative, ReadInCall, ReadPrompt
from ldm.conditioning.reading import encode_prompts, weighted_mean, word_positions
from ldm.conditioning.things import SLOT_WORDS, Lexicon, Mention, ReadText
from ldm.diffusion.cond import Cond
from ldm.models.dit import DiT
from ldm.models.layout import ThingLayout, multiplied, place_exemplars

PADDED_TO = 16
"""The context of a prompt has a multiple of these, by which an image has the same bits in every batch.

Prompts of different lengths cannot share an exact batch; with this multiple nearly all have the same.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedThings:
    """The exemplars of a prompt's things, and where they lie.

    Attributes:
        images: Colors multiplied by opacity, and opacity, (1, K, 4, S, S), 0 where there is no thing.
        layout: One layout.
    """

    images: Tensor
    layout: ThingLayout


class ExemplarConditioner(nn.Module):
    """A text tower that reads slot words, a prior over layouts, and a library of exemplars.

    The context of a prompt is the tokens of its text, in which slot words stand for things. The seed draws a
    layout of the things and, where the prompt leaves it open, their exemplars, which are placed so.

    Args:
        text: The text tower, trained on words of grammar, its `known_words`, and on slot words.
        layout: The network of the prior over layouts.
        library: The exemplars.
        cell: Side of a number of the latent in pixels.
        index: The library's images as CLIP sees them, for conditions of image embeddings. Default: None.
        layout_steps: Evaluations of the prior for a layout. Default: `LAYOUT_STEPS`.

    Raises:
        ValueError: If it is not known which words the text tower was trained on, its padding is not masked,
            or the prior reads texts of another width.
    """

    def __init__(
        self,
        text: TextConditioner,
        layout: DiT,
        library: ExemplarLibrary,
        *,
        cell: int,
        index: ExemplarIndex | None = None,
        layout_steps: int = LAYOUT_STEPS,
    ) -> None:
        super().__init__()
        if text.known_words is None:
            raise ValueError("the text tower does not state the words that it was trained on")
        if not text.convention.masked:
            raise ValueError("the padding of the text tower is not masked: expected text: {masked: true}")
        if layout.config.context_dim != text.width:
            raise ValueError(
                f"the prior over layouts reads a text of width {layout.config.context_dim}, the text tower"
                f" has {text.width}: expected the same"
            )
        self.text = text
        self.layout = layout
        self.library = library
        self.cell = cell
        self.index = index
        self.layout_steps = layout_steps
        self.grammar = text.known_words
        self.slots = slots_of(layout.config)
        self._lexicon: Lexicon | None = None

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.text.width

    @property
    def lexicon(self) -> Lexicon:
        """What a prompt may consist of, with what was added to the library."""
        nouns = self.library.nouns
        if self._lexicon is None or self._lexicon.nouns is not nouns:
            self._lexicon = Lexicon(nouns=nouns, styles=self.library.styles, grammar=self.grammar)
        return self._lexicon

    @property
    def known_words(self) -> frozenset[str]:
        """The words of grammar, and the phrases that mean things of the library."""
        return self.grammar | self.library.nouns.keys()

    def forward(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, *, seeds: Sequence[int] = ()
    ) -> Cond:
        """Return the condition of B prompts.

        Args:
            prompts: B prompts, with weights and blends as everywhere.
            size: (h, w) of the latent, whose image is the canvas. Default: that of the library's images.
            seeds: B seeds, which choose the exemplars that a prompt leaves open. A single prompt may have
                several seeds; if it names a thing, it has a condition for each. Default: 0 for all.

        Returns:
            A Cond with context (B, M, D), its mask, and exemplars (B, K, 4, H, W).

        Raises:
            ValueError: If there are several prompts and another number of seeds.
        """
        read, seeds = self.read_each(prompts, seeds)
        return self._placed(read, self.draw_things(read, seeds), size)

    def read_each(
        self, prompts: Sequence[str], seeds: Sequence[int] = ()
    ) -> tuple[list[ReadPrompt], list[int]]:
        """Return the prompts, as the model reads them, and the seeds that `forward` draws layouts for."""
        read = [self.read(prompt) for prompt in prompts]
        if len(read) == 1 and read[0].things:
            read = read * max(1, len(seeds))
        if len(read) > 1 and len(seeds) not in (0, len(read)):
            raise ValueError(
                f"{len(prompts)} prompts and {len(seeds)} seeds: expected one seed for each prompt"
            )
        return read, [*seeds[: len(read)]] or [0] * len(read)

    def seen(
        self,
        prompts: Sequence[str],
        vectors: Tensor,
        size: tuple[int, int] | None = None,
        *,
        seeds: Sequence[int],
        named: Sequence[str] = (),
    ) -> Cond:
        """Return the condition of B prompts and B image embeddings, which choose what the prompts leave open.

        Of the exemplars that a prompt leaves open the one nearest to the embedding is taken. Where the prompt
        names nothing, the image is of the thing whose exemplar is nearest in the whole library.

        Args:
            prompts: B prompts.
            vectors: B image embeddings of the index's CLIP, (B, E).
            size: (h, w) of the latent. Default: as in `forward`.
            seeds: B seeds.
            named: Texts; where a prompt names nothing, its thing is one that they name, if they name any.
                Default: none.

        Raises:
            ValueError: If a prompt names nothing, and the conditioner has no index.
        """
        read = [self.read_seen(*pair, named) for pair in zip(prompts, vectors, strict=True)]
        return self._placed(read, self.draw_things(read, seeds, list(vectors)), size)

    def read_seen(self, prompt: str, vector: Tensor, named: Sequence[str] = ()) -> ReadPrompt:
        """Return a prompt as the model reads it, preceded by what an embedding shows if it names nothing.

        Args:
            prompt: The prompt.
            vector: An image embedding of the index's CLIP, (E,).
            named: See `seen`. Default: none.

        Raises:
            ValueError: If the prompt names nothing, and the conditioner has no index.
        """
        read = self.read(prompt)
        if read.things:
            return read
        if self.index is None:
            raise ValueError("expected an index of the library, by which an embedding finds exemplars")
        nouns = self.lexicon.noun_of
        mentions = [
            mention for text in named for mention in self.lexicon.read(text, slots=self.slots).mentions
        ]
        meant = [exemplar for mention in mentions for exemplar in self.library.meant(mention)]
        among = [exemplar for exemplar in meant or self.library if exemplar.name in nouns]
        return self.read(f"{nouns[self.index.nearest(vector, among).name]} {prompt}")

    def _placed(
        self, read: Sequence[ReadPrompt], things: Sequence[PlacedThings], size: tuple[int, int] | None
    ) -> Cond:
        """Return the condition of B prompts, each with a choice of what it leaves open."""
        return Cond.cat(
            [self.condition(one, [placed], size) for one, placed in zip(read, things, strict=True)]
        )

    def read(self, prompt: str) -> ReadPrompt:
        """Return a prompt as the model reads it; a call of a pipeline reads each prompt once."""
        known = ReadInCall.of(self).read
        if prompt not in known:
            alternatives = self._alternatives(prompt)
            text = self._text(prompt, alternatives)
            known[prompt] = ReadPrompt(alternatives=tuple(alternatives), text=text)
        return known[prompt]

    def layouts(self, read: Sequence[ReadPrompt], seeds: Sequence[int]) -> ThingLayout:
        """Return the layouts that B seeds draw for B prompts.

        Those that this call of a pipeline has not drawn yet are drawn `LAYOUT_ROWS` at a time, apart for each
        length of text, so that all products have the shapes that they have for one prompt alone.
        """
        known = ReadInCall.of(self).layouts
        wanted = list(zip(read, seeds, strict=True))
        missing = defaultdict[int, list[tuple[ReadPrompt, int]]](list)
        for pair in dict.fromkeys(wanted):
            if pair not in known:
                missing[pair[0].tokens].append(pair)
        denoiser = layout_denoiser(self.layout)
        for batch in missing.values():
            text, things = Cond.cat([one.text for one, _ in batch]), [one.things for one, _ in batch]
            own, steps = [seed for _, seed in batch], self.layout_steps
            drawn = draw_layouts(denoiser, text, things, seeds=own, steps=steps, rows=LAYOUT_ROWS)
            known.update({pair: drawn[i : i + 1] for i, pair in enumerate(batch)})
        return ThingLayout.cat([known[pair] for pair in wanted])

    def draw_things(
        self, read: Sequence[ReadPrompt], seeds: Sequence[int], vectors: Sequence[Tensor] | None = None
    ) -> list[PlacedThings]:
        """Draw what B prompts leave open with B seeds: the exemplars of their things and their layouts.

        The exemplars of a blend are the means of its alternatives', weighted by their shares, in one layout.

        Args:
            read: B prompts.
            seeds: B seeds.
            vectors: B image embeddings (E,), which choose the exemplars in place of the seeds. Default: None.
        """
        layouts = self.layouts(read, seeds)
        return [
            PlacedThings(
                images=self._images(one, seed, None if vectors is None else vectors[i]),
                layout=layouts[i : i + 1],
            )
            for i, (one, seed) in enumerate(zip(read, seeds, strict=True))
        ]

    def _images(self, read: ReadPrompt, seed: int, vector: Tensor | None) -> Tensor:
        """Return the exemplars of a prompt's things, (1, K, 4, S, S); see `draw_things`."""
        images = [
            multiplied(self._chosen(alternative.mentions, seed, vector)) for alternative in read.alternatives
        ]
        return weighted_mean(images, [alternative.share for alternative in read.alternatives])

    def condition(
        self, read: ReadPrompt, things: Sequence[PlacedThings], size: tuple[int, int] | None = None
    ) -> Cond:
        """Return the conditions of a prompt with B choices of what it leaves open; see `forward`."""
        side = self.library.size
        canvas = (side, side) if size is None else (size[0] * self.cell, size[1] * self.cell)
        placed = [place_exemplars(each.images, each.layout, canvas) for each in things]
        return replace(read.text.expand(len(things)), exemplars=torch.cat(placed))

    def shown(self, images: Tensor) -> Cond:
        """Return the condition of B images that are shown as they are, as a thing that fills the canvas.

        Args:
            images: Shape (B, 3, H, W) in [0, 1].
        """
        ids = [self.text.tokenizer.encode(SLOT_WORDS[0])]
        states = self.text.encode(ids)
        canvas = images.new_zeros(len(images), self.slots, 4, *images.shape[-2:], dtype=torch.float32)
        canvas[:, 0, :3], canvas[:, 0, 3] = images, 1
        text = Cond(context=states.tokens, context_mask=states.mask).padded(PADDED_TO).expand(len(images))
        return replace(text, exemplars=canvas.to(self.device))

    def _alternatives(self, prompt: str) -> list[Alternative]:
        """Return the alternatives of a prompt; the things of each have the slots in their order."""
        found, lexicon = [], self.lexicon
        for branch in parse(prompt):
            spans: list[ReadText] = []
            for span in branch.spans:
                taken = spans[-1].mentions if spans else ()
                spans.append(lexicon.read(span.text, slots=self.slots, taken=taken))
            found.append(Alternative(share=branch.share, spans=tuple(spans)))
        return found

    def _text(self, prompt: str, alternatives: Sequence[Alternative]) -> Cond:
        """Return the condition of a prompt's text, context (1, M, D) with its mask."""
        # spans are tokenized in order, alternative by alternative
        spans = iter([span for alternative in alternatives for span in alternative.spans])

        def tokenize(_: str) -> list[tuple[str, tuple[int, ...]]]:
            return self._ids(next(spans))

        return encode_prompts([prompt], tokenize, self.text.encode, self.text.room).padded(PADDED_TO)

    def _ids(self, read: ReadText) -> list[tuple[str, tuple[int, ...]]]:
        """Return the words of a text with the ids of what the tower reads in their place."""
        words = (
            (word, word if slot is None else SLOT_WORDS[slot])
            for word, slot in zip(read.words, read.slots, strict=True)
        )
        tokenizer = self.text.tokenizer
        return [(word, tuple(tokenizer.encode(own))) for word, own in words]

    def chosen(self, prompt: str, seed: int) -> list[Exemplar]:
        """Return the exemplars that a seed chooses for the things of a prompt, in their order.

        Of a blend, those of each alternative follow each other.
        """
        return [
            self.library.choose(mention, seed, slot)
            for alternative in self.read(prompt).alternatives
            for slot, mention in enumerate(alternative.mentions)
        ]

    def _chosen(self, mentions: Sequence[Mention], seed: int, vector: Tensor | None) -> Tensor:
        """Return the images of things, (1, K, 4, S, S) float32, transparent where there is no thing."""
        side = self.library.size
        images = torch.zeros(1, self.slots, 4, side, side, dtype=torch.float32, device=self.device)
        for slot, mention in enumerate(mentions):
            if vector is None or self.index is None:
                exemplar = self.library.choose(mention, seed, slot)
            else:
                exemplar = self.index.nearest(vector, self.library.meant(mention))
            images[0, slot] = self.library.pixels(exemplar)
        return images

    @property
    def device(self) -> torch.device:
        """Where the prior is."""
        return self.layout.embed_in.weight.device

    def places(self, prompt: str) -> list[tuple[str, list[int]]]:
        """Return the words of a prompt that the model reads, and their positions in the context.

        The phrase of a thing has the positions of its slot word. Of a blend only the first alternative
        counts.
        """
        spans = iter(self._alternatives(prompt)[0].spans)
        return word_positions(
            parse(prompt)[0].spans, lambda _: self._ids(next(spans)), self.text.room, self.text.padded_length
        )

    def unknown(self, prompt: str) -> list[str]:
        """Return the words of a prompt that are left out, in order, each once.

        These are words that are neither grammar nor nouns of the library, and things beyond the number of
        slots.
        """
        lexicon, slots = self.lexicon, self.slots
        texts = plain_texts(prompt)
        return list(dict.fromkeys(word for text in texts for word in lexicon.read(text, slots=slots).unknown))

    def networks(self) -> dict[str, nn.Module]:
        """Return the text tower as "text", and the prior as "layout"."""
        return {**self.text.networks(), "layout": self.layout}
