"""An unCLIP model from its card and its networks."""

from __future__ import annotations

from typing import Any

from ldm.catalog.unclip_cards import AutoregressiveCard, StageCard, UnCLIPCard, upsampler_name
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.xlmr import XLMRConditioner
from ldm.models.clip.towers import TextTower, VisionTower
from ldm.models.text.bpe import Tokenizer
from ldm.models.text.unigram import Unigram
from ldm.models.text.xlmr import XLMR
from ldm.models.unclip.autoregressive import AutoregressivePrior
from ldm.models.unclip.decoder import Decoder
from ldm.models.unclip.prior import Prior
from ldm.pipelines.stages.autoregressive import AutoregressiveStage
from ldm.pipelines.stages.decoder import DecoderStage
from ldm.pipelines.stages.prior import PriorStage
from ldm.pipelines.stages.space import Space
from ldm.pipelines.stages.upsampler import UpsamplerStage
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.unclip.sources import UnCLIPSource
from ldm.weights.formats.native_folder import read_vocabulary


def assemble_unclip(card: UnCLIPCard, source: UnCLIPSource) -> UnCLIP:
    """The pipeline of a card's networks; ValueError for networks that are of another kind than the card
    says."""
    networks: dict[str, Any] = dict(source.networks)
    text, vision = networks.get("text"), networks.get("vision")
    assert vision is None or isinstance(vision, VisionTower)
    read = None if text is None else _text(text, card, source)
    network = networks["decoder"]
    if (networks.get("noise") is None) != (card.condition == "tokens"):
        raise ValueError(
            f"{card.name!r}: its card's condition {card.condition!r} does not go with"
            f" {type(network).__name__} as its decoder"
        )
    decoder = DecoderStage(
        network,
        card.decoder,
        clip=card.clip,
        space=Space(networks.get("vae"), source.latent_scale),
        text=_words(networks, card, source, read),
        augmentation=networks.get("noise"),
    )
    upsamplers = [
        UpsamplerStage(
            networks[upsampler_name(k)], stage, index=k, last=networks.get(upsampler_name(k, last=True))
        )
        for k, stage in enumerate(card.upsamplers)
    ]
    clip = ClipPair(card.clip, text=read, vision=vision)
    prior = prior_stage(networks["prior"], card.prior, clip=card.clip) if "prior" in networks else None
    return UnCLIP(
        clip=clip, prior=prior, decoder=decoder, upsamplers=upsamplers, card=card, origin=source.origin
    ).eval()


def prior_stage(
    network: Any, card: StageCard | AutoregressiveCard | None, *, clip: str
) -> PriorStage | AutoregressiveStage:
    """The prior of either kind; ValueError for a network of the one under a card of the other."""
    if isinstance(network, AutoregressivePrior) and isinstance(card, AutoregressiveCard):
        return AutoregressiveStage(network, card, clip=clip)
    if isinstance(network, Prior) and isinstance(card, StageCard):
        return PriorStage(network, card, clip=clip)
    raise ValueError(f"prior: {type(network).__name__} and {type(card).__name__} do not belong together")


def _text(tower: TextTower, card: UnCLIPCard, source: UnCLIPSource) -> TextConditioner:
    if source.vocabulary is None or not (source.vocabulary / "vocabulary.json").is_file():
        return TextConditioner(tower, Tokenizer(), card.text)
    tokenizer, words = read_vocabulary(source.vocabulary)
    return TextConditioner(tower, tokenizer, card.text, words)


def _words(
    networks: dict[str, Any], card: UnCLIPCard, source: UnCLIPSource, read: TextConditioner | None
) -> Any:
    """What the decoder reads texts with: its own tower, CLIP's, or None where it reads none."""
    words, network = networks.get("words"), networks["decoder"]
    if isinstance(words, XLMR):
        random = source.pieces is None
        return XLMRConditioner(words, Unigram.spelling() if random else Unigram.from_file(source.pieces))  # type: ignore[arg-type]
    if words is not None:
        return TextConditioner(words, Tokenizer(), card.words)
    reads = isinstance(network, Decoder) and (
        network.config.condition.text_dim or network.config.condition.pooled_dim
    )
    if reads and read is None:
        raise ValueError(
            f"the decoder of {card.name!r} reads texts by {card.clip!r}'s text tower, which is absent"
        )
    return read if reads else None
