"""A pipeline from its card and its networks, and the tokenizers that stand between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ldm.catalog.cards import ModelCard
from ldm.conditioning.bert import BertConditioner
from ldm.conditioning.conditioner import Conditioner, TextConditioner, TextConvention, TwoTowers
from ldm.diffusion.denoiser import Denoiser
from ldm.models.clip.towers import TextTower
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
from ldm.registry.latent.sources import Source
from ldm.weights.formats.native_folder import read_vocabulary

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'!?-"


def assemble_latent(card: ModelCard, source: Source, *, vocabulary: Path | None = None) -> LatentDiffusion:
    """The pipeline of a card's networks; ``vocabulary``: the vocab.txt of models that read through BERT,
    where the source has none."""
    networks = source.networks
    denoiser = Denoiser(
        networks["unet"], card.schedule.make(), card.prediction, quantize=card.grids().quantize
    )
    text = conditioner(card, networks, source, vocabulary)
    return LatentDiffusion(
        vae=networks["vae"],
        text=text,
        denoiser=denoiser,
        latent_scale=source.latent_scale,
        card=card,
        origin=source.origin,
    ).eval()


def conditioner(
    card: ModelCard, networks: Mapping[str, nn.Module], source: Source, vocabulary: Path | None
) -> Conditioner | None:
    """What turns prompts or classes into conditions; None for an unconditional model."""
    if isinstance(labels := networks.get("class"), LabelConditioner):
        return labels
    if isinstance(bert := networks.get("text"), LDMBert):
        return BertConditioner(bert, word_pieces(card, source, vocabulary))
    first = networks.get("text")
    second = networks.get("text2")
    one = tower(first, card.text, source) if isinstance(first, TextTower) else None
    if not isinstance(second, TextTower):
        return one
    if card.text2 is None:
        raise ValueError(
            f"the card {card.name!r} has a second text tower, and does not say how it is read: text2 is"
            " absent"
        )
    return TwoTowers(one, TextConditioner(second, Tokenizer(), card.text2))


def tower(network: TextTower, convention: TextConvention, source: Source) -> TextConditioner:
    """A CLIP text tower with its tokenizer: the full one, unless a vocabulary.json lies beside the weights;
    and with its draft, if it has one."""
    draft = source.networks.get("draft")
    assert draft is None or isinstance(draft, Draft)
    tokenizer, words = Tokenizer(), None
    if source.folder is not None and (source.folder / "vocabulary.json").is_file():
        tokenizer, words = read_vocabulary(source.folder)
    return TextConditioner(network, tokenizer, convention, words, draft)


def word_pieces(card: ModelCard, source: Source, vocabulary: Path | None) -> WordPiece:
    """BERT's tokenizer: of the path given, of the source's folder, or for random weights a stand-in that
    spells."""
    if vocabulary is not None:
        return WordPiece.from_file(vocabulary)
    if source.folder is None:
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
    for path in (source.folder / "vocab.txt", source.folder / "tokenizer" / "vocab.txt"):
        if path.is_file():
            return WordPiece.from_file(path)
    raise FileNotFoundError(
        f"{card.name!r} reads through BERT's tokenizer: put the vocab.txt of bert-base-uncased into"
        f" {str(source.folder)!r}, or pass vocabulary=PATH"
    )
