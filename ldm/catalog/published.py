"""The published latent diffusion models and autoencoders, by name."""

from __future__ import annotations

from ldm.catalog.cards import AutoencoderCard, ModelCard
from ldm.catalog.published_ldm import AUTOENCODERS, LDM_CARDS
from ldm.catalog.published_sd import SD_CARDS

MODELS: tuple[ModelCard, ...] = (*SD_CARDS, *LDM_CARDS)
CARDS: dict[str, ModelCard | AutoencoderCard] = {
    **{card.name: card for card in MODELS},
    **{card.name: card for card in AUTOENCODERS},
}
