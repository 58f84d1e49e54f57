"""Build a latent diffusion pipeline from a card and networks."""

from __future__ import annotations

from pathlib import Path

from ldm.catalog.cards import ModelCard
from ldm.conditioning.bert import BertConditioner
from ldm.conditioning.conditioner import Conditioner, TextConditioner, TextConvention, TwoTowers
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.models.clip.towers import TextTower
from ldm.models.dit import DiT
from ldm.models.draft import Draft
from ldm.models.labels import LabelConditioner
from ldm.models.text.bert import LDMBert
from ldm.models.text.bpe import Tokenizer
from ldm.models.text.wordpiece import (
    WORDPIECE_END,
    WORDPIECE_PAD,
    WORDPIECE_START,
    WORDPIECE_UNKNOWN,
    WordPiece,
)
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.stages.space import Space
from ldm.registry.sources import Source, origin_of
from ldm.weights.formats.exemplar_file import layout_steps, read_library
from ldm.weights.formats.ldm_folder import read_vocabulary
from ldm.weights.formats.ldm_model import library_folder

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'!?-"


def assemble_latent(card: ModelCard, source: Source, *, vocabulary: Path | None = None) -> LatentDiffusion:
    """Return the pipeline of a card's networks, in evaluation mode.

    Args:
        card: The model's card.
        source: Its networks.
        vocabulary: BERT's vocab.txt, for models that read text through BERT; None: from the source's folder.

    Raises:
        ValueError: If the card does not say how a text tower is read, or states statistics of another number
            of latent channels.
        FileNotFoundError: If the model reads text through BERT and there is no vocabulary.
    """
    networks = source.networks
    Space(networks["vae"], 1.0, card.latent_mean, card.latent_std)  # raises if they do not fit
    bert = isinstance(networks.get("text"), LDMBert)
    words = vocabulary_file(card, source, vocabulary) if bert else None
    return LatentDiffusion(
        vae=networks["vae"],
        text=text_conditioner(card, source, words),
        denoiser=card.make_denoiser(networks["unet"]),
        latent_scale=source.latent_scale,
        card=card,
        origin=origin_of(card, source, {} if words is None else {"vocab.txt": words}),
    ).eval()


def text_conditioner(card: ModelCard, source: Source, vocabulary: Path | None) -> Conditioner | None:
    """Return what encodes prompts or classes; None for an unconditional model."""
    first, second = source.networks.get("text"), source.networks.get("text2")
    labels = source.networks.get("class")
    if isinstance(labels, LabelConditioner):
        return labels
    if isinstance(first, LDMBert):
        return BertConditioner(first, word_pieces(vocabulary))
    tower = clip_conditioner(first, card.text, source) if isinstance(first, TextTower) else None
    layout = source.networks.get("layout")
    if tower is not None and "layout" in source.folders and isinstance(layout, DiT):
        cell = Space(source.networks["vae"]).factor
        library = read_library(library_folder(source.folders))
        steps = layout_steps(source.folders["layout"])
        return ExemplarConditioner(tower, layout, library, cell=cell, layout_steps=steps)
    if not isinstance(second, TextTower):
        return tower
    if card.text2 is None:
        raise ValueError(
            f"text2: the card {card.name!r} has a second text tower and does not state how it is read"
        )
    return TwoTowers(tower, TextConditioner(second, Tokenizer(), card.text2))


def clip_conditioner(network: TextTower, convention: TextConvention, source: Source) -> TextConditioner:
    """Return a CLIP text tower with its tokenizer and, if it has one, its draft network.

    The tokenizer is the full one, unless vocabulary.json is in the source's folder.
    """
    draft = source.networks.get("draft")
    assert draft is None or isinstance(draft, Draft)
    tokenizer, words = Tokenizer(), None
    if source.folder is not None and (source.folder / "vocabulary.json").is_file():
        tokenizer, words = read_vocabulary(source.folder)
    return TextConditioner(network, tokenizer, convention, words, draft)


def vocabulary_file(card: ModelCard, source: Source, vocabulary: Path | None) -> Path | None:
    """Return BERT's vocab.txt: ``vocabulary``, or that in the source's folder; None for random weights.

    Raises:
        FileNotFoundError: If there is none.
    """
    if vocabulary is not None or source.folder is None:
        return vocabulary
    for path in (source.folder / "vocab.txt", source.folder / "tokenizer" / "vocab.txt"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{card.name!r} reads text through BERT's tokenizer: put the vocab.txt of bert-base-uncased into"
        f" {str(source.folder)!r}, or pass vocabulary=PATH"
    )


def word_pieces(vocabulary: Path | None) -> WordPiece:
    """Return BERT's tokenizer of a vocab.txt; without one, for random weights, one of single letters."""
    if vocabulary is not None:
        return WordPiece.from_file(vocabulary)
    return WordPiece(
        [
            WORDPIECE_PAD,
            WORDPIECE_UNKNOWN,
            WORDPIECE_START,
            WORDPIECE_END,
            *LETTERS,
            *(f"##{letter}" for letter in LETTERS),
        ]
    )
