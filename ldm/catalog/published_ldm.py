"""The cards of the latent diffusion models and autoencoders of Rombach et al. 2022, and of TAESD."""

from __future__ import annotations

from dataclasses import replace

from ldm.catalog.cards import AutoencoderCard, Defaults, Hub, ModelCard, ScheduleCard
from ldm.catalog.networks import Networks
from ldm.catalog.published_sd import SD_BETAS
from ldm.samplers.conventions import CONVENTIONS

MIT = "MIT (code); its publishers state no other licence for the weights"
LDM_BETAS = ScheduleCard.scaled_linear(0.0015, 0.0195)
ETA_1 = replace(CONVENTIONS["compvis"], options={**CONVENTIONS["compvis"].options, "ddim": {"eta": 1.0}})

TEXT2IMG = ModelCard(
    name="ldm-text2img-large",
    family="ldm-text2img-large",
    summary="LDM text-to-image, 1.45 billion parameters, 256×256",
    licence=MIT,
    schedule=SD_BETAS,
    prediction="eps",
    latent_scale=0.18215,
    networks=Networks(unet="text2img-large", vae="kl-f8", text="text2img-large"),
    convention="compvis",
    defaults=Defaults.square("ddim", 200, 5.0, 256),
    hub=Hub(repo="CompVis/ldm-text2im-large-256"),
)
TEXT2IMG256 = replace(
    TEXT2IMG,
    name="ldm-text2img256",
    family="ldm-text2img256",
    summary="LDM text-to-image over VQ-f4, 256×256",
    schedule=LDM_BETAS,
    latent_scale=1.0,
    networks=Networks(unet="text2img256", vae="vq-f4", text="text2img256"),
    hub=None,
)
CELEBAHQ = replace(
    TEXT2IMG256,
    name="ldm-celebahq",
    family="ldm-uncond256",
    summary="LDM faces (CelebA-HQ), unconditional, 256×256",
    networks=Networks(unet="celebahq", vae="vq-f4"),
    defaults=Defaults.square("ddim", 200, 1.0, 256),
    hub=Hub(repo="CompVis/ldm-celebahq-256"),
)
FFHQ = replace(CELEBAHQ, name="ldm-ffhq", summary="LDM faces (FFHQ), unconditional, 256×256", hub=None)
BEDS = replace(
    CELEBAHQ, name="ldm-lsun-beds", summary="LDM bedrooms (LSUN), unconditional, 256×256", hub=None
)
CHURCHES = replace(
    FFHQ,
    name="ldm-lsun-churches",
    family="ldm-churches256",
    summary="LDM churches (LSUN) over KL-f8, unconditional, 256×256",
    schedule=ScheduleCard.scaled_linear(0.0015, 0.0155),
    latent_scale=None,
    networks=Networks(unet="lsun_churches", vae="kl-f8"),
)
CIN = replace(
    FFHQ,
    name="ldm-cin256",
    family="ldm-cin256",
    summary="LDM ImageNet by class over VQ-f8, 256×256",
    networks=Networks(unet="cin256", vae="vq-f8", text="cin256"),
)
CIN2 = replace(
    CIN,
    name="ldm-cin256-v2",
    family="ldm-cin256-v2",
    summary="LDM ImageNet by class over VQ-f4, with guidance, 256×256",
    null_class=1000,
    networks=Networks(unet="cin256-v2", vae="vq-f4", text="cin256-v2"),
    defaults=Defaults.square("ddim", 20, 3.0, 256),
)
INPAINTING_BIG = replace(
    FFHQ,
    name="ldm-inpainting-big",
    family="ldm-inpainting-big",
    summary="LDM inpainting without text, 512×512",
    schedule=ScheduleCard.scaled_linear(0.0015, 0.0205),
    networks=Networks(unet="inpainting_big", vae="vq-f4-noattn"),
    concat="inpaint-ldm",
    defaults=Defaults.square("ddim", 50, 1.0, 512),
)
BSR_SR = replace(
    FFHQ,
    name="ldm-bsr-sr",
    family="ldm-bsr-sr",
    summary="LDM super-resolution ×4 without text",
    schedule=ScheduleCard.scaled_linear(0.0015, 0.0155),
    networks=Networks(unet="bsr_sr", vae="vq-f4"),
    concat="lowres",
    convention=ETA_1,
    defaults=Defaults.square("ddim", 100, 1.0, 256),
)

LDM_CARDS: tuple[ModelCard, ...] = (
    TEXT2IMG,
    TEXT2IMG256,
    CELEBAHQ,
    FFHQ,
    BEDS,
    CHURCHES,
    CIN,
    CIN2,
    INPAINTING_BIG,
    BSR_SR,
)


def autoencoder(name: str, family: str, about: str, hub: Hub | None = None) -> AutoencoderCard:
    """Return the card of the autoencoder ``name``, which is also the name of its shape."""
    return AutoencoderCard(
        name=name, family=family, summary=f"{about}, an autoencoder alone", licence=MIT, vae=name, hub=hub
    )


AUTOENCODERS = (
    *(
        autoencoder(f"kl-f{f}", "first-stage-kl", f"LDM first stage KL-f{f}: downsampling by {f}")
        for f in (4, 8, 16, 32)
    ),
    *(
        autoencoder(f"vq-f{f}", "first-stage-vq", f"LDM first stage VQ-f{f}: downsampling by {f}")
        for f in (4, 8, 16)
    ),
    autoencoder("vq-f4-noattn", "first-stage-vq", "LDM first stage VQ-f4 without attention"),
    autoencoder(
        "vqgan-imagenet-f16-16384", "first-stage-vq", "VQGAN of ImageNet: downsampling by 16, 16384 codes"
    ),
    autoencoder("vq-f8-n256", "first-stage-vq", "LDM first stage VQ-f8 with 256 codes"),
    autoencoder(
        "taesd",
        "tiny-autoencoder",
        "TAESD, quick previews for Stable Diffusion 1 and 2",
        Hub(repo="madebyollin/taesd"),
    ),
    autoencoder(
        "taesdxl",
        "tiny-autoencoder",
        "TAESDXL, quick previews for Stable Diffusion XL",
        Hub(repo="madebyollin/taesdxl"),
    ),
)
