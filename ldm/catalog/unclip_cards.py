"""Cards of unCLIP models: their networks, and how each stage is sampled by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from ldm.catalog.cards import Card, DiffusionCard, Kind, SampledCard
from ldm.catalog.networks import shape
from ldm.catalog.shapes import DECODERS, MOVQ, PRIORS, TEXTS, UNETS, UPSAMPLERS, VAES, VISIONS, WORDS
from ldm.conditioning.conditioner import TextConvention
from ldm.diffusion.constraints import clip_x0
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.interfaces import DenoiseFn
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.clip.towers import TextConfig, VisionConfig
from ldm.models.movq import MoVQConfig
from ldm.models.text.xlmr import XLMRConfig
from ldm.models.unclip.autoregressive import AutoregressiveConfig
from ldm.models.unclip.decoder import DecoderConfig
from ldm.models.unclip.noise_augmentation import AugmentationConfig
from ldm.models.unclip.prior import PriorConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.support.config import check_between
from ldm.support.scalars import check_above_zero

# How the text tower of CLIP is read by Karlo, Kandinsky and the models of this package.
READ = TextConvention(pad=0, masked=True, pooled=True)
# "unclip" is the family of models in the ldm layout; the others are published families with layouts of their
# own.
UnCLIPFamily = Literal["unclip", "karlo", "sd21-unclip-h", "sd21-unclip-l", "kandinsky21", "kandinsky22"]
UNCLIP_FAMILIES: tuple[str, ...] = get_args(UnCLIPFamily)
# Stable unCLIP: part in the authors' single file -> part of the card
STABLE_FILE_PARTS = {"unet": "decoder", "vae": "vae", "text": "words", "image": "vision"}


@dataclass(frozen=True, kw_only=True)
class StageCard(DiffusionCard):
    """One diffusion of an unCLIP model: prior, decoder or upsampler.

    ``defaults.height`` and ``defaults.width`` are those of the image for a decoder or an upsampler, and are
    not used by a prior.

    Args:
        learned_var: Whether the network predicts a variance too. Default: False.
        clip_x0: Bound of x0, which is clamped to [−clip_x0, clip_x0]; None for no bound.
        residual: For an upsampler that predicts the difference to the image enlarged by interpolation: the
            standard deviation in whose units the difference is; None if it predicts the image itself
            (SRDiff, Li et al. 2021).
    """

    learned_var: bool = False
    clip_x0: float | None = None
    residual: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("clip_x0", self.clip_x0), ("residual", self.residual)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number or None, got {value}")

    def make_denoiser(self, net: nn.Module) -> Denoiser:
        """Return the denoiser of a network that was trained as this card states."""
        return Denoiser(
            net,
            self.schedule.make(),
            self.prediction,
            learned_var=self.learned_var,
            quantize=self.grids().quantize,
        )

    def constrain(self, denoise: DenoiseFn, schedule: NoiseSchedule) -> DenoiseFn:
        """Return ``denoise`` with x0 clamped to ±``clip_x0``."""
        return denoise if self.clip_x0 is None else clip_x0(denoise, schedule, self.clip_x0)


@dataclass(frozen=True, kw_only=True)
class AutoregressiveCard(SampledCard):
    """How an autoregressive prior is sampled; see `AutoregressivePrior.sample`.

    Args:
        similarity: Cosine between text and image embedding that is asked for. Default: 0.5.
        temperature: Temperature of sampling; 0 takes the most likely code. Default: 1.
    """

    similarity: float = 0.5
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class UnCLIPNetworks:
    """The networks of an unCLIP model, each the name of a published shape or a configuration.

    The names are those of `ldm.catalog.shapes`; None stands for no such network.

    Args:
        text: CLIP's text tower.
        vision: CLIP's image tower.
        prior: The prior, diffusion or autoregressive.
        decoder: A `Decoder`, or a UNet together with ``noise``.
        noise: The noise augmentation of image embeddings in Stable unCLIP.
        words: The decoder's own text encoder; None if it reads CLIP's tower, or no text.
        vae: The autoencoder; None for a decoder of pixels.
        upsamplers: The upsamplers, from the smallest image to the largest.
        last: Whether each upsampler has a second network of the same shape for its last step.
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
        """Return the configurations by part: "decoder", and the others that are present.

        Raises:
            ValueError: If a name is not a published shape.
        """
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
    """Return the part name of upsampler ``k`` (from 0), or of its network for the last step."""
    return f"upsampler{'' if k == 0 else k + 1}{'-last' if last else ''}"


@dataclass(frozen=True, kw_only=True)
class UnCLIPCard(Card):
    """An unCLIP model: a prior, a decoder and upsamplers on the embeddings of one CLIP.

    Args:
        clip: Name of the CLIP whose embeddings the model uses.
        decoder: How the decoder is sampled.
        prior: How the prior is sampled; None if there is none.
        upsamplers: How the upsamplers are sampled, from the smallest image to the largest.
        condition: How the image embedding enters the decoder: "tokens" (a vector and context tokens), or
            "noised" (Stable unCLIP).
        no_image: What stands for no image in guidance: a "learned" embedding, the embedding of a "black"
            image (zeros as the tower's input), or "zeros" as the condition.
        concat: "known" for inpainting models that take the known latent and the mask of what is known.
        pictures: Number of images of one prompt. Default: 4.
        family: "unclip", or a published family.
        text: How CLIP's text tower is read.
        words: How the decoder's own text encoder is read.
        latent_scale: Scale of the latents; None if the weights state it or there is no autoencoder.
        networks: The networks; None if each part's YAML states its configuration.
    """

    kind: ClassVar[Kind] = "unclip"
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

    def __post_init__(self) -> None:
        check_between(1, 1000, pictures=self.pictures)
        check_above_zero(latent_scale=self.latent_scale)
        if (self.condition == "noised") != (self.no_image == "zeros"):
            raise ValueError(
                f'no_image: "zeros" and condition "noised" require each other, got {self.no_image!r} with'
                f" {self.condition!r}"
            )
        if self.family != "unclip" and self.networks is None:
            raise ValueError(f"networks: a card of the family {self.family!r} must state its networks")
        if not self.text.pooled:
            raise ValueError("text.pooled: expected true, because the prior reads the pooled text embedding")

    def shapes(self) -> dict[str, object]:
        """Return the network configurations by part; empty if the card leaves them to each part's YAML."""
        return {} if self.networks is None else self.networks.configs()

    def main_stage(self) -> DiffusionCard:
        """Return the decoder's card."""
        return self.decoder

    def file_parts(self) -> dict[str, str]:
        """Map the names of parts in the authors' single file to the names of this card's parts."""
        return dict(STABLE_FILE_PARTS) if self.condition == "noised" else super().file_parts()

    def part_folders(self, folder: Path) -> dict[str, Path]:
        """Return the folder of each part: the parts that the stages need, and the others that are present."""
        upsamplers = [upsampler_name(k) for k in range(len(self.upsamplers))]
        needed = ["decoder", *(["prior"] if self.prior is not None else []), *upsamplers, *self.parts]
        others = [
            "text",
            "vision",
            "noise",
            "words",
            "layout",
            "vae",
            *(f"{name}-last" for name in upsamplers),
        ]
        present = [name for name in others if (folder / f"{name}.yaml").is_file()]
        return self.located(folder, [*needed, *present])

    def stages(self) -> Mapping[str, SampledCard]:
        """Return the stages by part: "prior" (if present), "decoder", "upsampler", "upsampler2" and so on."""
        prior: dict[str, SampledCard] = {} if self.prior is None else {"prior": self.prior}
        upsamplers = {upsampler_name(k): stage for k, stage in enumerate(self.upsamplers)}
        return {**prior, "decoder": self.decoder, **upsamplers}

    def part_names(self) -> tuple[str, ...]:
        """Return the names of all parts that such a model may have in ldm layout."""
        upsamplers = [
            upsampler_name(k, last=last) for k in range(len(self.upsamplers)) for last in (False, True)
        ]
        return ("text", "vision", "prior", "decoder", "noise", "words", "layout", "vae", *upsamplers)


@dataclass(frozen=True, kw_only=True)
class PriorCard(Card):
    """A diffusion prior without a decoder, to be combined with a decoder of the same CLIP.

    Args:
        clip: Name of the CLIP whose embeddings it predicts. Its text tower is not part of the weights.
        prior: How the prior is sampled.
        network: The prior's configuration, or the name of a published one.
    """

    kind: ClassVar[Kind] = "prior"
    clip: str
    prior: StageCard
    network: str | PriorConfig

    def config(self) -> PriorConfig:
        """Return the prior's configuration."""
        return shape("network", self.network, PRIORS)

    def shapes(self) -> dict[str, object]:
        """Return the configuration as the part "prior"."""
        return {"prior": self.config()}

    def main_stage(self) -> DiffusionCard:
        """Return the prior's card."""
        return self.prior
