"""Model cards: what a model is made of and how it wants to be used, so that a swapped sampler never inherits a wrong setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldm.config import build, nearest, read_yaml
from ldm.conventions import Convention, get_convention
from ldm.models.conditioner import TextConvention
from ldm.samplers import get_sampler
from ldm.schedule import NoiseSchedule
from ldm.types import Prediction

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True, kw_only=True)
class ScheduleCard:
    """A noise schedule by its name and numbers; betas where the kind has them."""

    kind: Literal["linear", "scaled_linear", "cosine"]
    timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = False

    def make(self) -> NoiseSchedule:
        """The schedule's tables."""
        betas = {} if self.beta_start is None else {"beta_start": self.beta_start, "beta_end": self.beta_end}
        schedule = getattr(NoiseSchedule, self.kind)(self.timesteps, **betas)
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
class ModelCard:
    """A model: its name, what stands for it in words, and every convention that sampling needs.

    ``folder``: where the weights of an embedded model lie, below the package's assets; None for weights that a user brings.
    ``convention``: a program's name (see `ldm.conventions`), or grids by sampler.
    """

    name: str
    family: Literal["latent"]
    summary: str
    licence: str
    schedule: ScheduleCard
    prediction: Prediction
    latent_scale: float | None = None
    text: TextConvention = field(default_factory=TextConvention)
    convention: str | Convention = "diffusers"
    defaults: Defaults
    folder: str | None = None

    def __post_init__(self) -> None:
        get_sampler(self.defaults.sampler)
        self.grids()

    def grids(self) -> Convention:
        """The grid of every sampler."""
        return get_convention(self.convention) if isinstance(self.convention, str) else self.convention


def read_card(path: str | Path) -> ModelCard:
    """The card in a YAML file; ValueError names what is wrong in it."""
    path = Path(path)
    mapping = dict(read_yaml(path))
    if isinstance(convention := mapping.get("convention"), Mapping):
        mapping["convention"] = Convention(**convention)
    try:
        return build(ModelCard, mapping)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None


def embedded() -> dict[str, Path]:
    """The models inside the package: name → folder."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/card.yaml"))}


def find_card(name: str) -> tuple[ModelCard, Path]:
    """The card of an embedded model and its folder; ValueError with the nearest name if there is none."""
    models = embedded()
    if name not in models:
        raise ValueError(f"unknown model {name!r}; {nearest(name, models)}")
    return read_card(models[name] / "card.yaml"), models[name]
