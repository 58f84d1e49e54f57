"""A complete latent diffusion model with random weights that is small enough for a test."""

from __future__ import annotations

import torch

from ldm.catalog.cards import Defaults, ModelCard, ScheduleCard
from ldm.conditioning.conditioner import TextConditioner
from ldm.diffusion.denoiser import Denoiser
from ldm.models.clip.towers import TextConfig, TextTower
from ldm.models.draft import Draft, DraftConfig
from ldm.models.text.bpe import Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.pipelines.latent import LatentDiffusion
from ldm.samplers.conventions import Convention
from ldm.weights.formats.ldm_folder import EMOJI_TEXT

WORDS = ("a", "red", "apple", "cat", "on", "blue", "background")


def tiny_model(name: str = "emoji-ldm") -> LatentDiffusion:
    torch.manual_seed(0)
    tokenizer = Tokenizer(vocabulary=[i for word in WORDS for i in Tokenizer().encode(word)])
    ids = {"bos_id": tokenizer.bos_id, "eot_id": tokenizer.eot_id}
    tower = TextTower(
        TextConfig(
            vocab_size=len(tokenizer), width=16, layers=1, heads=2, embed_dim=16, activation="gelu", **ids
        )
    )
    net = UNet(
        UNetConfig(
            in_channels=8,
            out_channels=4,
            channels=(8, 16),
            depth=(0, 1),
            blocks=1,
            heads=2,
            context_dim=16,
            pooled_dim=16,
        )
    )
    vae = AutoencoderKL(VAEConfig(channels=(8, 16), blocks=1, patch=2))
    card = ModelCard(
        name=name,
        family="latent",
        summary="a model of the tests",
        licence="none",
        schedule=ScheduleCard(kind="cosine"),
        prediction="v",
        text=EMOJI_TEXT,
        convention=Convention(grids={"*": {"spacing": "trailing"}}),
        defaults=Defaults(sampler="dpmpp_2m", steps=4, guidance=2.0, height=32, width=32),
    )
    draft = Draft(DraftConfig(embed_dim=16, width=16, size=8))
    text = TextConditioner(tower, tokenizer, EMOJI_TEXT, frozenset(WORDS), draft)
    denoiser = Denoiser(net, card.schedule.make(), card.prediction)
    return LatentDiffusion(
        vae=vae, text=text, denoiser=denoiser, latent_scale=0.5, card=card, origin={"unet": "0"}
    ).eval()
