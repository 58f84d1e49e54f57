"""CLIP's image embeddings, with where they come from: those of two CLIPs have nothing in common but perhaps
their width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Length = Literal["clip", "unit"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageEmbedding:
    """Image embeddings (B, E), float32.

    ``clip``: the name of the CLIP whose space they lie in, whether it made them or a prior did. ``length``:
    "clip", as long as CLIP makes them, or "unit", of length 1, from which the first cannot be had back.
    """

    vector: Tensor
    clip: str
    length: Length = "clip"

    def __post_init__(self) -> None:
        if self.vector.ndim != 2 or not self.vector.is_floating_point():
            raise ValueError(
                f"vector: expected floating-point (B, E), got {self.vector.dtype} {tuple(self.vector.shape)}"
            )
        if self.length not in ("clip", "unit"):
            raise ValueError(f'length: expected "clip" or "unit", got {self.length!r}')
        if not bool(torch.isfinite(self.vector).all()):
            raise ValueError("an embedding holds NaN or infinity")

    def __len__(self) -> int:
        """B, the number of embeddings."""
        return len(self.vector)

    def __getitem__(self, index: slice | list[int] | Tensor) -> ImageEmbedding:
        """Some of them."""
        return replace(self, vector=self.vector[index])

    def unit(self) -> ImageEmbedding:
        """The same at length 1."""
        return replace(self, vector=F.normalize(self.vector, dim=-1), length="unit")

    def of(self, clip: str, width: int, length: Length = "clip", *, by: str = "this network") -> Tensor:
        """The vectors (B, E) for a network that reads embeddings of a CLIP, a width and a length; "clip" is
        shortened to "unit" where that is read.

        ValueError for those of another CLIP, of another width, or of length 1 where CLIP's own is read.
        """
        if self.clip != clip:
            raise ValueError(
                f"{by} reads embeddings of {clip!r}, got those of {self.clip!r}: two CLIPs share no space"
            )
        if self.vector.shape[1] != width:
            raise ValueError(f"{by} reads embeddings {width} wide, got {self.vector.shape[1]}")
        if length == "unit":
            return self.unit().vector
        if self.length != length:
            raise ValueError(f"{by} reads embeddings as long as {clip!r} makes them, got ones of length 1")
        return self.vector


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """From a to b (B, *S) on the arc between their directions, their lengths in proportion; weight () or
    (B,): 0 is a, 1 is b (Shoemake 1985).

    Directions that are nearly the same, or nearly opposite (where the arc is not defined), are joined by a
    straight line.
    """
    shape, a, b = a.shape, a.flatten(1), b.flatten(1)
    w = torch.as_tensor(weight, dtype=a.dtype, device=a.device).reshape(-1, 1)
    long_a, long_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    u, v = a / long_a.clamp_min(1e-12), b / long_b.clamp_min(1e-12)
    angle = (u * v).sum(1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    arc = (((1 - w) * angle).sin() * u + (w * angle).sin() * v) / sine.clamp_min(1e-12)
    made = torch.where(sine > 1e-4, arc * ((1 - w) * long_a + w * long_b), (1 - w) * a + w * b)
    return made.reshape(len(made), *shape[1:])
