"""`LoadedControl`: a control of a pipeline, and what recipes state of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ldm.catalog.control_cards import ControlCard
from ldm.models.clip.towers import VisionTower
from ldm.models.control.controlled import ControlKind


@dataclass(frozen=True, kw_only=True)
class ControlEntry:
    """What a recipe states of a control.

    Args:
        name: Its name.
        file: Name of its file or folder.
        sha256: SHA-256 of it.
        card: Name of its card.
        vision: Name of the file or folder of CLIP's image tower, of an IP-Adapter.
        vision_sha256: SHA-256 of it.
    """

    name: str
    file: str
    sha256: str
    card: str = "image"
    vision: str | None = None
    vision_sha256: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedControl:
    """A control of a pipeline.

    Args:
        name: Its name.
        file: Name of its file or folder.
        digest: SHA-256 of it.
        what: Its kind, in words, such as "ControlNet".
        made_for: The family that it was made for, in words; "" if the file does not show it.
        card: The convention of its hints.
        network: The network.
        kind: What the network computes in a call.
        vision: CLIP's image tower, of an IP-Adapter, with the name of its file and the SHA-256 of it.
    """

    name: str
    file: str
    digest: str
    what: str
    made_for: str
    card: ControlCard
    network: nn.Module
    kind: ControlKind
    vision: tuple[VisionTower, str, str] | None = None

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks that it computes with."""
        return (self.network,) if self.vision is None else (self.network, self.vision[0])

    @property
    def parameters(self) -> int:
        """Number of its parameters."""
        return sum(p.numel() for p in self.network.parameters())

    def entry(self) -> ControlEntry:
        """Return what a recipe states of it."""
        _, vision, digest = self.vision or (None, None, None)
        return ControlEntry(
            name=self.name,
            file=self.file,
            sha256=self.digest,
            card=self.card.name,
            vision=vision,
            vision_sha256=digest,
        )

    def __str__(self) -> str:
        family = f" for {self.made_for}" if self.made_for else ""
        return f"{self.name}: {self.what}{family}, {self.parameters:,} parameters; {self.card}"
