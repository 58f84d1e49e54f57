"""Build an unCLIP pipeline from a card and networks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ldm.catalog.unclip_cards import AutoregressiveCard, StageCard, UnCLIPCard, upsampler_name
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.conditioner import Conditioner, TextConditioner
from ldm.conditioning.exemplar_index import ExemplarIndex
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.xlmr import XLMRConditioner
from ldm.models.clip.towers import TextTower, VisionTower
from ldm.models.dit import DiT
from ldm.models.text.bpe import Tokenizer
from ldm.models.text.unigram import Unigram
from ldm.models.text.xlmr import XLMR
from ldm.models.unclip.autoregressive import AutoregressivePrior
from ldm.models.unclip.decoder import Decoder
from ldm.models.unclip.noise_augmentation import NoiseAugmentation
from ldm.models.unclip.prior import Prior
from ldm.models.unet import UNet
from ldm.pipelines.stages.autoregressive import AutoregressiveStage
from ldm.pipelines.stages.decoder import DecoderStage
from ldm.pipelines.stages.prior import PriorStage
from ldm.pipelines.stages.space import Space
from ldm.pipelines.stages.upsampler import UpsamplerStage
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.sources import Source, origin_of
from ldm.weights.formats.exemplar_file import layout_steps, read_embeddings, read_library
from ldm.weights.formats.ldm_folder import WORDS_VOCABULARY, read_vocabulary
from ldm.weights.formats.ldm_model import library_folder

# The stage of each kind of prior: (class of the network, class of the card) -> class of the stage.
PRIOR_STAGES: dict[tuple[type, type], Callable[..., PriorStage | AutoregressiveStage]] = {
    (Prior, StageCard): PriorStage,
    (AutoregressivePrior, AutoregressiveCard): AutoregressiveStage,
}


def assemble_unclip(card: UnCLIPCard, source: Source) -> UnCLIP:
    """Return the pipeline of a card's networks, in evaluation mode.

    Raises:
        ValueError: If the networks are not of the kinds that the card states, or lack a part.
    """
    networks = source.networks
    vision, network, augmentation = networks.get("vision"), networks["decoder"], networks.get("noise")
    assert vision is None or isinstance(vision, VisionTower)
    assert augmentation is None or isinstance(augmentation, NoiseAugmentation)
    text = clip_text(card, source)
    if (augmentation is None) != (card.condition == "tokens"):
        raise ValueError(
            f"{card.name!r}: the card's condition {card.condition!r} does not go with"
            f" {type(network).__name__} as the decoder"
        )
    assert isinstance(network, Decoder | UNet)
    clip = ClipPair(card.clip, text=text, vision=vision)
    space = Space(networks.get("vae"), source.latent_scale)
    decoder = DecoderStage(
        network,
        card.decoder,
        clip=card.clip,
        space=space,
        text=decoder_text(card, source, clip, space),
        augmentation=augmentation,
    )
    upsamplers = [
        UpsamplerStage(
            networks[upsampler_name(k)], stage, index=k, last=networks.get(upsampler_name(k, last=True))
        )
        for k, stage in enumerate(card.upsamplers)
    ]
    pieces = source.pieces if isinstance(networks.get("words"), XLMR) else None
    tokenizers = {} if pieces is None else {pieces.name: Unigram.file(pieces)}
    return UnCLIP(
        clip=clip,
        prior=prior_stage(networks["prior"], card.prior, clip=card.clip) if "prior" in networks else None,
        decoder=decoder,
        upsamplers=upsamplers,
        card=card,
        origin=origin_of(card, source, tokenizers),
    ).eval()


def prior_stage(
    network: nn.Module, card: StageCard | AutoregressiveCard | None, *, clip: str
) -> PriorStage | AutoregressiveStage:
    """Return the stage of a diffusion prior or of an autoregressive one.

    Args:
        network: The prior.
        card: How it is sampled.
        clip: Name of the CLIP whose embeddings it predicts.

    Raises:
        ValueError: If network and card are of different kinds.
    """
    stage = PRIOR_STAGES.get((type(network), type(card)))
    if stage is None:
        raise ValueError(f"prior: {type(network).__name__} and {type(card).__name__} do not belong together")
    return stage(network, card, clip=clip)


def clip_text(card: UnCLIPCard, source: Source) -> TextConditioner | None:
    """Return CLIP's text tower with its tokenizer; None if there is no tower.

    The tokenizer is the full one, unless vocabulary.json is in the source's folder.
    """
    tower = source.networks.get("text")
    if tower is None:
        return None
    assert isinstance(tower, TextTower)
    if source.folder is None or not (source.folder / "vocabulary.json").is_file():
        return TextConditioner(tower, Tokenizer(), card.text)
    tokenizer, words = read_vocabulary(source.folder)
    return TextConditioner(tower, tokenizer, card.text, words)


def decoder_text(card: UnCLIPCard, source: Source, clip: ClipPair, space: Space) -> Conditioner | None:
    """Return the decoder's text encoder: its own, CLIP's, or None if it reads no text.

    Args:
        card: The model's card.
        source: The networks.
        clip: The CLIP.
        space: The space of the decoder's states.

    Raises:
        ValueError: If the decoder reads CLIP's text tower and there is none.
    """
    own, network = source.networks.get("words"), source.networks["decoder"]
    layout = source.networks.get("layout")
    if isinstance(own, XLMR):
        pieces = source.pieces
        return XLMRConditioner(own, Unigram.spelling() if pieces is None else Unigram.from_file(pieces))
    if isinstance(own, TextTower) and isinstance(layout, DiT):
        return exemplar_text(card, source, own, layout, clip, space)
    if isinstance(own, TextTower):
        return TextConditioner(own, Tokenizer(), card.words)
    reads = isinstance(network, Decoder) and (
        network.config.condition.text_dim or network.config.condition.pooled_dim
    )
    if reads and clip.text is None:
        raise ValueError(
            f"the decoder of {card.name!r} reads text with the text tower of {card.clip!r}, which is absent"
        )
    return clip.text if reads else None


def exemplar_text(
    card: UnCLIPCard, source: Source, words: TextTower, layout: DiT, clip: ClipPair, space: Space
) -> ExemplarConditioner:
    """Return the text encoder of a decoder with exemplars, whose library CLIP reads; see `decoder_text`."""
    folder, library = source.folders["words"], read_library(library_folder(source.folders))
    tokenizer, known = read_vocabulary(folder, name=WORDS_VOCABULARY)
    return ExemplarConditioner(
        TextConditioner(words, tokenizer, card.words, known),
        layout,
        library,
        cell=space.factor,
        index=ExemplarIndex(library, clip, *read_embeddings(folder)),
        layout_steps=layout_steps(source.folders["layout"]),
    )
