"""Low-rank matrices of differences: extraction, resizing and joining of LoRAs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.weights.adapters.kinds.low_rank import LowRank

SMALLEST = 1e-12  # singular values below this part of the largest are taken for zero


def extracted(difference: Tensor, rank: int, *, clamp: float = 1.0) -> LowRank:
    """Return the LoRA that is closest to a difference of weights (Eckart & Young 1936).

    ΔW = U S Vᵀ by the singular value decomposition; up = U S and down = Vᵀ of the largest `rank` values.

    Args:
        difference: ΔW, shape (out, in) or (out, in, k, k).
        rank: Largest rank of the result.
        clamp: Quantile of the entries of U S and Vᵀ together beyond which they are cut, in (0, 1]; kohya's
            extraction uses 0.99, which makes it less close. Default: 1, none is cut.
    """
    matrix = difference.float().flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, len(s))
    up, down = u[:, :rank] * s[:rank], v[:rank]
    if clamp < 1:
        entries = torch.cat([up.flatten(), down.flatten()])
        bound = float(entries.abs().kthvalue(max(1, round(clamp * entries.numel()))).values)
        up, down = up.clamp(-bound, bound), down.clamp(-bound, bound)
    return _lora(up, down, tuple(difference.shape))


def resized(lora: LowRank, rank: int | None = None, *, keep: float = 1.0) -> LowRank:
    """Return a LoRA of another rank that is closest to a given one.

    The decomposition is that of the small matrix between the orthogonal bases of up and down.

    Args:
        lora: The LoRA.
        rank: Largest rank of the result. None for the present one.
        keep: Part of the change's squared norm that is kept, in (0, 1]; the smallest rank that does so is
            chosen. Default: 1.
    """
    up, down = lora.factors(torch.device("cpu"))
    shape = (len(up), *down.shape[1:])
    q, r = torch.linalg.qr(up * lora.scale)  # (out, r), (r, r)
    p, t = torch.linalg.qr(down.flatten(1).t())  # (in·k·k, r), (r, r)
    u, s, v = torch.linalg.svd(r @ t.t())
    energy = s.square().cumsum(0) / s.square().sum().clamp_min(1e-30)
    needed = int((energy < keep).sum()) + 1 if keep < 1 else int((s > SMALLEST * s[0]).sum())
    count = max(1, min(needed, len(s) if rank is None else rank))
    return _lora(q @ (u[:, :count] * s[:count]), v[:count] @ p.t(), shape)


def joined(loras: Sequence[tuple[LowRank, float]]) -> LowRank:
    """Return the LoRA whose change is the weighted sum of others'; its rank is the sum of theirs.

    Args:
        loras: LoRAs of one module and their strengths.
    """
    factors = [(lora.factors(torch.device("cpu")), lora.scale * strength) for lora, strength in loras]
    up = torch.cat([own * scale for (own, _), scale in factors], dim=1)  # (out, Σr)
    down = torch.cat([own.flatten(1) for (_, own), _ in factors])  # (Σr, in·k·k)
    return _lora(up, down, (len(up), *factors[0][0][1].shape[1:]))


def _lora(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> LowRank:
    """Return the LoRA of matrices, of which each has the same norm, for a weight of a shape."""
    balance = (up.norm() / down.norm().clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    up, down = up / balance, down * balance
    if len(shape) > 2:
        up, down = up[..., None, None], down.view(len(down), *shape[1:])
    return LowRank(up=up.contiguous(), down=down.contiguous())
