"""Orthogonal fine-tuning: rotations of blocks of outputs (Qiu et al. 2023, Liu et al. 2024, LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.weights.adapters.kinds.delta import Delta, wide
from ldm.weights.keymap import Shape


def rotations(blocks: Tensor, limit: float) -> Tensor:
    """Return R = (I + Q)(I − Q)⁻¹ of blocks B, with Q = B − Bᵀ (Cayley).

    Args:
        blocks: B, shape (..., b, b), in float32.
        limit: Largest norm of all Q together, to which a larger one is scaled; 0 for none.
    """
    q = blocks - blocks.transpose(-1, -2)  # (..., b, b)
    if limit > 0:
        norm = q.norm() + 1e-8
        q = torch.where(norm > limit, q * (limit / norm), q)  # (..., b, b)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return (identity + q) @ torch.linalg.inv(identity - q)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation(Delta):
    """W′(s): rows in n blocks of b, each multiplied by its own (s·R + (1−s)·I)ᵀ, then rescaled.

    Args:
        blocks: B, shape (n, b, b), with n·b = out.
        constraint: κ; the norm of Q is at most κ·out. 0 for none.
        rescale: Factors of the rows, of which 1 + s·(rescale − 1) is used. None for none.
    """

    kind: ClassVar[str] = "OFT"
    blocks: Tensor
    constraint: float = 0.0
    rescale: Tensor | None = None

    @property
    def rank(self) -> int:
        """b, the size of a block."""
        return self.blocks.shape[-1]

    def turns(self, device: torch.device, outputs: int, strength: float) -> Tensor:
        """Return s·R + (1−s)·I for all blocks."""
        r = rotations(wide(self.blocks, device), self.constraint * outputs)
        return torch.eye(r.shape[-1], dtype=r.dtype, device=device).lerp(r, strength)

    def rescaled(self, weight: Tensor, strength: float) -> Tensor:
        """Return a weight with its rows rescaled."""
        if self.rescale is None:
            return weight
        factors = 1 + strength * (wide(self.rescale, weight.device).flatten() - 1)  # (out,)
        return weight * factors.view(-1, *[1] * (weight.ndim - 1))

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return W′(s)."""
        r = self.turns(weight.device, len(weight), strength)  # (n, b, b)
        rows = weight.reshape(r.shape[0], r.shape[1], -1)  # (n, b, in·k·k)
        return self.rescaled((r.transpose(1, 2) @ rows).view(weight.shape), strength)

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors as kohya and LyCORIS name them."""
        rescale = {} if self.rescale is None else {"rescale": self.rescale}
        return {
            "oft_blocks": self.blocks,
            "alpha": torch.tensor(self.constraint, dtype=torch.float32, device="cpu"),
            **rescale,
        }

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        count, size = self.blocks.shape[-3], self.blocks.shape[-1]
        wrong = self.blocks.shape[-2] != size or count * size != shape[0]
        if wrong or (self.rescale is not None and self.rescale.numel() != shape[0]):
            return f"its blocks are {tuple(self.blocks.shape)}, the model's weight is {shape}"
        return ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Butterfly(Rotation):
    """W′(s): m stages of rotations, each of rows that stage i has brought together, then rescaled.

    In stage i the rows are taken as (–, 2, k) with k = 2^i · b/2, the last two axes exchanged, and blocks of
    b multiplied by s·R_i + (1−s)·I; then the order is restored.

    Args:
        blocks: B, shape (m, n, b, b).
        constraint: See `Rotation`.
        rescale: See `Rotation`.
    """

    kind: ClassVar[str] = "BOFT"

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return W′(s)."""
        turns = self.turns(weight.device, len(weight), strength)  # (m, n, b, b)
        size = turns.shape[-1]
        rows = weight.reshape(len(weight), -1)  # (out, in·k·k)
        for i, turn in enumerate(turns):
            k = 2**i * size // 2
            order = torch.arange(len(rows), device=rows.device).view(-1, 2, k).transpose(1, 2).flatten()
            mixed = turn @ rows[order].view(-1, size, rows.shape[1])  # (n, b, in·k·k)
            rows = torch.empty_like(rows).index_copy_(0, order, mixed.view(rows.shape))
        return self.rescaled(rows.view(weight.shape), strength)

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        stages, size = self.blocks.shape[0], self.blocks.shape[-1]
        if stages and (size % 2 or shape[0] % (2**stages * size // 2)):
            return f"its {stages} stages of blocks of {size} do not fit the model's weight {shape}"
        return super().misfit(shape)
