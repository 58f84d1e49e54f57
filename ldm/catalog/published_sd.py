"""The cards of Stable Diffusion 1, 2 and XL: one per model; what a family shares is stated once."""

from __future__ import annotations

from dataclasses import replace

from ldm.catalog.cards import Defaults, Hub, ModelCard, ScheduleCard
from ldm.catalog.networks import Networks
from ldm.conditioning.conditioner import TextConvention
from ldm.samplers.conventions import Convention

OPENRAIL, OPENRAIL_PP = "CreativeML OpenRAIL-M", "CreativeML Open RAIL++-M"
STABILITY = "Stability AI non-commercial research community licence"
SEE = "see the publisher's page"
SD_BETAS = ScheduleCard.scaled_linear(0.00085, 0.012)
# Distilled models start at the last timestep itself. In diffusers, their first state is noise · sigma_max.
TRAILING = Convention(grids={"*": {"spacing": "trailing"}}, start="sigma", quantize=True)

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
    defaults=Defaults.square("plms", 50, 7.5, 512),
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
    summary="Stable Diffusion 1.5 for inpainting: mask and masked image as input",
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
    summary="InstructPix2Pix: edits an image by an instruction",
    networks=Networks(unet="instruct-pix2pix", vae="kl-f8", text="clip-l"),
    concat="image",
    defaults=Defaults.square("euler_a", 100, 7.5, 512),
    hub=Hub(repo="timbrooks/instruct-pix2pix"),
)
SD15_LCM = replace(
    SD15,
    name="lcm-sd-v1-5",
    family="sd1-lcm",
    summary="a latent consistency model on Stable Diffusion 1.5 (LCM_Dreamshaper_v7): 1 to 8 steps",
    licence=SEE,
    networks=Networks(unet="sd1-lcm", vae="kl-f8", text="clip-l"),
    defaults=Defaults.square("lcm", 4, 8.5, 768),
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
    defaults=Defaults.square("ddim", 50, 9.0, 512),
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
    defaults=Defaults.square("ddim", 50, 9.0, 768),
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
    defaults=Defaults.square("euler_a", 1, 1.0, 512),
    hub=Hub(repo="stabilityai/sd-turbo"),
)
SD2_INPAINTING = replace(
    SD2_CARD,
    name="sd-v2-inpainting",
    family="sd2-inpainting",
    summary="Stable Diffusion 2 for inpainting: mask and masked image as input",
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
    summary="Stable Diffusion x4 upscaler: an image of 128×128 to 512×512",
    prediction="v",
    schedule=ScheduleCard.scaled_linear(1e-4, 0.02),
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
    defaults=Defaults.square("euler", 50, 5.0, 1024),
    hub=XL_HUB,
)
SDXL_INPAINTING = replace(
    SDXL_CARD,
    name="sdxl-inpainting",
    family="sdxl-inpainting",
    summary="Stable Diffusion XL for inpainting: mask and masked image as input",
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
    defaults=Defaults.square("euler_a", 1, 1.0, 512),
    hub=Hub(repo="stabilityai/sdxl-turbo"),
)
SDXL_LCM = replace(
    SDXL_CARD,
    name="lcm-sdxl",
    family="sdxl-lcm",
    summary="LCM-SDXL: the base model distilled to 1 to 8 steps",
    zero_negative=False,
    networks=Networks(unet="sdxl-lcm", vae="kl-f8", text="clip-l", text2="clip-bigg"),
    defaults=Defaults.square("lcm", 4, 8.0, 1024),
    hub=None,
)

SD_CARDS: tuple[ModelCard, ...] = (
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
)
