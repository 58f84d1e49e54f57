"""The cards of the published models: one line or a few for each, and what a family shares stated once."""

from __future__ import annotations

from dataclasses import replace

from ldm.catalog.cards import AutoencoderCard, Defaults, Hub, ModelCard, Networks, ScheduleCard
from ldm.conditioning.conditioner import TextConvention
from ldm.samplers.conventions import CONVENTIONS, Convention

MIT = "MIT (code); its publishers state no other licence for the weights"
OPENRAIL, OPENRAIL_PP = "CreativeML OpenRAIL-M", "CreativeML Open RAIL++-M"
STABILITY = "Stability AI non-commercial research community licence"
SEE = "see the publisher's page"


def betas(start: float, end: float) -> ScheduleCard:
    """Square roots of beta in equal steps, a thousand of them, as in all of the family."""
    return ScheduleCard(kind="scaled_linear", beta_start=start, beta_end=end)


def latent_defaults(sampler: str, steps: int, guidance: float, side: int) -> Defaults:
    """What a call does where its caller says nothing, for square pictures."""
    return Defaults(sampler=sampler, steps=steps, guidance=guidance, height=side, width=side)


SD_BETAS, LDM_BETAS = betas(0.00085, 0.012), betas(0.0015, 0.0195)
# distilled models start at the noisiest timestep itself; the peer's first state is noise · sigma_max there
TRAILING = Convention(grids={"*": {"spacing": "trailing"}}, start="sigma", quantize=True)
ETA_1 = replace(CONVENTIONS["compvis"], options={**CONVENTIONS["compvis"].options, "ddim": {"eta": 1.0}})

# Stable Diffusion 1
SD1_CARD = ModelCard(
    name="sd-v1-4",
    family="sd1",
    summary="Stable Diffusion 1.4, 512×512",
    licence=OPENRAIL,
    schedule=SD_BETAS,
    prediction="eps",
    latent_scale=0.18215,
    networks=Networks(unet="sd1", vae="kl-f8", text="clip-l"),
    defaults=latent_defaults("plms", 50, 7.5, 512),
    hub=Hub(
        repo="CompVis/stable-diffusion-v-1-4-original",
        file="sd-v1-4.ckpt",
        sha256="fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
    ),
)
SD1_HASHES = {
    1: "86cd1d3ccb044d7ba8db743d717c9bac603c4043508ad2571383f954390f3cea",
    2: "3b87d30facd5bafca1cbed71cfb86648aad75d1c264663c0cc78c7aea8daec0d",
    3: "2cff93af4dcc07c3e03110205988ff98481e86539c51a8098d4f2236e41f7f2f",
}
SD1_FIRST = [
    replace(
        SD1_CARD,
        name=f"sd-v1-{n}",
        summary=f"Stable Diffusion 1.{n}, 512×512",
        hub=Hub(repo=f"CompVis/stable-diffusion-v-1-{n}-original", file=f"sd-v1-{n}.ckpt", sha256=digest),
    )
    for n, digest in SD1_HASHES.items()
]
SD15_HUB = Hub(
    repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
    file="v1-5-pruned-emaonly.safetensors",
    sha256="6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
)
SD15 = replace(SD1_CARD, name="sd-v1-5", summary="Stable Diffusion 1.5, 512×512", hub=SD15_HUB)
SD15_INPAINTING = replace(
    SD15,
    name="sd-v1-5-inpainting",
    family="sd1-inpainting",
    summary="Stable Diffusion 1.5 for inpainting: mask and masked picture as input",
    networks=Networks(unet="sd1-inpaint", vae="kl-f8", text="clip-l"),
    concat="inpaint",
    hub=Hub(
        repo="stable-diffusion-v1-5/stable-diffusion-inpainting",
        file="sd-v1-5-inpainting.ckpt",
        sha256="c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19",
    ),
)
PIX2PIX = replace(
    SD15,
    name="instruct-pix2pix",
    family="instruct-pix2pix",
    summary="InstructPix2Pix: a picture changed as a sentence asks",
    networks=Networks(unet="instruct-pix2pix", vae="kl-f8", text="clip-l"),
    concat="image",
    defaults=latent_defaults("euler_a", 100, 7.5, 512),
    hub=Hub(repo="timbrooks/instruct-pix2pix"),
)
SD15_LCM = replace(
    SD15,
    name="lcm-sd-v1-5",
    family="sd1-lcm",
    summary="a latent consistency model on Stable Diffusion 1.5 (LCM_Dreamshaper_v7): 1 to 8 steps",
    licence=SEE,
    networks=Networks(unet="sd1-lcm", vae="kl-f8", text="clip-l"),
    defaults=latent_defaults("lcm", 4, 8.5, 768),
    hub=Hub(repo="SimianLuo/LCM_Dreamshaper_v7"),
)

# Stable Diffusion 2
SD2_CARD = ModelCard(
    name="sd-v2-base",
    family="sd2",
    summary="Stable Diffusion 2.0 base, 512×512, predicts eps",
    licence=OPENRAIL_PP,
    schedule=SD_BETAS,
    prediction="eps",
    latent_scale=0.18215,
    networks=Networks(unet="sd2", vae="kl-f8", text="clip-h"),
    text=TextConvention(pad=0),
    defaults=latent_defaults("ddim", 50, 9.0, 512),
    hub=Hub(
        repo="stabilityai/stable-diffusion-2-base",
        file="512-base-ema.ckpt",
        sha256="d635794c1fedfdfa261e065370bea59c651fc9bfa65dc6d67ad29e11869a1824",
    ),
)
SD2_V = replace(
    SD2_CARD,
    name="sd-v2",
    summary="Stable Diffusion 2.0, 768×768, predicts v",
    prediction="v",
    defaults=latent_defaults("ddim", 50, 9.0, 768),
    hub=Hub(
        repo="stabilityai/stable-diffusion-2",
        file="768-v-ema.ckpt",
        sha256="bfcaf0755797b0c30eb00a3787e8b423eb1f5decd8de76c4d824ac2dd27e139f",
    ),
)
SD21 = replace(
    SD2_CARD,
    name="sd-v2-1-base",
    summary="Stable Diffusion 2.1 base, 512×512, predicts eps",
    hub=Hub(
        repo="stabilityai/stable-diffusion-2-1-base",
        file="v2-1_512-ema-pruned.ckpt",
        sha256="88ecb782561455673c4b78d05093494b9c539fc6bfc08f3a9a4a0dd7b0b10f36",
    ),
)
SD21_V = replace(
    SD2_V,
    name="sd-v2-1",
    summary="Stable Diffusion 2.1, 768×768, predicts v",
    hub=Hub(
        repo="stabilityai/stable-diffusion-2-1",
        file="v2-1_768-ema-pruned.ckpt",
        sha256="ad2a33c361c1f593c4a1fb32ea81afce2b5bb7d1983c6b94793a26a3b54b08a0",
    ),
)
SD_TURBO = replace(
    SD2_CARD,
    name="sd-turbo",
    summary="SD-Turbo, 512×512: 1 to 4 steps without guidance",
    licence=STABILITY,
    convention=TRAILING,
    defaults=latent_defaults("euler_a", 1, 1.0, 512),
    hub=Hub(repo="stabilityai/sd-turbo"),
)
SD2_INPAINTING = replace(
    SD2_CARD,
    name="sd-v2-inpainting",
    family="sd2-inpainting",
    summary="Stable Diffusion 2 for inpainting: mask and masked picture as input",
    networks=Networks(unet="sd2-inpaint", vae="kl-f8", text="clip-h"),
    concat="inpaint",
    hub=Hub(
        repo="stabilityai/stable-diffusion-2-inpainting",
        file="512-inpainting-ema.ckpt",
        sha256="2a208a7ded5d42dcb0c0ec908b23c631002091e06afe7e76d16cd11079f8d4e3",
    ),
)
SD2_DEPTH = replace(
    SD2_CARD,
    name="sd-v2-depth",
    family="sd2-depth",
    summary="Stable Diffusion 2 with a depth map as input",
    networks=Networks(unet="sd2-depth", vae="kl-f8", text="clip-h"),
    concat="depth",
    hub=Hub(repo="stabilityai/stable-diffusion-2-depth"),
)
SD_X4 = replace(
    SD2_CARD,
    name="sd-x4-upscaler",
    family="sd-x4-upscaler",
    summary="Stable Diffusion x4 upscaler: a picture of 128×128 to 512×512",
    prediction="v",
    schedule=betas(1e-4, 0.02),
    latent_scale=0.08333,
    networks=Networks(unet="x4", vae="x4", text="clip-h"),
    concat="lowres-noised",
    hub=Hub(
        repo="stabilityai/stable-diffusion-x4-upscaler",
        file="x4-upscaler-ema.safetensors",
        sha256="35c01d6160bdfe6644b0aee52ac2667da2f40a33a5d1ef12bbd011d059057bc6",
    ),
)

# Stable Diffusion XL
L_XL = TextConvention(layer=-2, final_norm=False)
G_XL = TextConvention(layer=-2, final_norm=False, pad=0, pooled=True)
XL_HUB = Hub(
    repo="stabilityai/stable-diffusion-xl-base-1.0",
    file="sd_xl_base_1.0.safetensors",
    sha256="31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
    stated=True,
)
XL_REFINER_HUB = Hub(
    repo="stabilityai/stable-diffusion-xl-refiner-1.0",
    file="sd_xl_refiner_1.0.safetensors",
    sha256="7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f",
    stated=True,
)
SDXL_CARD = ModelCard(
    name="sdxl-base",
    family="sdxl",
    summary="Stable Diffusion XL 1.0, 1024×1024",
    licence=OPENRAIL_PP,
    schedule=SD_BETAS,
    prediction="eps",
    latent_scale=0.13025,
    networks=Networks(unet="sdxl", vae="kl-f8", text="clip-l", text2="clip-bigg"),
    text=L_XL,
    text2=G_XL,
    vector="sizes",
    zero_negative=True,
    defaults=latent_defaults("euler", 50, 5.0, 1024),
    hub=XL_HUB,
)
SDXL_INPAINTING = replace(
    SDXL_CARD,
    name="sdxl-inpainting",
    family="sdxl-inpainting",
    summary="Stable Diffusion XL for inpainting: mask and masked picture as input",
    networks=Networks(unet="sdxl-inpaint", vae="kl-f8", text="clip-l", text2="clip-bigg"),
    concat="inpaint",
    hub=Hub(repo="diffusers/stable-diffusion-xl-1.0-inpainting-0.1"),
)
SDXL_REFINER = replace(
    SDXL_CARD,
    name="sdxl-refiner",
    family="sdxl-refiner",
    summary="Stable Diffusion XL refiner 1.0: image to image at low strength",
    networks=Networks(unet="sdxl-refiner", vae="kl-f8", text2="clip-bigg"),
    text=TextConvention(),
    vector="aesthetic",
    zero_negative=False,
    hub=XL_REFINER_HUB,
)
SDXL_TURBO = replace(
    SDXL_CARD,
    name="sdxl-turbo",
    summary="SDXL-Turbo, 512×512: 1 to 4 steps without guidance",
    licence=STABILITY,
    convention=TRAILING,
    defaults=latent_defaults("euler_a", 1, 1.0, 512),
    hub=Hub(repo="stabilityai/sdxl-turbo"),
)
SDXL_LCM = replace(
    SDXL_CARD,
    name="lcm-sdxl",
    family="sdxl-lcm",
    summary="LCM-SDXL: the base model distilled to 1 to 8 steps",
    zero_negative=False,
    networks=Networks(unet="sdxl-lcm", vae="kl-f8", text="clip-l", text2="clip-bigg"),
    defaults=latent_defaults("lcm", 4, 8.0, 1024),
    hub=None,
)

# Latent diffusion (Rombach et al. 2022)
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
    defaults=latent_defaults("ddim", 200, 5.0, 256),
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
    defaults=latent_defaults("ddim", 200, 1.0, 256),
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
    schedule=betas(0.0015, 0.0155),
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
    defaults=latent_defaults("ddim", 20, 3.0, 256),
)
INPAINTING_BIG = replace(
    FFHQ,
    name="ldm-inpainting-big",
    family="ldm-inpainting-big",
    summary="LDM inpainting without text, 512×512",
    schedule=betas(0.0015, 0.0205),
    networks=Networks(unet="inpainting_big", vae="vq-f4-noattn"),
    concat="inpaint-ldm",
    defaults=latent_defaults("ddim", 50, 1.0, 512),
)
BSR_SR = replace(
    FFHQ,
    name="ldm-bsr-sr",
    family="ldm-bsr-sr",
    summary="LDM super-resolution ×4 without text",
    schedule=betas(0.0015, 0.0155),
    networks=Networks(unet="bsr_sr", vae="vq-f4"),
    concat="lowres",
    convention=ETA_1,
    defaults=latent_defaults("ddim", 100, 1.0, 256),
)

MODELS = (
    *SD1_FIRST,
    SD1_CARD,
    SD15,
    SD15_INPAINTING,
    PIX2PIX,
    SD15_LCM,
    SD2_CARD,
    SD2_V,
    SD21,
    SD21_V,
    SD_TURBO,
    SD2_INPAINTING,
    SD2_DEPTH,
    SD_X4,
    SDXL_CARD,
    SDXL_INPAINTING,
    SDXL_REFINER,
    SDXL_TURBO,
    SDXL_LCM,
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
    """The card of an autoencoder alone; its shape has its name."""
    return AutoencoderCard(
        name=name, family=family, summary=f"{about}, an autoencoder alone", licence=MIT, vae=name, hub=hub
    )


AUTOENCODERS = (
    *(
        autoencoder(f"kl-f{f}", "first-stage-kl", f"LDM first stage KL-f{f}: pictures {f} times smaller")
        for f in (4, 8, 16, 32)
    ),
    *(
        autoencoder(f"vq-f{f}", "first-stage-vq", f"LDM first stage VQ-f{f}: pictures {f} times smaller")
        for f in (4, 8, 16)
    ),
    autoencoder("vq-f4-noattn", "first-stage-vq", "LDM first stage VQ-f4 without attention"),
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

CARDS: dict[str, ModelCard | AutoencoderCard] = {card.name: card for card in (*MODELS, *AUTOENCODERS)}
