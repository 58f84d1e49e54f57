"""The networks of a latent diffusion model, as a card states them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ldm.catalog.shapes import CONDITIONERS, TEXTS, UNETS, VAES
from ldm.models.clip.towers import TextConfig
from ldm.models.labels import LabelConfig
from ldm.models.text.bert import BertConfig
from ldm.models.tiny import TinyConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.models.vq import VQConfig
from ldm.support.config import nearest

Autoencoder = VAEConfig | VQConfig | TinyConfig
Conditioning = TextConfig | BertConfig | LabelConfig
_C = TypeVar("_C")


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a latent diffusion model, each the name of a published shape or a configuration.

    The names are those of `ldm.catalog.shapes`.

    Args:
        unet: The denoising network.
        vae: The autoencoder.
        text: The first text tower, BERT, or the table of classes; None if there is none.
        text2: SDXL's second text tower, which gives the pooled text embedding; None if there is none.
    """

    unet: str | UNetConfig
    vae: str | VAEConfig | VQConfig | TinyConfig
    text: str | TextConfig | BertConfig | LabelConfig | None = None
    text2: str | TextConfig | None = None

    def __post_init__(self) -> None:
        self.configs()

    def configs(self) -> dict[str, UNetConfig | Autoencoder | Conditioning]:
        """Return the configurations by part: "unet", "vae", and "text", "text2" or "class" if present.

        Raises:
            ValueError: If a name is not a published shape.
        """
        found: dict[str, UNetConfig | Autoencoder | Conditioning] = {
            "unet": shape("unet", self.unet, UNETS),
            "vae": shape("vae", self.vae, VAES),
        }
        if self.text is not None:
            config = shape("text", self.text, CONDITIONERS)
            found["class" if isinstance(config, LabelConfig) else "text"] = config
        if self.text2 is not None:
            found["text2"] = shape("text2", self.text2, TEXTS)
        return found


def shape(part: str, value: str | _C, table: Mapping[str, _C]) -> _C:
    """Return the configuration called ``value`` in ``table``, or ``value`` itself if it is not a name.

    Raises:
        ValueError: If the table has no such name; the message offers the nearest one and names ``part``.
    """
    if not isinstance(value, str):
        return value
    if value not in table:
        raise ValueError(f"{part}: unknown shape {value!r}; {nearest(value, table)}")
    return table[value]
