"""The cards of the published unCLIP models."""

from __future__ import annotations

from dataclasses import replace

from ldm.catalog.cards import Defaults, Hub, ScheduleCard
from ldm.catalog.published_sd import SD_BETAS
from ldm.catalog.unclip_cards import PriorCard, StageCard, UnCLIPCard, UnCLIPNetworks
from ldm.models.unclip.noise_augmentation import AugmentationConfig
from ldm.samplers.conventions import Convention

COSINE = ScheduleCard(kind="cosine")
# The grid of Karlo and Kandinsky 2.1: integer timesteps from T − 1 to 0, equally spaced.
RESPACED = Convention(grids={"*": {"spacing": "linspace"}}, quantize=True)
LEARNED = replace(RESPACED, options={"ddpm": {"variance": "learned"}})
LEADING = Convention(grids={"*": {"spacing": "leading"}}, quantize=True)
KANDINSKY_BETAS = ScheduleCard(kind="linear", beta_start=0.00085, beta_end=0.012)
OPENAI_L, LAION_H, LAION_BIGG = (
    "openai/ViT-L-14",
    "laion2b_s32b_b79k/ViT-H-14",
    "laion2b_s39b_b160k/ViT-bigG-14",
)


KARLO_PRIOR = StageCard(
    schedule=COSINE,
    prediction="x0",
    clip_x0=5.0,
    convention=RESPACED,
    defaults=Defaults.square("ddpm", 25, 4.0, 64),
)
KARLO_CARD = UnCLIPCard(
    name="karlo-v1-alpha",
    family="karlo",
    summary="Karlo 1.0 alpha: unCLIP to 64×64 pixels, and to 256×256",
    licence="CreativeML OpenRAIL-M",
    clip=OPENAI_L,
    prior=KARLO_PRIOR,
    decoder=StageCard(
        schedule=COSINE,
        prediction="eps",
        learned_var=True,
        clip_x0=1.0,
        convention=LEARNED,
        defaults=Defaults.square("ddpm", 25, 8.0, 64),
    ),
    upsamplers=(
        StageCard(
            schedule=COSINE,
            prediction="eps",
            clip_x0=1.0,
            convention=RESPACED,
            defaults=Defaults.square("ddpm", 7, 1.0, 256),
        ),
    ),
    networks=UnCLIPNetworks(
        text="clip-l-projected",
        vision="clip-l",
        prior="karlo",
        decoder="karlo",
        upsamplers=("karlo-sr",),
        last=True,
    ),
    hub=Hub(repo="kakaobrain/karlo-v1-alpha"),
)
UNCLIP_L = UnCLIPCard(
    name="sd-v2-1-unclip-l",
    family="sd21-unclip-l",
    summary="Stable Diffusion 2.1 unCLIP on ViT-L/14, with Karlo's prior",
    licence="CreativeML Open RAIL++-M",
    clip=OPENAI_L,
    prior=replace(KARLO_PRIOR, convention=LEADING),
    condition="noised",
    no_image="zeros",
    decoder=StageCard(
        schedule=SD_BETAS,
        prediction="v",
        defaults=Defaults.square("ddim", 20, 10.0, 768),
    ),
    latent_scale=0.18215,
    networks=UnCLIPNetworks(
        text="clip-l-projected",
        vision="clip-l",
        prior="karlo",
        decoder="unclip-l",
        noise=AugmentationConfig(embed_dim=768),
        words="clip-h",
        vae="kl-f8",
    ),
    hub=Hub(repo="stabilityai/stable-diffusion-2-1-unclip-small"),
)
UNCLIP_H = replace(
    UNCLIP_L,
    name="sd-v2-1-unclip-h",
    family="sd21-unclip-h",
    summary="Stable Diffusion 2.1 unCLIP on ViT-H/14: variations of images",
    clip=LAION_H,
    prior=None,
    networks=UnCLIPNetworks(
        vision="clip-h",
        decoder="unclip-h",
        noise=AugmentationConfig(embed_dim=1024),
        words="clip-h",
        vae="kl-f8",
    ),
    hub=Hub(repo="stabilityai/stable-diffusion-2-1-unclip"),
)
KANDINSKY21_CARD = UnCLIPCard(
    name="kandinsky-2-1",
    family="kandinsky21",
    summary="Kandinsky 2.1",
    licence="Apache-2.0",
    clip=OPENAI_L,
    prior=replace(KARLO_PRIOR, clip_x0=10.0),
    no_image="black",
    latent_scale=1.0,
    decoder=StageCard(
        schedule=KANDINSKY_BETAS,
        prediction="eps",
        learned_var=True,
        clip_x0=2.0,
        convention=LEARNED,
        defaults=Defaults.square("ddpm", 100, 4.0, 512),
    ),
    networks=UnCLIPNetworks(
        text="clip-l-projected",
        vision="clip-l",
        prior="kandinsky21",
        decoder="kandinsky21",
        words="xlm-r-large",
        vae="movq",
    ),
)
KANDINSKY22_CARD = replace(
    KANDINSKY21_CARD,
    name="kandinsky-2-2",
    family="kandinsky22",
    summary="Kandinsky 2.2",
    clip=LAION_BIGG,
    decoder=replace(KANDINSKY21_CARD.decoder, convention=replace(LEADING, options=LEARNED.options)),
    networks=UnCLIPNetworks(
        text="clip-bigg", vision="clip-bigg", prior="kandinsky22", decoder="kandinsky22", vae="movq"
    ),
)


def inpainting(card: UnCLIPCard) -> UnCLIPCard:
    """Return the card of Kandinsky's inpainting model, which takes the known latent and its mask as input."""
    assert card.networks is not None
    networks = replace(card.networks, decoder=f"{card.family}-inpaint")
    return replace(
        card,
        name=f"{card.name}-inpaint",
        summary=f"{card.summary} for inpainting: the known latent as input",
        concat="known",
        networks=networks,
    )


DALLE2_LAION = PriorCard(
    name="dalle2-laion-prior",
    family="dalle2-prior",
    summary="LAION's DALL·E 2 prior on ViT-L/14, a prior alone",
    licence="MIT",
    clip=OPENAI_L,
    prior=StageCard(
        schedule=COSINE,
        prediction="x0",
        convention=replace(RESPACED, options={"ddim": {"eta": 1.0}}),
        defaults=Defaults.square("ddim", 64, 1.0, 224),
    ),
    network="dalle2-laion",
    hub=Hub(repo="laion/DALLE2-PyTorch", file="prior/latest.pth"),
)
UNCLIP_CARDS: dict[str, UnCLIPCard] = {
    card.name: card
    for card in (
        KARLO_CARD,
        UNCLIP_H,
        UNCLIP_L,
        KANDINSKY21_CARD,
        inpainting(KANDINSKY21_CARD),
        KANDINSKY22_CARD,
        inpainting(KANDINSKY22_CARD),
    )
}
PRIOR_CARDS: dict[str, PriorCard] = {DALLE2_LAION.name: DALLE2_LAION}
