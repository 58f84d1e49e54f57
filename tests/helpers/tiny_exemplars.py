"""A complete model with exemplars and random weights that is small enough for a test."""

from __future__ import annotations

import torch
from tiny_unclip import E, clip_pair, prior_stage, random_network

from ldm.catalog.cards import Defaults, ModelCard, ScheduleCard
from ldm.catalog.unclip_cards import StageCard, UnCLIPCard
from ldm.conditioning.conditioner import TextConditioner, TextConvention
from ldm.conditioning.exemplar_index import ExemplarIndex
from ldm.conditioning.exemplar_library import Exemplar, ExemplarLibrary, write_exemplar
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.things import SLOT_WORDS
from ldm.diffusion.denoiser import Denoiser
from ldm.models.clip.towers import TextConfig, TextTower
from ldm.models.dit import DiT, DiTConfig
from ldm.models.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from ldm.models.text.bpe import Tokenizer
from ldm.models.unclip.decoder import DecoderConfig, ImageConditionConfig
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.stages.decoder import DecoderStage
from ldm.pipelines.stages.space import Space
from ldm.pipelines.unclip import UnCLIP
from ldm.samplers.conventions import Convention

GRAMMAR = frozenset("a the red blue on background and three to left of".split())
STYLES = ("noto", "fluent", "flat")
NAMES = ("cat", "dog", "red-apple")
SLOTS, WIDTH, SIZE, CELL = 2, 16, 16, 4
READING = TextConvention(length=None, pad=0, masked=True)


def tiny_library() -> ExemplarLibrary:
    g = torch.Generator().manual_seed(1)
    exemplars = [
        Exemplar(name=name, style=style, content=write_exemplar(torch.rand(4, SIZE, SIZE, generator=g)))
        for name in NAMES
        for style in STYLES
    ]
    return ExemplarLibrary(exemplars, {"cats": ("cat",), "apple": ("red-apple",)}, size=SIZE)


def tiny_conditioner() -> ExemplarConditioner:
    torch.manual_seed(0)
    words = sorted(GRAMMAR | set(SLOT_WORDS))
    tokenizer = Tokenizer(vocabulary=[i for word in words for i in Tokenizer().encode(word)])
    ids = {"bos_id": tokenizer.bos_id, "eot_id": tokenizer.eot_id}
    config = TextConfig(
        vocab_size=len(tokenizer), width=WIDTH, layers=1, heads=2, embed_dim=None, activation="gelu", **ids
    )
    text = TextConditioner(TextTower(config), tokenizer, READING, GRAMMAR)
    layout = tiny_layout()
    return ExemplarConditioner(text, layout, tiny_library(), cell=CELL).eval().requires_grad_(False)


def tiny_layout(**changes: int) -> DiT:
    """Return a prior over layouts with random weights."""
    channels = {"in_channels": 4 + SLOTS, "out_channels": 4 + SLOTS, "patch": 1}
    shape = {"width": WIDTH, "depth": 1, "head_dim": 8, "context_dim": WIDTH}
    net = DiT(DiTConfig(**{**channels, **shape, **changes}))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def tiny_exemplar_model(name: str = "tiny-exemplars") -> LatentDiffusion:
    """Return a pipeline whose images have 16 pixels and whose latents are 4×4."""
    conditioner = tiny_conditioner()
    vae = PatchAutoencoder(PatchAutoencoderConfig(factor=4, latent_channels=6, channels=(8, 16)))
    shape = {"width": 16, "depth": 2, "head_dim": 8, "context_dim": WIDTH}
    net = DiT(DiTConfig(in_channels=6, out_channels=6, slots=SLOTS, cell=CELL, **shape))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    card = ModelCard(
        name=name,
        family="latent",
        summary="a model of the tests",
        licence="none",
        schedule=ScheduleCard(kind="cosine"),
        prediction="x0",
        text=READING,
        convention=Convention(grids={"*": {"spacing": "trailing"}}),
        defaults=Defaults(sampler="dpmpp_2m", steps=3, guidance=1.5, height=SIZE, width=SIZE),
    )
    denoiser = Denoiser(net, card.schedule.make(), card.prediction)
    return LatentDiffusion(
        vae=vae, text=conditioner, denoiser=denoiser, latent_scale=1.0, card=card, origin={"unet": "0"}
    ).eval()


def tiny_exemplar_unclip(name: str = "tiny-exemplar-unclip") -> UnCLIP:
    """Return an unCLIP model whose decoder is shown the exemplars that an embedding chooses."""
    clip = clip_pair("tiny-clip/0")
    drawn = {
        "schedule": ScheduleCard(kind="cosine"),
        "convention": Convention(grids={"*": {"spacing": "trailing"}}),
    }
    decoder = StageCard(prediction="x0", defaults=Defaults.square("ddim", 2, 1.0, SIZE), **drawn)
    card = UnCLIPCard(
        name=name,
        summary="a model of the tests",
        licence="none",
        clip=clip.name,
        decoder=decoder,
        prior=StageCard(prediction="x0", defaults=Defaults.square("ddim", 2, 1.0, SIZE), **drawn),
        words=READING,
    )
    model = tiny_exemplar_model()
    text = model.text
    shown = ExemplarConditioner(
        text.text, text.layout, text.library, cell=CELL, index=ExemplarIndex(text.library, clip)
    )
    condition = ImageConditionConfig(
        embed_dim=E, tokens=2, interleaved=False, text_dim=WIDTH, pooled_dim=None, norms=("tokens",)
    )
    config = DecoderConfig(dit=model.denoiser.net.config, condition=condition)
    stage = DecoderStage(
        random_network(config, 4), decoder, clip=clip.name, space=Space(model.vae, 1.0), text=shown
    )
    return UnCLIP(clip=clip, prior=prior_stage(card), decoder=stage, card=card).eval()
