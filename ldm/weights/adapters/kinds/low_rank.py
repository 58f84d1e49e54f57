"""LoRA (Hu et al. 2021), for convolutions also in Tucker form (LoCon)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldm.weights.adapters.kinds.delta import Additive, factors_misfit, size_misfit, wide, with_alpha
from ldm.weights.keymap import Shape


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(Additive):
    """ΔW = c · U D, with U (out, r) and D (r, in·k·k).

    In Tucker form D[p, i, y, x] = Σ_q M[p, q, y, x] · D'[q, i].

    Args:
        up: U, shape (out, r) or (out, r, 1, 1).
        down: D, shape (r, in) or (r, in, k, k); D' of the Tucker form, shape (r, in, 1, 1).
        mid: M, shape (r, r, k, k); None without the Tucker form.
        scale: c.
    """

    kind: ClassVar[str] = "LoRA"
    up: Tensor
    down: Tensor
    mid: Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return U (out, r) and D (r, in, …) in float32."""
        up, down = wide(self.up, device).flatten(1), wide(self.down, device)  # (out, r), (r, in, …)
        if self.mid is not None:
            down = torch.einsum("pq...,qi->pi...", wide(self.mid, device), down.flatten(1))  # (r, in, k, k)
        return up, down

    def difference(self, shape: Shape, device: torch.device) -> Tensor:
        """Return ΔW in float32, of the shape of the weight."""
        up, down = self.factors(device)
        return (self.scale * up @ down.flatten(1)).reshape(shape)

    def apply(self, weight: Tensor, strength: float) -> Tensor:
        """Return W + s·ΔW; a contiguous W is overwritten."""
        if not weight.is_contiguous():
            return super().apply(weight, strength)
        up, down = self.factors(weight.device)
        weight.view(len(weight), -1).addmm_(up, down.flatten(1), alpha=strength * self.scale)
        return weight

    def leaves(self) -> dict[str, Tensor]:
        """Return the tensors as kohya and LyCORIS name them."""
        own = {"lora_up.weight": self.up, "lora_down.weight": self.down, "lora_mid.weight": self.mid}
        return with_alpha(self, own)

    def misfit(self, shape: Shape) -> str:
        """Return why the change does not fit a weight of a shape; "" if it fits."""
        if wrong := factors_misfit(lora_up=self.up, lora_down=self.down):
            return wrong
        rank, columns = self.down.shape[0], self.down[0].numel()
        if self.mid is not None:
            if self.mid.ndim < 3 or self.mid.shape[1] != rank or self.down[0, 0].numel() != 1:
                return f"the Tucker core {tuple(self.mid.shape)} does not fit the rank {rank}"
            rank, columns = self.mid.shape[0], self.down.shape[1] * self.mid[0, 0].numel()
        if self.up[0].numel() != rank:
            return f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} have different ranks"
        return size_misfit(self.up.shape[0], columns, shape)
