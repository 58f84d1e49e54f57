"""CLIP image embeddings together with the CLIP they belong to.

The embeddings of two CLIPs have nothing in common, even where they have the same width. An `ImageEmbedding`
carries the name of its CLIP, so that a network rejects embeddings that it cannot read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Length = Literal["clip", "unit"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageEmbedding:
    """CLIP image embeddings.

    Args:
        vector: The embeddings, shape (B, E), floating point.
        clip: Name of the CLIP in whose space they lie, whether it or a prior computed them.
        length: "clip" for the length that CLIP gives them, "unit" for L2 norm 1. Default: "clip".

    Raises:
        ValueError: If the shape or the length is wrong, or the vectors hold NaN or infinity.
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
        """Return B, the number of embeddings."""
        return len(self.vector)

    def __getitem__(self, index: slice | list[int] | Tensor) -> ImageEmbedding:
        """Return some of the embeddings."""
        return replace(self, vector=self.vector[index])

    def unit(self) -> ImageEmbedding:
        """Return the embeddings scaled to L2 norm 1."""
        return replace(self, vector=F.normalize(self.vector, dim=-1), length="unit")

    def of(self, clip: str, width: int, length: Length = "clip", *, by: str = "this network") -> Tensor:
        """Return the vectors for a network that reads embeddings of a given CLIP, width and length.

        Args:
            clip: Name of the CLIP that the network expects.
            width: E, the width that it expects.
            length: The length that it expects; "clip" is normalised to "unit" where that is expected.
                Default: "clip".
            by: Name of the network, for error messages.

        Returns:
            The vectors, shape (B, E).

        Raises:
            ValueError: For embeddings of another CLIP, of another width, or of unit length where CLIP's own
                length is expected.
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
    """Return the spherical interpolation from a to b, with the norm interpolated linearly (Shoemake 1985).

    With u, v the directions of a and b and θ the angle between them:

        (sin((1 − w)·θ)·u + sin(w·θ)·v)/sin θ · ((1 − w)·|a| + w·|b|)

    Directions that are nearly equal or nearly opposite are interpolated linearly.

    Args:
        a: Shape (B, *S).
        b: Shape (B, *S).
        weight: w, a number or shape (B,): 0 is a, 1 is b.
    """
    shape, a, b = a.shape, a.flatten(1), b.flatten(1)
    w = torch.as_tensor(weight, dtype=a.dtype, device=a.device).reshape(-1, 1)
    norm_a, norm_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)  # (B, 1)
    u, v = a / norm_a.clamp_min(1e-12), b / norm_b.clamp_min(1e-12)
    angle = (u * v).sum(1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    arc = (((1 - w) * angle).sin() * u + (w * angle).sin() * v) / sine.clamp_min(1e-12)
    result = torch.where(sine > 1e-4, arc * ((1 - w) * norm_a + w * norm_b), (1 - w) * a + w * b)
    return result.reshape(len(result), *shape[1:])
