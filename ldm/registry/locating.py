"""Find the card and the weights that a call of `load` asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.catalog.cards import Card
from ldm.catalog.lookup import find_card, read_card
from ldm.diffusion.interfaces import Prediction
from ldm.support.text import shown
from ldm.weights.formats.hub import download, local_path

DEFAULT_MODEL = "emoji-ldm"
RANDOM = "random"  # the value of `weights` that asks for random weights


@dataclass(frozen=True, kw_only=True)
class WeightsRequest:
    """Which weights to load, and how; the fields are arguments of `ldm.load`.

    Args:
        weights: Path of a file or folder, "random", or None for the usual place.
        embedded: Folder of the model's embedded weights; None if it has none.
        dtype: Floating-point type of the networks.
        ema: Whether to take averaged weights; None takes them if present.
        variant: Variant of the files in a diffusers folder, such as "fp16".
        prediction: Overrides the card's prediction; None for the card's.
        vocabulary: BERT's vocab.txt.
        download: Whether weights that are not on this machine are downloaded. Default: True.
    """

    weights: str | Path | None
    dtype: torch.dtype
    embedded: Path | None = None
    ema: bool | None = None
    variant: str | None = None
    prediction: Prediction | None = None
    vocabulary: str | Path | None = None
    download: bool = True

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Name the weights in errors of networks that do not fit together.

        Raises:
            ValueError: What is raised in the context, after the path of the weights.
        """
        try:
            yield
        except ValueError as error:
            if self.weights is None:
                raise
            raise ValueError(f"weights {shown(str(self.weights))}: {error}") from error

    @property
    def random(self) -> bool:
        """Whether random weights are asked for."""
        return self.weights == RANDOM

    @property
    def folder_variant(self) -> str | None:
        """The variant of a diffusers folder's files: "non_ema" if averaged weights are refused."""
        return "non_ema" if self.ema is False and self.variant is None else self.variant

    def stated(self) -> dict[str, Any]:
        """Return the options, without paths, that decide the weights and their use, as far as given."""
        options = {"ema": self.ema, "variant": self.variant, "prediction": self.prediction}
        return {name: value for name, value in options.items() if value is not None}

    def path(self, card: Card) -> Path:
        """Return where the weights are: the given path, the embedded ones, LDM_HOME, or the hub's cache.

        Raises:
            FileNotFoundError: If they are nowhere and cannot be downloaded.
        """
        if self.weights is not None:
            return Path(self.weights)
        return self.embedded or local_path(card.name) or hub_weights(card, allowed=self.download)


def resolve_card(name: str | None, weights: str | Path | None) -> tuple[Card, Path | None]:
    """Return the card called ``name`` and the folder of its embedded weights, or None.

    If ``weights`` is a folder with a card.yaml, that card is returned.

    Raises:
        ValueError: If the name is unknown, or the card in the folder has another name.
    """
    path = None if weights is None or weights == RANDOM else Path(weights) / "card.yaml"
    if path is None or not path.is_file():
        return find_card(DEFAULT_MODEL if name is None else name)
    given = read_card(path)
    if name is not None and name != given.name:
        find_card(name)
        raise ValueError(f"weights {str(weights)!r} are those of {given.name!r}, not of {name!r}")
    return given, None


def hub_weights(card: Card, *, allowed: bool) -> Path:
    """Return the path of a card's weights in the hub's cache.

    Args:
        card: The card.
        allowed: Whether they are downloaded if necessary.

    Raises:
        FileNotFoundError: If the card names no place in the hub, the hub cannot be reached, or nothing is
            downloaded.
    """
    if card.hub is None:
        raise FileNotFoundError(
            f"the weights of {card.name!r} are not on this machine, and its card names no place in the hub:"
            " pass weights=PATH"
        )
    hub = card.hub
    return download(
        card.name,
        hub.repo,
        hub.file,
        files=hub.files,
        sha256=hub.sha256,
        stated=hub.stated,
        allowed=allowed,
    )
