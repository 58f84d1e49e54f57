"""Model cards: what a model is made of and how it wants to be used, so that a swapped sampler never inherits
a wrong setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ldm.catalog.families import FAMILIES
from ldm.catalog.shapes import CONDITIONERS, TEXTS, UNETS, VAES
from ldm.conditioning.conditioner import TextConvention
from ldm.diffusion.interfaces import Prediction
from ldm.diffusion.schedule import NoiseSchedule, ScheduleName
from ldm.models.clip.towers import TextConfig
from ldm.models.labels import LabelConfig
from ldm.models.text.bert import BertConfig
from ldm.models.tiny import TinyConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.models.vq import VQConfig
from ldm.samplers import get_sampler
from ldm.samplers.conventions import Convention, get_convention
from ldm.support.config import nearest

if TYPE_CHECKING:
    pass

Autoencoder = VAEConfig | VQConfig | TinyConfig
Conditioning = TextConfig | BertConfig | LabelConfig
_C = TypeVar("C")
# What stands in `Cond.concat`: "inpaint" mask and masked latent, "inpaint-ldm" masked latent and mask in [−1,
# 1]; "depth"; "image" the unscaled latent of the picture to change; "lowres" the picture to enlarge, at the
# latent's size, "lowres-noised" the same with noise of a level.
Concat = Literal["inpaint", "inpaint-ldm", "depth", "image", "lowres", "lowres-noised"]


@dataclass(frozen=True, kw_only=True)
class ScheduleCard:
    """A noise schedule by its name and numbers; betas where the kind has them."""

    kind: ScheduleName
    timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False

    def make(self) -> NoiseSchedule:
        """The schedule's tables."""
        schedule = NoiseSchedule.make(
            self.kind, self.timesteps, beta_start=self.beta_start, beta_end=self.beta_end
        )
        return schedule.zero_terminal_snr() if self.zero_terminal_snr else schedule


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a call does where its caller says nothing."""

    sampler: str
    steps: int
    guidance: float
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a model, each by the name of a published shape (`ldm.catalog.shapes`) or by its own
    numbers.

    ``text``: the first text tower, BERT or table of classes; ``text2``: SDXL's second tower, which gives the
    pooled text; None where there is none.
    """

    unet: str | UNetConfig
    vae: str | VAEConfig | VQConfig | TinyConfig
    text: str | TextConfig | BertConfig | LabelConfig | None = None
    text2: str | TextConfig | None = None

    def __post_init__(self) -> None:
        self.configs()

    def configs(self) -> dict[str, UNetConfig | Autoencoder | Conditioning]:
        """The shapes by part: "unet", "vae", and "text", "text2" or "class"; ValueError for an unknown
        name."""
        found: dict[str, Any] = {"unet": shape("unet", self.unet, UNETS), "vae": shape("vae", self.vae, VAES)}
        if self.text is not None:
            config = shape("text", self.text, CONDITIONERS)
            found["class" if isinstance(config, LabelConfig) else "text"] = config
        if self.text2 is not None:
            found["text2"] = shape("text2", self.text2, TEXTS)
        return found


def shape(part: str, value: str | _C, table: Mapping[str, _C]) -> _C:
    """A network's numbers, from the table if a name stands for them; ValueError with the nearest name
    otherwise."""
    if not isinstance(value, str):
        return value
    if value not in table:
        raise ValueError(f"{part}: unknown shape {value!r}; {nearest(value, table)}")
    return table[value]


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Where the weights are published: a repository, and a single ``file`` in it, or None for its folder in
    the layout of diffusers.

    ``sha256``: the file's; ``stated``: by its publisher, so that another file is refused; else it is only
    warned of.
    """

    repo: str
    file: str | None = None
    sha256: str | None = None
    stated: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model: its name, what stands for it in words, and every convention that sampling needs.

    ``family``: "latent" for models of one's own; else the published family whose files and layouts it has.
    ``latent_scale``: None where the weights state it. ``networks``: None where each part's YAML states its
    shape. ``folder``: where the weights of an embedded model lie, below the package's assets; None for
    weights that a user brings. ``text``, ``text2``: how the towers are read. ``vector``: what joins the
    pooled text in `Cond.pooled`: "sizes" (original, crop, target) or "aesthetic" (original, crop, score).
    ``zero_negative``: an empty negative prompt is zeros in place of the encoded empty text. ``null_class``:
    the class that stands for none. ``concat``: what is joined to x_t. ``convention``: a program's name (see
    `ldm.samplers.conventions`), or grids by sampler.
    """

    name: str
    family: str
    summary: str
    licence: str
    schedule: ScheduleCard
    prediction: Prediction
    latent_scale: float | None = None
    networks: Networks | None = None
    text: TextConvention = field(default_factory=TextConvention)
    text2: TextConvention | None = None
    vector: Literal["sizes", "aesthetic"] | None = None
    zero_negative: bool = False
    null_class: int | None = None
    concat: Concat | None = None
    convention: str | Convention = "diffusers"
    defaults: Defaults
    hub: Hub | None = None
    folder: str | None = None

    def __post_init__(self) -> None:
        get_sampler(self.defaults.sampler)
        self.grids()
        check_family(self.family)
        if self.family != "latent" and self.networks is None:
            raise ValueError(f"a card of the family {self.family!r} must state its networks")

    def grids(self) -> Convention:
        """The grid of every sampler."""
        return get_convention(self.convention) if isinstance(self.convention, str) else self.convention


def check_family(name: str) -> None:
    """ValueError for a family that is unknown, or known but not supported."""
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
class AutoencoderCard:
    """An autoencoder alone: a first stage, or a tiny one for previews."""

    name: str
    family: str
    summary: str
    licence: str
    vae: str | VAEConfig | VQConfig | TinyConfig
    hub: Hub | None = None

    def config(self) -> Autoencoder:
        """Its shape."""
        return shape("vae", self.vae, VAES)
