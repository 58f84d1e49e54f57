"""A linear layer whose bits do not depend on the batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.rounding import mirrored_halves, with_powers

FEWEST_TOKENS, MOST_TOKENS = 8, 256  # of the images whose tokens are computed in groups if the batch matters
COMPARED_IMAGES = 8  # sizes of a batch that are compared: 1 to 8
_JUDGED: dict[tuple[object, ...], bool] = {}


class GroupedLinear(nn.Linear):
    """`nn.Linear` that computes tokens in groups of a fixed number where the batch would change their bits.

    Libraries of matrix products take sums in another order where there are few rows: on processors with AMX
    the long sums in bfloat16, elsewhere others. The tokens of one image are then rounded differently from
    those of several. In groups all products have one shape. Whether they are needed is tried out once for
    every shape. Groups are for the CPU, outside of training.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, ..., out_features) for x (B, ..., in_features)."""
        tokens = math.prod(x.shape[1:-1])
        tried = (
            x.device.type == "cpu" and not torch.is_grad_enabled() and FEWEST_TOKENS <= tokens <= MOST_TOKENS
        )
        if not tried or not depends_on_batch(self.weight, tokens):
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)  # (B·tokens, in_features)
        group = max(tokens, 64 if x.dtype == torch.float32 else 128)
        missing = -len(rows) % group
        groups = (F.pad(rows, (0, 0, 0, missing)) if missing else rows).split(group)
        made = torch.cat([F.linear(each, self.weight, self.bias) for each in groups])
        return made[: len(rows)].view(*x.shape[:-1], self.out_features)


def depends_on_batch(weight: Tensor, tokens: int) -> bool:
    """Return whether products with a weight have other bits for the tokens of one image than in a batch.

    Sums that cancel are compared (`ldm.models.layers.rounding`), once for every shape, dtype and number of
    threads.

    Args:
        weight: Shape (out_features, in_features).
        tokens: Number of tokens of an image.
    """
    key = (weight.shape, weight.dtype, tokens, torch.get_num_threads())
    if key not in _JUDGED:
        made = torch.Generator().manual_seed(0)
        x, other = (
            torch.randn(*shape, generator=made, dtype=torch.float32, device="cpu").to(weight.dtype)
            for shape in ((COMPARED_IMAGES * tokens, weight.shape[1]), weight.shape)
        )
        x, other = with_powers(mirrored_halves(x, 1), 1), mirrored_halves(other, 1, -1)
        whole = F.linear(x, other)
        _JUDGED[key] = any(
            not torch.equal(F.linear(x[: n * tokens], other), whole[: n * tokens])
            for n in range(1, COMPARED_IMAGES)
        )
    return _JUDGED[key]
