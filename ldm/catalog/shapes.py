"""Configurations of the published networks, by the names that cards refer to."""

from __future__ import annotations

from dataclasses import replace

from ldm.models.clip.towers import TextConfig, VisionConfig
from ldm.models.labels import LabelConfig
from ldm.models.movq import MoVQConfig
from ldm.models.text.bert import BertConfig
from ldm.models.text.xlmr import XLMRConfig
from ldm.models.tiny import TinyConfig
from ldm.models.unclip.decoder import DecoderConfig, ImageConditionConfig
from ldm.models.unclip.prior import PriorConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.models.vq import VQConfig

SD1 = UNetConfig()
SD2 = UNetConfig(heads=None, head_dim=64, context_dim=1024, linear_projection=True)
SDXL = UNetConfig(
    channels=(320, 640, 1280),
    depth=(0, 2, 10),
    mid_depth=10,
    heads=None,
    head_dim=64,
    context_dim=2048,
    linear_projection=True,
    pooled_dim=2816,
)
REFINER = UNetConfig(
    channels=(384, 768, 1536, 1536),
    depth=(0, 4, 4, 0),
    mid_depth=4,
    heads=None,
    head_dim=64,
    context_dim=1280,
    linear_projection=True,
    pooled_dim=2560,
)
X4 = UNetConfig(
    in_channels=7,
    channels=(256, 512, 512, 1024),
    depth=(0, 1, 1, 1),
    context_dim=1024,
    linear_projection=True,
    only_cross=(True, True, True, False),
    classes=1000,
)
# Three channels (VQ-f4), attention below the full resolution, heads of 32 channels.
LDM_VQ4 = UNetConfig(
    in_channels=3,
    out_channels=3,
    channels=(192, 384, 576, 960),
    depth=(0, 1, 1, 1),
    heads=None,
    head_dim=32,
    context_dim=640,
)
# Unconditional: self-attention only.
CELEBA = UNetConfig(
    in_channels=3,
    out_channels=3,
    channels=(224, 448, 672, 896),
    depth=(0, 1, 1, 1),
    heads=None,
    head_dim=32,
    context_dim=None,
    attention="block",
)

UNETS: dict[str, UNetConfig] = {
    "sd1": SD1,
    "sd1-inpaint": replace(SD1, in_channels=9),
    "instruct-pix2pix": replace(SD1, in_channels=8),
    "sd1-lcm": replace(SD1, guidance_dim=256),
    "sd2": SD2,
    "sd2-inpaint": replace(SD2, in_channels=9),
    "sd2-depth": replace(SD2, in_channels=5),
    "unclip-h": replace(SD2, class_dim=2048),
    "unclip-l": replace(SD2, class_dim=1536),
    "x4": X4,
    "sdxl": SDXL,
    "sdxl-inpaint": replace(SDXL, in_channels=9),
    "sdxl-lcm": replace(SDXL, guidance_dim=256),
    "sdxl-refiner": REFINER,
    "text2img-large": replace(SD1, context_dim=1280),
    "text2img256": LDM_VQ4,
    "cin256": UNetConfig(
        channels=(256, 512, 1024), depth=(1, 1, 1), heads=None, head_dim=32, context_dim=512
    ),
    "cin256-v2": replace(LDM_VQ4, heads=1, head_dim=None, context_dim=512),
    "layout2img": replace(
        LDM_VQ4, channels=(128, 256, 384, 512), depth=(0, 3, 3, 3), mid_depth=3, context_dim=512
    ),
    "rdm": UNetConfig(
        in_channels=16, out_channels=16, channels=(448, 896, 1344, 1792), heads=None, head_dim=32
    ),
    "celebahq": CELEBA,
    "ffhq": CELEBA,
    "lsun_beds": CELEBA,
    "lsun_churches": UNetConfig(
        channels=(192, 384, 384, 768, 768),
        depth=(1, 1, 1, 1, 0),
        context_dim=None,
        attention="block",
        scale_shift=True,
        resample="resblock",
    ),
    "inpainting_big": replace(
        CELEBA, in_channels=7, channels=(256, 512, 768, 1024), heads=8, head_dim=None, resample="resblock"
    ),
    "bsr_sr": replace(CELEBA, in_channels=6, channels=(160, 320, 320, 640), depth=(0, 0, 0, 1)),
    "semantic": replace(
        CELEBA, in_channels=6, channels=(128, 512, 1024), depth=(0, 0, 0), heads=8, head_dim=None
    ),
}

KL_F4 = VAEConfig(channels=(128, 256, 512), latent_channels=3)
VQ_F8 = VQConfig(channels=(128, 256, 256, 512), latent_channels=4, attention_levels=(3,), codes=16384)
VAES: dict[str, VAEConfig | VQConfig | TinyConfig] = {
    "kl-f4": KL_F4,
    "kl-f8": VAEConfig(),  # Stable Diffusion 1, 2 and XL
    "kl-f16": VAEConfig(channels=(128, 128, 256, 256, 512), latent_channels=16, attention_levels=(4,)),
    "kl-f32": VAEConfig(channels=(128, 128, 256, 256, 512, 512), latent_channels=64, attention_levels=(4, 5)),
    "x4": replace(KL_F4, latent_channels=4),
    "vq-f4": VQConfig(),
    "vq-f4-noattn": VQConfig(mid_attention=False),
    "vq-f8": VQ_F8,
    "vq-f8-n256": replace(VQ_F8, codes=256),
    "vq-f16": VQConfig(
        channels=(128, 128, 256, 256, 512), latent_channels=8, attention_levels=(4,), codes=16384
    ),
    # the autoencoder of DALL·E Mini
    "vqgan-imagenet-f16-16384": VQConfig(
        channels=(128, 128, 256, 256, 512), latent_channels=256, attention_levels=(4,), codes=16384
    ),
    "taesd": TinyConfig(),
    "taesdxl": TinyConfig(),
}

# Kandinsky
MOVQ = MoVQConfig(channels=VQ_F8.channels, latent_channels=4, attention_levels=(3,), codes=16384)

BERTS: dict[str, BertConfig] = {
    "text2img-large": BertConfig(),
    "text2img256": BertConfig(width=640),
    "layout2img": BertConfig(width=512, layers=16, vocabulary=8192, length=92),
}

LABEL_SHAPES: dict[str, LabelConfig] = {"cin256": LabelConfig(classes=1000), "cin256-v2": LabelConfig()}

# Text towers as diffusion models use them. Stable Diffusion 2 uses 23 of the 24 blocks of ViT-H and no
# projection; the rest is left out.
TEXTS: dict[str, TextConfig] = {
    "clip-l": TextConfig(embed_dim=None),
    "clip-h": TextConfig(width=1024, layers=23, heads=16, activation="gelu", embed_dim=None),
    "clip-bigg": TextConfig(width=1280, layers=32, heads=20, activation="gelu", embed_dim=1280),
    "clip-l-projected": TextConfig(),
}
VISIONS: dict[str, VisionConfig] = {
    "clip-l": VisionConfig(),
    "clip-h": VisionConfig(width=1280, layers=32, heads=16, embed_dim=1024, activation="gelu"),
    "clip-bigg": VisionConfig(
        width=1664, layers=48, heads=16, mlp_width=8192, embed_dim=1280, activation="gelu"
    ),
}
# Text encoders of decoders
WORDS: dict[str, TextConfig | XLMRConfig] = {**TEXTS, "xlm-r-large": XLMRConfig()}

CONDITIONERS: dict[str, TextConfig | BertConfig | LabelConfig] = {**TEXTS, **BERTS, **LABEL_SHAPES}

# The priors of DALLE2-pytorch read the tokens of CLIP's text tower, which are as wide as an embedding.
DALLE2_PRIOR = PriorConfig(
    length=256, width=768, layers=24, heads=32, blocks="cosine", timesteps=1000, normalize="unit"
)
PRIORS: dict[str, PriorConfig] = {
    "karlo": PriorConfig(),
    "kandinsky21": PriorConfig(),
    "kandinsky22": PriorConfig(embed_dim=1280, text_dim=1280),
    "dalle2-laion": DALLE2_PRIOR,
    "dalle2-readme": replace(DALLE2_PRIOR, length=77, layers=12, heads=12),
}

# Attention to image and context below the full resolution; residual blocks resample; the variance is learned.
GLIDE = UNetConfig(
    in_channels=3,
    out_channels=6,
    channels=(320, 640, 960, 1280),
    depth=(0, 1, 1, 1),
    blocks=3,
    heads=None,
    head_dim=64,
    context_dim=1536,
    attention="block",
    resample="resblock",
    scale_shift=True,
    embedded=True,
)
KANDINSKY = replace(GLIDE, in_channels=4, out_channels=8, channels=(384, 768, 1152, 1536), context_dim=768)
KANDINSKY21 = DecoderConfig(
    unet=KANDINSKY,
    condition=ImageConditionConfig(
        tokens=10, interleaved=False, text_dim=1024, norms=("pooled",), null_image=False
    ),
)
KANDINSKY22 = DecoderConfig(
    unet=KANDINSKY,
    condition=ImageConditionConfig(
        embed_dim=1280,
        tokens=32,
        interleaved=False,
        text_dim=None,
        pooled_dim=None,
        norms=("image", "tokens"),
        null_image=False,
    ),
)
DECODERS: dict[str, DecoderConfig] = {
    "karlo": DecoderConfig(unet=GLIDE, condition=ImageConditionConfig()),
    "kandinsky21": KANDINSKY21,
    "kandinsky21-inpaint": replace(KANDINSKY21, unet=replace(KANDINSKY, in_channels=9)),
    "kandinsky22": KANDINSKY22,
    "kandinsky22-inpaint": replace(KANDINSKY22, unet=replace(KANDINSKY, in_channels=9)),
}
KARLO_SR = replace(
    GLIDE,
    in_channels=6,
    out_channels=3,
    depth=(0, 0, 0, 0),
    mid_depth=0,
    context_dim=None,
    scale_shift=False,
    embedded=None,
)
UPSAMPLERS: dict[str, UNetConfig] = {"karlo-sr": KARLO_SR}
