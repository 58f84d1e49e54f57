"""The families of published models, and the key prefix of each part in a single file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

UNET_PREFIX, VAE_PREFIX, COND_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of published weights.

    Args:
        title: Name of the model or models.
        parts: Prefix of the keys of each part in a single file.
        note: What the keys do not determine, for the user to specify; empty if they determine everything.
        refusal: Why `ldm.load` refuses such a file, as a clause that follows "which"; empty if it does not.
        unneeded: Shell patterns of keys that are not loaded.
    """

    title: str
    parts: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    refusal: str = ""
    unneeded: tuple[str, ...] = ()

    def prefixes(self, keys: Collection[str]) -> dict[str, str]:
        """Return the prefix of each part in a file with these keys: the usual one, or an alternative."""
        found = {}
        for part, usual in self.parts.items():
            choices = (usual, *ALTERNATIVES.get(usual, ()))
            present = (each for each in choices if any(key.startswith(each) for key in keys))
            found[part] = next(present, usual)
        return found


CLIP_L = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text": f"{COND_PREFIX}transformer."}
CLIP_H = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text": f"{COND_PREFIX}model."}
SDXL_PARTS = {
    "unet": UNET_PREFIX,
    "vae": VAE_PREFIX,
    "text": "conditioner.embedders.0.transformer.",
    "text2": "conditioner.embedders.1.model.",
}
UNCLIP = CLIP_H | {"image": "embedder.model.", "noise": "noise_augmentor."}
# Other prefixes of the same part: SD-Turbo's text tower is stored below that of SDXL's conditioners.
ALTERNATIVES = {
    f"{COND_PREFIX}model.": ("conditioner.embedders.0.model.",),
    "model.encoder.": ("encoder.",),
    "model.decoder.": ("decoder.",),
}
ALONE = {"unet": UNET_PREFIX, "vae": VAE_PREFIX}

EPS_OR_V = "the keys do not tell whether it predicts eps (the 512 base models) or v (768): name the model"
ADDED = "is added to a model and is not a model itself"
AUTOENCODER = "is an autoencoder alone, without a diffusion model"
UNSUPPORTED = "is known but not supported"
PIECE = "is one part of a model: pass the folder that holds all of them (docs/dalle.md)"
HALF = "is half of an autoencoder: pass the folder that holds encoder.pkl and decoder.pkl"

FAMILIES: dict[str, Family] = {
    "sd1": Family(title="Stable Diffusion 1.x", parts=CLIP_L),
    "sd1-inpainting": Family(title="Stable Diffusion 1.x inpainting", parts=CLIP_L),
    "instruct-pix2pix": Family(title="InstructPix2Pix", parts=CLIP_L),
    "sd1-lcm": Family(title="latent consistency model on Stable Diffusion 1.5", parts=CLIP_L),
    "sd2": Family(title="Stable Diffusion 2.x, or SD-Turbo", parts=CLIP_H, note=EPS_OR_V),
    "sd2-inpainting": Family(title="Stable Diffusion 2 inpainting", parts=CLIP_H),
    "sd2-depth": Family(title="Stable Diffusion 2 depth", parts=CLIP_H, unneeded=("depth_model.*",)),
    "sd-x4-upscaler": Family(
        title="Stable Diffusion x4 upscaler", parts=CLIP_H, unneeded=("low_scale_model.*",)
    ),
    "sd21-unclip-h": Family(title="Stable Diffusion 2.1 unCLIP, ViT-H", parts=UNCLIP),
    "sd21-unclip-l": Family(title="Stable Diffusion 2.1 unCLIP, ViT-L", parts=UNCLIP),
    "sdxl": Family(
        title="Stable Diffusion XL, or SDXL-Turbo",
        parts=SDXL_PARTS,
        note="the keys do not tell SDXL from SDXL-Turbo: name the model",
    ),
    "sdxl-inpainting": Family(title="Stable Diffusion XL inpainting", parts=SDXL_PARTS),
    "sdxl-lcm": Family(title="latent consistency model on Stable Diffusion XL", parts=SDXL_PARTS),
    "sdxl-refiner": Family(
        title="Stable Diffusion XL refiner",
        parts={"unet": UNET_PREFIX, "vae": VAE_PREFIX, "text2": "conditioner.embedders.0.model."},
    ),
    "ldm-text2img-large": Family(title="LDM text2img-large", parts=CLIP_L),
    "ldm-text2img256": Family(title="LDM text2img256", parts=CLIP_L),
    "ldm-uncond256": Family(
        title="LDM celebahq, ffhq or lsun beds",
        parts=ALONE,
        note="the keys do not tell celebahq, ffhq and lsun beds apart: name the model",
    ),
    "ldm-churches256": Family(title="LDM lsun churches", parts=ALONE),
    "ldm-cin256": Family(title="LDM cin256", parts=ALONE | {"class": COND_PREFIX}),
    "ldm-cin256-v2": Family(title="LDM cin256-v2", parts=ALONE | {"class": COND_PREFIX}),
    "ldm-inpainting-big": Family(
        title="LDM inpainting-big", parts=ALONE, unneeded=(f"{COND_PREFIX}*",)
    ),  # a copy of the first stage
    "ldm-bsr-sr": Family(title="LDM bsr-sr", parts=ALONE),
    "ldm-semantic": Family(
        title="LDM semantic synthesis", parts=ALONE | {"cond": COND_PREFIX}, refusal=UNSUPPORTED
    ),
    "ldm-layout2img": Family(title="LDM layout2img", parts=CLIP_L, refusal=UNSUPPORTED),
    "rdm768": Family(title="retrieval-augmented diffusion (RDM 768)", parts=ALONE, refusal=UNSUPPORTED),
    "first-stage-kl": Family(
        title="KL autoencoder",
        parts={"vae": ""},
        refusal=AUTOENCODER,
    ),
    "first-stage-vq": Family(
        title="VQ autoencoder",
        parts={"vae": ""},
        refusal=AUTOENCODER,
    ),
    "movq": Family(
        title="MoVQ autoencoder (Kandinsky)",
        parts={"vae": ""},
        refusal=AUTOENCODER,
    ),
    "tiny-autoencoder": Family(
        title="tiny autoencoder (TAESD)",
        parts={"vae": ""},
        refusal=AUTOENCODER,
    ),
    "karlo-prior": Family(
        title="Karlo or Kandinsky prior",
        parts={"prior": "model."},
        note="Karlo and Kandinsky 2.1 have the same keys",
    ),
    "karlo-decoder": Family(title="Karlo decoder", parts={"decoder": "model."}),
    "karlo-sr": Family(
        title="Karlo super-resolution",
        parts={"upsampler": "model_first_steps.", "upsampler-last": "model_last_step."},
    ),
    "kandinsky21": Family(title="Kandinsky 2.1 UNet", parts={"decoder": ""}),
    "kandinsky22": Family(title="Kandinsky 2.2 UNet", parts={"decoder": ""}),
    "dalle2-prior": Family(
        title="DALLE2-pytorch prior", parts={"prior": "net."}, unneeded=("noise_scheduler.*", "clip.*")
    ),
    "dalle2-decoder": Family(title="DALLE2-pytorch decoder", refusal=UNSUPPORTED),
    "dalle-mini": Family(
        title="DALL·E Mini or Mega without a detokenizer",
        parts={"encoder": "model.encoder.", "decoder": "model.decoder."},
        refusal=PIECE,
    ),
    "dalle-mini-encoder": Family(
        title="encoder of DALL·E Mini or Mega", parts={"encoder": ""}, refusal=PIECE
    ),
    "dalle-mini-decoder": Family(
        title="decoder of DALL·E Mini or Mega", parts={"decoder": ""}, refusal=PIECE
    ),
    "dalle-mini-detokenizer": Family(
        title="detokenizer of DALL·E Mini or Mega", parts={"vae": ""}, refusal=PIECE
    ),
    "dalle-dvae": Family(
        title="discrete autoencoder of DALL·E",
        parts={"vae": ""},
        refusal=AUTOENCODER,
    ),
    "dalle-dvae-encoder": Family(
        title="encoder of DALL·E's discrete autoencoder", parts={"vae": ""}, refusal=HALF
    ),
    "dalle-dvae-decoder": Family(
        title="decoder of DALL·E's discrete autoencoder", parts={"vae": ""}, refusal=HALF
    ),
    "controlnet": Family(title="ControlNet", refusal=ADDED),
    "lora": Family(title="LoRA", refusal=f"{ADDED}: load it with pipe.adapters.load"),
    "textual-inversion": Family(title="textual inversion", refusal=ADDED),
    "safety-checker": Family(title="safety checker", refusal=ADDED),
    "clip": Family(title="CLIP", refusal="is a CLIP model alone, without a diffusion model"),
}
