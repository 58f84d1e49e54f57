"""A linear layer whose bits do not depend on the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 128
"""Tokens that are computed at once."""
LONG_SUM = 512
"""Sums of fewer numbers are taken in one order by all kernels."""


class GroupedLinear(nn.Linear):
    """`nn.Linear` that computes tokens in groups of a fixed number, so that all products have one shape.

    Libraries of matrix products divide long sums among threads where there are few rows: on processors with
    AMX, the tokens of one image are then rounded differently from those of several. Groups are for the CPU,
    outside of training, and for sequences of at least half of `GROUP`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, L, out_features) for x (B, L, in_features)."""
        whole = x.device.type != "cpu" or torch.is_grad_enabled() or self.in_features < LONG_SUM
        if whole or x.shape[-2] < GROUP // 2:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)  # (B·L, in_features)
        missing = -len(rows) % GROUP
        groups = (F.pad(rows, (0, 0, 0, missing)) if missing else rows).split(GROUP)
        made = torch.cat([F.linear(group, self.weight, self.bias) for group in groups])
        return made[: len(rows)].view(*x.shape[:-1], self.out_features)
