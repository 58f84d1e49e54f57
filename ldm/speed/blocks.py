"""The blocks of the networks with fused norms and the attention kernel: the same parameters and functions,
only other ways through memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.attention import Attention, AttentionBlock
from ldm.models.layers.norm import SpatialNorm
from ldm.models.layers.resblock import ResBlock, resize
from ldm.speed.kernels.ops import Plain
from ldm.speed.packed import with_grad


class FastGroupNorm(nn.GroupNorm):
    """Group norm of a map, channels last."""

    ops: Plain

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim != 4 else self.ops.group_norm(x, self)


class FastResBlock(ResBlock):
    """A residual block whose SiLUs are part of the norms."""

    ops: Plain

    def forward(self, x: Tensor, emb: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        if (self.training and self.dropout) or isinstance(self.norm1, SpatialNorm):
            return super().forward(x, emb, z)
        h = self.ops.group_norm(x, self.norm1, silu=True)
        if self.resample is not None:
            x, h = resize(x, self.resample), resize(h, self.resample)
        h = self.conv1(h)  # (B, C_out, h', w')
        if emb is None:
            h = self.ops.group_norm(h, self.norm2, silu=True)
        else:
            shift = self.time_emb_proj(F.silu(emb))
            if self.scale_shift:
                gain, offset = shift.chunk(2, dim=1)
                h = self.ops.group_norm(h, self.norm2, silu=True, gain=gain, offset=offset)
            else:
                h = self.ops.group_norm(h, self.norm2, silu=True, add=shift)
        return self.conv2(h).add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class FastAttention(Attention):
    """Attention by the kernel; by the plain product where someone looks at the probabilities, or a gradient
    is wanted."""

    ops: Plain

    def product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if with_grad(q) or with_grad(k) or self.controls:
            return super().product(q, k, v, mask)
        return self.ops.attention(q, k, v, mask)


class FastAttentionBlock(FastAttention, AttentionBlock):
    """Attention of a map's positions by the kernel."""
