"""The blocks of the networks with fused norms, attention kernels and packed GEGLU.

They have the same parameters and compute the same functions as the blocks in `ldm.models.layers`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers.attention import Attention, AttentionBlock
from ldm.models.layers.norm import SpatialNorm
from ldm.models.layers.resblock import ResBlock, resize
from ldm.models.layers.transformer import GEGLU
from ldm.speed.kernels.ops import TorchOps
from ldm.speed.kernels.product import widened, widens
from ldm.speed.packed import HalvedLinear, mkldnn, needs_gradient


class FastGroupNorm(nn.GroupNorm):
    """Group norm of channels-last maps."""

    ops: TorchOps

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x (B, C, *)."""
        if x.ndim != 4:
            weight, bias = widened(x, self.weight), widened(x, self.bias)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)
        return self.ops.group_norm(x, self)


class FastResBlock(ResBlock):
    """Residual block whose norms include the SiLU."""

    ops: TorchOps

    def forward(self, x: Tensor, emb: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Return the output of the block; the arguments are those of `ResBlock.forward`."""
        norm1, norm2 = self.norm1, self.norm2
        if (
            (self.training and self.dropout)
            or isinstance(norm1, SpatialNorm)
            or isinstance(norm2, SpatialNorm)
        ):
            return super().forward(x, emb, z)
        h = self.ops.group_norm(x, norm1, silu=True)  # (B, C, h, w)
        if self.resample is not None:
            x, h = resize(x, self.resample), resize(h, self.resample)  # (B, C, h', w') each
        h = self.conv1(h)  # (B, C_out, h', w')
        if emb is None:
            h = self.ops.group_norm(h, norm2, silu=True)  # (B, C_out, h', w')
        else:
            shift = self.time_emb_proj(F.silu(emb)).expand(len(h), -1)  # (B, C_out or 2·C_out)
            if self.scale_shift:
                gain, offset = shift.chunk(2, dim=1)  # (B, C_out) each
                # (B, C_out, h', w')
                h = self.ops.group_norm(h, norm2, silu=True, gain=gain, offset=offset)
            else:
                h = self.ops.group_norm(h, norm2, silu=True, add=shift)  # (B, C_out, h', w')
        return self.conv2(h).add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class FastAttention(Attention):
    """Attention by the kernel.

    If a control reads the probabilities, or a gradient is required, `Attention` computes the product.
    """

    ops: TorchOps

    def product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return softmax(q kᵀ / sqrt(d)) v; the arguments are those of `Attention.product`."""
        if needs_gradient(q, k, v) or self.controls:
            return super().product(q, k, v, mask)
        return self.ops.attention(q, k, v, mask)


class FastAttentionBlock(FastAttention, AttentionBlock):
    """`AttentionBlock` with the kernel of `FastAttention`."""


class FastGEGLU(GEGLU):
    """GEGLU computed inside its two products, so that value and gate are never both in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated values (..., inner) of x (..., width)."""
        proj = self.proj
        # a hook of the projection sees its output, which is never made below
        halved = isinstance(proj, HalvedLinear) and not proj._forward_hooks
        if (
            isinstance(proj, HalvedLinear)
            and halved
            and widens(x, proj.weight)
            and not needs_gradient(x, proj.weight)
        ):
            (value, gate), (value_bias, gate_bias) = proj.weight.chunk(2), proj.bias.chunk(2)
            gated = F.gelu(proj.ops.linear(x, gate, gate_bias))  # (..., inner)
            return gated.mul_(proj.ops.linear(x, value, value_bias))
        packed = proj.packed_weights(x) if isinstance(proj, HalvedLinear) and halved else None
        if packed is None:
            return super().forward(x)
        value_bias, gate_bias = self.proj.bias.chunk(2)  # (inner,) each
        gate = mkldnn._linear_pointwise(x, packed[1], gate_bias, "gelu", [], "none")  # (..., inner)
        return mkldnn._linear_pointwise.binary(x, gate, packed[0], value_bias, "mul")
