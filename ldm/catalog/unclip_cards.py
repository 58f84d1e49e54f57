"""Cards of unCLIP models: how each of their stages wants to be sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ldm.catalog.cards import Defaults, Hub, ScheduleCard, shape
from ldm.catalog.shapes import DECODERS, MOVQ, PRIORS, TEXTS, UNETS, UPSAMPLERS, VAES, VISIONS, WORDS
from ldm.conditioning.conditioner import TextConvention
from ldm.diffusion.interfaces import Prediction
from ldm.models.clip.towers import TextConfig, VisionConfig
from ldm.models.movq import MoVQConfig
from ldm.models.text.xlmr import XLMRConfig
from ldm.models.unclip.autoregressive import AutoregressiveConfig
from ldm.models.unclip.decoder import DecoderConfig
from ldm.models.unclip.noise_augmentation import AugmentationConfig
from ldm.models.unclip.prior import PriorConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.samplers import get_sampler
from ldm.samplers.conventions import Convention, get_convention

# "unclip": models of one's own; the others are published families, whose files have layouts of their own
# as Karlo, Kandinsky and the models trained here read CLIP's text tower
READ = TextConvention(pad=0, masked=True, pooled=True)
UnCLIPFamily = Literal["unclip", "karlo", "sd21-unclip-h", "sd21-unclip-l", "kandinsky21", "kandinsky22"]
UNCLIP_FAMILIES: tuple[str, ...] = get_args(UnCLIPFamily)


@dataclass(frozen=True, kw_only=True)
class StageCard:
    """One diffusion of several: its schedule, what its network predicts, and how it is sampled.

    ``learned_var``: the network gives a variance too. ``clip_x0``: what x0 is clamped to, ± this; None for
    nothing. ``residual``: of an upsampler that makes the difference to the picture enlarged by interpolation,
    the deviation that this is in units of; None where it makes the picture (SRDiff, Li et al. 2021).
    ``defaults``: height and width mean nothing to a prior, and are the picture's for a decoder, in pixels.
    """

    schedule: ScheduleCard
    prediction: Prediction
    learned_var: bool = False
    clip_x0: float | None = None
    residual: float | None = None
    convention: str | Convention = "diffusers"
    defaults: Defaults

    def __post_init__(self) -> None:
        get_sampler(self.defaults.sampler)
        self.grids()
        for name, value in (("clip_x0", self.clip_x0), ("residual", self.residual)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number or None, got {value}")

    def grids(self) -> Convention:
        """The grid of every sampler."""
        return get_convention(self.convention) if isinstance(self.convention, str) else self.convention


@dataclass(frozen=True, kw_only=True)
class AutoregressiveCard:
    """How an autoregressive prior is sampled: for which cosine of text and image, how far from the likeliest;
    see `AutoregressivePrior.sample`."""

    similarity: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class UnCLIPNetworks:
    """The networks of a published model, each by the name of its shape (`ldm.catalog.shapes`) or by its own
    numbers; None where there is none.

    ``text``, ``vision``: CLIP's towers. ``decoder``: a `Decoder`, or a UNet with ``noise``, the augmentation
    of its embeddings. ``words``: what the decoder reads texts with, where that is not CLIP's tower.
    ``upsamplers``: from small to large; ``last``: whether each has another network of the same shape for its
    last step.
    """

    text: str | TextConfig | None = None
    vision: str | VisionConfig | None = None
    prior: str | PriorConfig | AutoregressiveConfig | None = None
    decoder: str | DecoderConfig | UNetConfig
    noise: AugmentationConfig | None = None
    words: str | TextConfig | XLMRConfig | None = None
    vae: str | VAEConfig | MoVQConfig | None = None
    upsamplers: tuple[str | UNetConfig, ...] = ()
    last: bool = False

    def __post_init__(self) -> None:
        self.configs()

    def configs(self) -> dict[str, Any]:
        """The shapes by part: "decoder", and of the others those that there are; ValueError for an unknown
        name."""
        tables: dict[str, Mapping[str, Any]] = {
            "text": TEXTS,
            "vision": VISIONS,
            "prior": PRIORS,
            "decoder": {**DECODERS, **UNETS},
            "noise": {},
            "words": WORDS,
            "vae": {**VAES, "movq": MOVQ},
        }
        found = {
            part: shape(part, getattr(self, part), table)
            for part, table in tables.items()
            if getattr(self, part) is not None
        }
        for k, value in enumerate(self.upsamplers):
            config = shape("upsamplers", value, UPSAMPLERS)
            found |= {upsampler_name(k): config} | (
                {upsampler_name(k, last=True): config} if self.last else {}
            )
        return found


def upsampler_name(k: int, *, last: bool = False) -> str:
    """The name of the k-th upsampler's part, or of its network for the last step."""
    return f"upsampler{'' if k == 0 else k + 1}{'-last' if last else ''}"


@dataclass(frozen=True, kw_only=True)
class UnCLIPCard:
    """An unCLIP model. ``clip``: the CLIP whose embeddings it runs on; ``prior`` None where it has none,
    ``upsamplers`` from small to large.

    ``condition``: how the embedding reaches the decoder: "tokens" (a vector and tokens of context) or
    "noised" (Stable unCLIP). ``no_image``: what stands for no image in guidance: a "learned" embedding, that
    of a "black" picture (zeros as the tower's input), or "zeros" for the condition. ``concat``: what
    inpainting models have beside the latent: the known latent and the mask of what is known. ``text``,
    ``words``: how CLIP's text tower is read, and the decoder's own. ``latent_scale``: None where the weights
    state it, or there is no autoencoder.

    ``networks``: None where each part's YAML states its shape. ``parts``: the folders of parts that lie
    elsewhere, below that of the card: those that another embedded model has.
    """

    name: str
    summary: str
    licence: str
    clip: str
    decoder: StageCard
    prior: StageCard | AutoregressiveCard | None = None
    upsamplers: tuple[StageCard, ...] = ()
    condition: Literal["tokens", "noised"] = "tokens"
    no_image: Literal["learned", "black", "zeros"] = "learned"
    concat: Literal["known"] | None = None
    pictures: int = 4
    family: UnCLIPFamily = "unclip"
    text: TextConvention = field(default_factory=lambda: READ)
    words: TextConvention = field(default_factory=lambda: TextConvention(pad=0))
    latent_scale: float | None = None
    networks: UnCLIPNetworks | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    hub: Hub | None = None

    def __post_init__(self) -> None:
        if (self.condition == "noised") != (self.no_image == "zeros"):
            raise ValueError(
                f'no_image: "zeros" belongs to condition "noised", got {self.no_image!r} with'
                f" {self.condition!r}"
            )
        if self.family != "unclip" and self.networks is None:
            raise ValueError(f"a card of the family {self.family!r} must state its networks")
        if not self.text.pooled:
            raise ValueError("text.pooled: expected true, as the text's embedding is read with its tokens")


@dataclass(frozen=True, kw_only=True)
class PriorCard:
    """A diffusion prior alone, for a decoder of the same CLIP; ``text``: CLIP's text tower, which its file
    does not hold."""

    name: str
    family: str
    summary: str
    licence: str
    clip: str
    prior: StageCard
    network: str | PriorConfig
    hub: Hub | None = None

    def config(self) -> PriorConfig:
        """Its shape."""
        return shape("network", self.network, PRIORS)
