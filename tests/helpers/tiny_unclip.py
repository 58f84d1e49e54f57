"""Complete unCLIP models with random weights that are small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ldm.catalog.cards import Defaults
from ldm.catalog.published_unclip import (
    KANDINSKY21_CARD,
    KANDINSKY22_CARD,
    KARLO_CARD,
    UNCLIP_L,
)
from ldm.catalog.shapes import KANDINSKY21 as KANDINSKY21_SHAPE
from ldm.catalog.shapes import KANDINSKY22 as KANDINSKY22_SHAPE
from ldm.catalog.unclip_cards import UnCLIPCard
from ldm.conditioning.clip import ClipPair
from ldm.conditioning.conditioner import TextConditioner, TextConvention
from ldm.conditioning.xlmr import XLMRConditioner
from ldm.models.clip.towers import TextConfig, TextTower, VisionConfig
from ldm.models.movq import MoVQConfig
from ldm.models.text.bpe import Tokenizer
from ldm.models.text.unigram import SPACE, UNIGRAM_END, UNIGRAM_PAD, UNIGRAM_START, UNIGRAM_UNKNOWN, Unigram
from ldm.models.text.xlmr import XLMRConfig
from ldm.models.unclip.decoder import DecoderConfig, ImageConditionConfig
from ldm.models.unclip.noise_augmentation import AugmentationConfig, NoiseAugmentation
from ldm.models.unclip.prior import PriorConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.pipelines.stages.decoder import DecoderStage
from ldm.pipelines.stages.prior import PriorStage
from ldm.pipelines.stages.space import Space
from ldm.pipelines.stages.upsampler import UpsamplerStage
from ldm.pipelines.unclip import UnCLIP
from ldm.weights.parts import build_network, randomise

E = 24
TEXT = TextConfig(width=E, layers=2, heads=2, embed_dim=E)
VISION = VisionConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, embed_dim=E)
READ = TextConvention(pad=0, masked=True, pooled=True)
PRIOR = PriorConfig(embed_dim=E, text_dim=E, width=32, layers=2, heads=4, head_dim=8)
PIXELS = UNetConfig(
    in_channels=3,
    out_channels=6,
    channels=(32, 64),
    depth=(0, 1),
    blocks=1,
    heads=None,
    head_dim=16,
    context_dim=40,
    attention="block",
    resample="resblock",
    scale_shift=True,
    embedded=True,
)
SR = replace(
    PIXELS,
    in_channels=6,
    out_channels=3,
    depth=(0, 0),
    mid_depth=0,
    context_dim=None,
    scale_shift=False,
    embedded=None,
)


def random_network(config, seed: int):
    return randomise(build_network(config), seed)


def text(seed: int, convention: TextConvention = READ, config: TextConfig = TEXT) -> TextConditioner:
    tower = random_network(config, seed)
    assert isinstance(tower, TextTower)
    return TextConditioner(tower, Tokenizer(), convention)


def clip_pair(name: str) -> ClipPair:
    return ClipPair(name, text=text(1), vision=random_network(VISION, 2))


def prior_stage(card: UnCLIPCard) -> PriorStage:
    assert card.prior is not None
    network = random_network(PRIOR, 3)
    network.clip_mean.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(9))
    network.clip_std.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(10))
    return PriorStage(network, card.prior, clip=card.clip)


def tiny_karlo() -> UnCLIP:
    """Return a Karlo model: a pixel decoder of 16×16 and an upsampler to 32×32 with two networks."""
    decoder = replace(KARLO_CARD.decoder, defaults=Defaults.square("ddpm", 4, 3.0, 16))
    upsampler = replace(KARLO_CARD.upsamplers[0], defaults=Defaults.square("ddpm", 3, 1.0, 32))
    card = replace(
        KARLO_CARD,
        decoder=decoder,
        upsamplers=(upsampler,),
        prior=replace(KARLO_CARD.prior, defaults=Defaults.square("ddpm", 4, 2.0, 16)),
    )
    clip = clip_pair(card.clip)
    network = random_network(
        DecoderConfig(unet=PIXELS, condition=ImageConditionConfig(embed_dim=E, text_dim=E, pooled_dim=E)), 4
    )
    stage = DecoderStage(network, decoder, clip=card.clip, space=Space(), text=clip.text)
    up = UpsamplerStage(random_network(SR, 5), upsampler, last=random_network(SR, 6))
    return UnCLIP(clip=clip, prior=prior_stage(card), decoder=stage, upsamplers=[up], card=card).eval()


def tiny_stable() -> UnCLIP:
    """Return a Stable unCLIP-l model: a latent decoder with its own text tower."""
    decoder = replace(UNCLIP_L.decoder, defaults=Defaults.square("ddim", 4, 3.0, 32))
    card = replace(
        UNCLIP_L, decoder=decoder, prior=replace(UNCLIP_L.prior, defaults=Defaults.square("ddpm", 4, 2.0, 16))
    )
    unet = UNetConfig(
        channels=(32, 64),
        depth=(1, 0),
        blocks=1,
        heads=None,
        head_dim=16,
        context_dim=32,
        linear_projection=True,
        class_dim=2 * E,
    )
    augmentation = NoiseAugmentation(AugmentationConfig(embed_dim=E))
    augmentation.mean.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(11))
    augmentation.std.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(12))
    own = text(
        7, TextConvention(pad=0), TextConfig(width=32, layers=2, heads=2, embed_dim=None, activation="gelu")
    )
    space = Space(random_network(VAEConfig(channels=(32, 64), blocks=1), 8), 0.18215)
    stage = DecoderStage(
        random_network(unet, 4), decoder, clip=card.clip, space=space, text=own, augmentation=augmentation
    )
    return UnCLIP(clip=clip_pair(card.clip), prior=prior_stage(card), decoder=stage, card=card).eval()


MOVQ = MoVQConfig(channels=(32, 64), blocks=1, latent_channels=4, attention_levels=(1,), codes=50)
PIECES = [
    *((token, 0.0) for token in (UNIGRAM_START, UNIGRAM_PAD, UNIGRAM_END, UNIGRAM_UNKNOWN)),
    (SPACE, -3.0),
    (f"{SPACE}a", -2.5),
    (f"{SPACE}ap", -3.3),
    (f"{SPACE}red", -3.2),
    ("ple", -3.0),
    *((letter, -4.0 - i / 100) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")),
]


def kandinsky(
    card: UnCLIPCard, condition: ImageConditionConfig, words: XLMRConditioner | None = None, **changes: Any
) -> UnCLIP:
    decoder = replace(card.decoder, defaults=Defaults.square("ddpm", 4, 3.0, 32))
    card = replace(
        card, decoder=decoder, prior=replace(card.prior, defaults=Defaults.square("ddpm", 4, 2.0, 16))
    )
    unet = replace(PIXELS, **{"in_channels": 4, "out_channels": 8, **changes})
    network = random_network(DecoderConfig(unet=unet, condition=condition), 4)
    stage = DecoderStage(
        network, decoder, clip=card.clip, space=Space(random_network(MOVQ, 8), 1.0), text=words
    )
    return UnCLIP(clip=clip_pair(card.clip), prior=prior_stage(card), decoder=stage, card=card).eval()


def tiny_kandinsky(in_channels: int = 4) -> UnCLIP:
    """Return a Kandinsky 2.2 model: MoVQ latents, no text in the decoder."""
    card = KANDINSKY22_CARD if in_channels == 4 else replace(KANDINSKY22_CARD, concat="known")
    return kandinsky(card, replace(KANDINSKY22_SHAPE.condition, embed_dim=E), in_channels=in_channels)


def tiny_kandinsky21() -> UnCLIP:
    """Return a Kandinsky 2.1 model: MoVQ latents, and a decoder with its own text encoder.

    CLIP, the projection of that encoder and the UNet's context have one width, as diffusers requires.
    """
    words = XLMRConditioner(
        random_network(
            XLMRConfig(vocabulary=40, width=32, layers=2, heads=2, mlp_width=48, positions=80, embed_dim=E), 9
        ),
        Unigram(PIECES),
    )
    condition = replace(KANDINSKY21_SHAPE.condition, embed_dim=E, text_dim=32, pooled_dim=E)
    return kandinsky(KANDINSKY21_CARD, condition, words, context_dim=E)
