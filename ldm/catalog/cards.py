"""Model cards: the networks a model is made of, and how it is sampled by default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from ldm.catalog.families import FAMILIES
from ldm.catalog.networks import Autoencoder, Networks, shape
from ldm.catalog.shapes import VAES
from ldm.conditioning.conditioner import TextConvention
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.edm import EDMSchedule
from ldm.diffusion.interfaces import DenoiseFn, Prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.samplers import get_sampler
from ldm.samplers.conventions import Convention, get_convention
from ldm.support.config import check_between, nearest
from ldm.support.scalars import check_above_zero

Kind = Literal["latent", "autoencoder", "unclip", "prior", "tokens", "dvae"]
# The contents of `Cond.concat`. "inpaint": mask and masked latent; "inpaint-ldm": masked latent and mask in
# [−1, 1]; "depth": depth map; "image": unscaled latent of the image to edit; "lowres": image to enlarge, at
# the size of the latent; "lowres-noised": the same with noise of a given level.
Concat = Literal["inpaint", "inpaint-ldm", "depth", "image", "lowres", "lowres-noised"]
MAX_TIMESTEPS, MAX_SIDE = 2**16, 2**14  # of a card: timesteps of training; pixels of an image's side


@dataclass(frozen=True, kw_only=True)
class ScheduleCard:
    """A noise schedule by name and parameters.

    Args:
        kind: Name of a constructor of `NoiseSchedule`, or "edm" for an `EDMSchedule`.
        timesteps: Number of training timesteps T. Default: 1000.
        beta_start: First beta; None for schedules without betas.
        beta_end: Last beta; None for schedules without betas.
        zero_terminal_snr: Rescale the schedule to a signal-to-noise ratio of zero at the last timestep.
        sigmas: For "edm", the smallest and the largest noise level, and the standard deviation of the data.

    Raises:
        ValueError: If there are sigmas without "edm", or "edm" without them, or `timesteps` is out of range.
    """

    kind: Literal["linear", "scaled_linear", "cosine", "edm"]
    timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False
    sigmas: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        check_between(1, MAX_TIMESTEPS, timesteps=self.timesteps)
        if (self.kind == "edm") != (self.sigmas is not None):
            raise ValueError(f"sigmas: schedule 'edm' and sigmas require each other, got {self.kind!r}")

    @classmethod
    def scaled_linear(cls, start: float, end: float) -> ScheduleCard:
        """Return the schedule of Stable Diffusion's family: square roots of beta in 1000 equal steps."""
        return cls(kind="scaled_linear", beta_start=start, beta_end=end)

    def make(self) -> NoiseSchedule:
        """Build the schedule."""
        if self.sigmas is not None:
            low, high, data = self.sigmas
            return EDMSchedule.between(low, high, sigma_data=data, T=self.timesteps)
        assert self.kind != "edm"
        schedule = NoiseSchedule.make(
            self.kind, self.timesteps, beta_start=self.beta_start, beta_end=self.beta_end
        )
        return schedule.zero_terminal_snr() if self.zero_terminal_snr else schedule


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Values of the options that a call leaves out.

    Args:
        sampler: Name of the sampling method.
        steps: Number of sampling steps.
        guidance: Scale of classifier-free guidance; 1 is without guidance.
        height: Height of the images, in pixels.
        width: Width of the images, in pixels.
    """

    sampler: str
    steps: int
    guidance: float
    height: int
    width: int

    def __post_init__(self) -> None:
        check_between(1, MAX_TIMESTEPS, steps=self.steps)
        check_between(1, MAX_SIDE, height=self.height, width=self.width)

    @classmethod
    def square(cls, sampler: str, steps: int, guidance: float, side: int) -> Defaults:
        """Return defaults for images of ``side`` × ``side`` pixels; see the class for the other arguments."""
        return cls(sampler=sampler, steps=steps, guidance=guidance, height=side, width=side)


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Location of published weights on the Hugging Face hub.

    Args:
        repo: Repository, "owner/name".
        file: A single file in the repository; None for `files`, or else the whole repository in diffusers
            layout.
        files: The files of a model in another layout, all of which are needed. Default: none.
        sha256: SHA-256 of the file, in hexadecimal.
        stated: Whether the publisher states ``sha256``. If so, a file with another hash is refused;
            otherwise it only causes a warning.
    """

    repo: str
    file: str | None = None
    files: tuple[str, ...] = ()
    sha256: str | None = None
    stated: bool = False


class SampledCard:
    """Base of the cards that state how one network is sampled."""

    def trained_with(self) -> dict[str, object]:
        """Return the facts of the training that a part's YAML states under ``diffusion``."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Card:
    """Base of all cards: the identity of a model.

    Args:
        name: Name of the model, unique among all cards.
        family: Family of published files whose layouts the weights have (see `ldm.catalog.families`), or
            "latent" or "unclip" for models in the ldm layout only.
        summary: One-line description.
        licence: Licence of the weights.
        hub: Where the weights are published; None if nowhere.
        files: SHA-256 of the files of the model's parts in ldm layout, by name; None if not stated. Cards
            that differ in it alone are equal.
        parts: Folders of parts that are stored elsewhere, such as in another embedded model, relative to the
            folder of the card.
    """

    kind: ClassVar[Kind]
    name: str
    family: str
    summary: str
    licence: str
    hub: Hub | None = None
    files: Mapping[str, str] | None = field(default=None, compare=False)
    parts: Mapping[str, str] = field(default_factory=dict)

    def shapes(self) -> dict[str, object]:
        """Return the network configurations by part; empty if the card leaves them to each part's YAML."""
        raise NotImplementedError

    def main_stage(self) -> DiffusionCard:
        """Return the card of the diffusion that makes the model's output.

        Raises:
            ValueError: If the model is not a diffusion model.
        """
        raise NotImplementedError

    def usual(self) -> Defaults:
        """Return the values of the options that a call leaves out."""
        return self.main_stage().defaults

    def file_parts(self) -> dict[str, str]:
        """Map the names of parts in the authors' single file to the names of this card's parts."""
        return {part: part for part in self.shapes()}

    def stages(self) -> Mapping[str, SampledCard]:
        """Return how each part that is sampled is sampled, by part."""
        return {}

    def part_names(self) -> tuple[str, ...]:
        """Return the names of all parts that such a model may have in ldm layout."""
        return tuple(self.shapes())

    def part_folders(self, folder: Path) -> dict[str, Path]:
        """Return the folder of each part of the model whose card is in ``folder``, in the ldm layout."""
        return self.located(folder, self.shapes())

    def located(self, folder: Path, parts: Iterable[str]) -> dict[str, Path]:
        """Return the folder of each of ``parts``: ``folder``, or the one that the card states."""
        return {part: folder / self.parts.get(part, "") for part in parts}

    def inherited(self) -> dict[str, Any]:
        """Return the fields that a card with ``base: NAME`` inherits: all but those that locate weights."""
        return {**vars(self), "hub": None, "files": None, "parts": {}}

    def settings(self) -> dict[str, Any]:
        """Return the fields that images depend on: all but names, texts, networks, and where weights are."""
        left_out = ("name", "family", "summary", "licence", "hub", "files", "folder", "parts", "networks")
        return {name: value for name, value in vars(self).items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class DiffusionCard(SampledCard):
    """How one diffusion is sampled: its schedule, prediction, grids and defaults.

    Args:
        schedule: Noise schedule that the network was trained with.
        prediction: What the network predicts: "eps", "x0" or "v".
        convention: Grids by sampler: the name of a convention in `ldm.samplers.conventions`, or a
            `Convention`. Default: "diffusers".
        defaults: Options of a call that leaves them out.
    """

    schedule: ScheduleCard
    prediction: Prediction
    convention: str | Convention = "diffusers"
    defaults: Defaults

    def __post_init__(self) -> None:
        get_sampler(self.defaults.sampler)
        self.grids()

    def grids(self) -> Convention:
        """Return the convention, which gives the grid of every sampler."""
        return get_convention(self.convention) if isinstance(self.convention, str) else self.convention

    def trained_with(self) -> dict[str, object]:
        """Return the facts of the training that a part's YAML states under ``diffusion``."""
        its = self.schedule
        facts = {"schedule": its.kind, "timesteps": its.timesteps, "prediction": self.prediction}
        return {**facts, "zero_terminal_snr": its.zero_terminal_snr}

    def make_denoiser(self, net: nn.Module) -> Denoiser:
        """Return the denoiser of a network that was trained as this card states."""
        return Denoiser(net, self.schedule.make(), self.prediction, quantize=self.grids().quantize)

    def constrain(self, denoise: DenoiseFn, schedule: NoiseSchedule) -> DenoiseFn:
        """Return ``denoise`` with the card's constraints on x0; without any, ``denoise`` itself."""
        return denoise


OPTIONAL_PARTS = ("draft", "layout")  # parts that a model without stated networks may have


@dataclass(frozen=True, kw_only=True)
class ModelCard(DiffusionCard, Card):
    """A latent diffusion model.

    Args:
        latent_scale: Factor between the autoencoder's latents and those that are diffused; None if the
            weights state it.
        latent_mean: Mean of each channel of the autoencoder's latents, which is subtracted; none by default.
        latent_std: Standard deviation of each channel, which is divided out; none by default.
        networks: The networks; None if each part's YAML states its configuration.
        text: How the first text tower is read.
        text2: How the second text tower is read; None if there is none.
        vector: What is concatenated to the pooled text embedding in `Cond.pooled`: "sizes" (original size,
            crop, target size), "aesthetic" (original size, crop, score), or None.
        zero_negative: Whether an empty negative prompt is encoded as zeros instead of as the empty text.
        null_class: The class that stands for no class in guidance; None if there is none.
        concat: What is concatenated to x_t in the channel axis; None for nothing.
        folder: Folder of the weights below the package's assets, for embedded models; otherwise None.
    """

    kind: ClassVar[Kind] = "latent"
    latent_scale: float | None = None
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    networks: Networks | None = None
    text: TextConvention = field(default_factory=TextConvention)
    text2: TextConvention | None = None
    vector: Literal["sizes", "aesthetic"] | None = None
    zero_negative: bool = False
    null_class: int | None = None
    concat: Concat | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_family(self.family)
        check_above_zero(latent_scale=self.latent_scale)
        if self.family != "latent" and self.networks is None:
            raise ValueError(f"networks: a card of the family {self.family!r} must state its networks")

    def shapes(self) -> dict[str, object]:
        """Return the network configurations by part; empty if the card leaves them to each part's YAML."""
        return {} if self.networks is None else dict(self.networks.configs())

    def main_stage(self) -> DiffusionCard:
        """Return this card."""
        return self

    def stages(self) -> Mapping[str, SampledCard]:
        """Return this card, as that of the part "unet"."""
        return {"unet": self}

    def part_names(self) -> tuple[str, ...]:
        """Return the names of all parts that such a model may have in ldm layout."""
        return tuple(self.shapes()) or ("unet", "vae", "text", *OPTIONAL_PARTS)

    def part_folders(self, folder: Path) -> dict[str, Path]:
        """Return the folder of each part; optional parts are those whose YAML is there."""
        if self.networks is not None:
            return super().part_folders(folder)
        found = self.located(folder, ("unet", "vae", "text", *OPTIONAL_PARTS))
        absent = [part for part in OPTIONAL_PARTS if not (found[part] / f"{part}.yaml").is_file()]
        return {part: place for part, place in found.items() if part not in absent}

    def inherited(self) -> dict[str, Any]:
        """Return the fields that a card with ``base: NAME`` inherits."""
        return {**super().inherited(), "folder": None}


def check_family(name: str) -> None:
    """Raise ValueError if a family is unknown, or known but not supported."""
    if name == "latent":
        return
    if name not in FAMILIES:
        raise ValueError(f"family: {name!r}; {nearest(name, ('latent', *FAMILIES))}")
    family = FAMILIES[name]
    if "unet" not in family.parts or family.refusal:
        raise ValueError(
            f"family: {name!r} ({family.title}) is known but not supported by the latent diffusion pipeline"
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderCard(Card):
    """An autoencoder without a diffusion model: a first stage, or a tiny one for previews."""

    kind: ClassVar[Kind] = "autoencoder"
    vae: str | Autoencoder

    def config(self) -> Autoencoder:
        """Return the autoencoder's configuration."""
        return shape("vae", self.vae, VAES)

    def shapes(self) -> dict[str, object]:
        """Return the configuration as the part "vae"."""
        return {"vae": self.config()}

    def main_stage(self) -> DiffusionCard:
        """Raise ValueError: an autoencoder is not sampled."""
        raise ValueError(f"{self.name!r} is an autoencoder alone: it has no sampler and no schedule")
