"""Cards of models that draw image tokens: DALL·E Mini and Mega; and of DALL·E's autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from ldm.catalog.cards import Card, Defaults, DiffusionCard, Hub, Kind
from ldm.catalog.networks import shape
from ldm.catalog.shapes import VAES
from ldm.models.dalle.decoder import DalleDecoderConfig
from ldm.models.dalle.dvae import DVAEConfig
from ldm.models.dalle.encoder import DalleEncoderConfig
from ldm.models.text.cleaning import CLEANINGS
from ldm.models.vq import VQConfig
from ldm.support.config import check_between, nearest
from ldm.support.scalars import check_within

# "tokens" is the family of models in the ldm layout only.
TokenFamily = Literal["dalle-mini", "tokens"]
TOKEN_FAMILIES: tuple[str, ...] = get_args(TokenFamily)
MIN_DALLE_FILES = (("encoder", "pt"), ("decoder", "pt"), ("vocab", "json"), ("merges", "txt"))
TOKEN_PARTS = ("encoder", "decoder", "vae")
EXEMPLAR_PARTS = ("text", "layout")  # of models with exemplars, which have no tokenizer of bytes
MAX_TOP_K = 2**22
MAX_TEMPERATURE = 1e6

TOKEN_ENCODERS = {
    "dalle-mini": DalleEncoderConfig(),
    "dalle-mega": DalleEncoderConfig(vocabulary=50272, width=2048, layers=24, heads=32, inner=4096),
}
TOKEN_DECODERS = {
    "dalle-mini": DalleDecoderConfig(),
    "dalle-mega": DalleDecoderConfig(vocabulary=16415, width=2048, layers=24, heads=32, inner=4096),
}


@dataclass(frozen=True, kw_only=True)
class TokenDefaults:
    """Values of the options that a call leaves out.

    Args:
        guidance: Factor of super-conditioning; 1 is without guidance. Default: 16.
        temperature: Divisor of the logits; 0 takes the most probable token. Default: 1.
        top_k: Number of the most probable tokens that are drawn from. Default: 256.
        top_p: Probability that the tokens drawn from have together, in (0, 1]. Default: 1.

    Raises:
        ValueError: If a number is out of range.
    """

    guidance: float = 16.0
    temperature: float = 1.0
    top_k: int = 256
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_within("guidance", self.guidance, -1000, 1000)
        check_within("temperature", self.temperature, 0, MAX_TEMPERATURE)
        check_between(1, MAX_TOP_K, top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and at most 1, got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class DalleNetworks:
    """The networks of a model, each the name of a published shape or a configuration.

    Args:
        encoder: The text encoder.
        decoder: The decoder of image tokens.
        vae: The vector-quantized autoencoder, or its decoder alone.
    """

    encoder: str | DalleEncoderConfig
    decoder: str | DalleDecoderConfig
    vae: str | VQConfig = "vqgan-imagenet-f16-16384"

    def __post_init__(self) -> None:
        self.configs()

    def configs(self) -> dict[str, Any]:
        """Return the configurations by part.

        Raises:
            ValueError: If a name is not a published shape.
        """
        return {
            "encoder": shape("encoder", self.encoder, TOKEN_ENCODERS),
            "decoder": shape("decoder", self.decoder, TOKEN_DECODERS),
            "vae": shape(
                "vae", self.vae, {name: each for name, each in VAES.items() if isinstance(each, VQConfig)}
            ),
        }


@dataclass(frozen=True, kw_only=True)
class DalleCard(Card):
    """A model that writes the tokens of an image after those of a text.

    Args:
        family: "dalle-mini", or "tokens" for models in the ldm layout only.
        sampling: Options of a call that leaves them out.
        start: The token before the first one of an image. Default: 16384.
        cleaning: How texts are cleaned; see `ldm.models.text.cleaning`. Default: "min-dalle".
        signed: Whether the autoencoder's images are in [−1, 1]; otherwise they are in [0, 1]. Default: False.
        side: Side of an image in pixels. Default: 256.
        pictures: Number of images of one prompt. Default: 4.
        networks: The networks; None if each part's YAML states its configuration.
    """

    kind: ClassVar[Kind] = "tokens"
    family: TokenFamily = "dalle-mini"
    sampling: TokenDefaults = field(default_factory=TokenDefaults)
    start: int = 16384
    cleaning: str = "min-dalle"
    signed: bool = False
    side: int = 256
    pictures: int = 4
    networks: DalleNetworks | None = None

    def __post_init__(self) -> None:
        check_between(0, MAX_TOP_K, start=self.start)
        check_between(1, 1000, pictures=self.pictures)
        check_between(1, 2**14, side=self.side)
        if self.cleaning not in CLEANINGS:
            raise ValueError(f"cleaning: {self.cleaning!r}; {nearest(self.cleaning, CLEANINGS)}")
        if self.family != "tokens" and self.networks is None:
            raise ValueError(f"networks: a card of the family {self.family!r} must state its networks")

    def shapes(self) -> dict[str, object]:
        """Return the network configurations by part; empty if the card leaves them to each part's YAML."""
        return {} if self.networks is None else self.networks.configs()

    def main_stage(self) -> DiffusionCard:
        """Raise ValueError: tokens are drawn one after the other, without a schedule."""
        raise ValueError(f"{self.name!r} draws tokens one after the other: it has no sampler and no schedule")

    def usual(self) -> Defaults:
        """Return the size of images, and as steps the number of rows of tokens."""
        return Defaults.square("tokens", 16, self.sampling.guidance, self.side)

    def part_names(self) -> tuple[str, ...]:
        """Return the names of all parts that such a model may have in ldm layout."""
        return TOKEN_PARTS if self.networks is not None else (*EXEMPLAR_PARTS, *TOKEN_PARTS)

    def part_folders(self, folder: Path) -> dict[str, Path]:
        """Return the folder of each part of the model whose card is in ``folder``.

        Those of exemplars are parts if the YAML of one of them is there.
        """
        found = self.located(folder, self.part_names())
        shows = any((found[part] / f"{part}.yaml").is_file() for part in EXEMPLAR_PARTS if part in found)
        return {part: place for part, place in found.items() if shows or part not in EXEMPLAR_PARTS}


@dataclass(frozen=True, kw_only=True)
class DVAECard(Card):
    """DALL·E's discrete autoencoder, without a model of its tokens."""

    kind: ClassVar[Kind] = "dvae"
    vae: DVAEConfig = field(default_factory=DVAEConfig)

    def shapes(self) -> dict[str, object]:
        """Return the configuration as the part "vae"."""
        return {"vae": self.vae}

    def main_stage(self) -> DiffusionCard:
        """Raise ValueError: an autoencoder is not sampled."""
        raise ValueError(f"{self.name!r} is an autoencoder alone: it has no sampler and no schedule")


def dalle(name: str, summary: str, suffix: str) -> DalleCard:
    """Return the card of a published model, whose shapes have its name.

    The files are min-dalle's, whose names have a suffix: dalle-mini's own repositories hold no autoencoder.
    """
    sized = [f"{stem}{suffix}.{end}" for stem, end in MIN_DALLE_FILES]
    return DalleCard(
        name=name,
        summary=summary,
        licence="Apache-2.0",
        hub=Hub(repo="kuprel/min-dalle", files=(*sized, "detoker.pt")),
        networks=DalleNetworks(encoder=name, decoder=name),
    )


DALLE_CARDS: Mapping[str, DalleCard | DVAECard] = {
    card.name: card
    for card in (
        dalle("dalle-mini", "DALL·E Mini, text to 256×256 by 256 tokens", "_mini"),
        dalle("dalle-mega", "DALL·E Mega, text to 256×256 by 256 tokens", ""),
        DVAECard(
            name="dalle-dvae",
            family="dalle-dvae",
            summary="DALL·E's discrete autoencoder: downsampling by 8, an autoencoder alone",
            licence="MIT",
        ),
    )
}
