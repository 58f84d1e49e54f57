"""Decoding of large images by strips of rows, layer by layer, with the result of whole maps.

A strip is read with the rows beside it, and norms use the statistics of the whole map, so there are no seams.
The memory of a strip is small and reused, which is also slightly faster than whole maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.models.layers.norm import SpatialNorm
from ldm.models.layers.resblock import ResBlock, Upsample
from ldm.models.vae import VAEDecoder
from ldm.speed.kernels.ops import TorchOps
from ldm.speed.packed import needs_gradient

# bytes of a map in one strip; the C library's allocator keeps blocks of this size instead of returning them
# to the system
STRIP = 2**24
LARGE = 2**28  # entries from which a doubled map is recomputed for each use instead of kept
T = TypeVar("T")
Affine = tuple[Tensor, Tensor]  # scale and shift of each channel, (B, C) each


class Map:
    """Feature map that is read by rows: a tensor, or the output of an `Upsample`, never whole in memory.

    Args:
        x: Feature map, shape (B, C, h, w).
        upsample: Layer that doubles x. None for x itself. Default: None.
    """

    def __init__(self, x: Tensor, upsample: Upsample | None = None) -> None:
        self.x, self.upsample = x, upsample
        factor = 1 if upsample is None else 2
        self.batch, self.channels = len(x), x.shape[1]
        self.height, self.width = factor * x.shape[2], factor * x.shape[3]

    @property
    def small(self) -> bool:
        """Whether the map is a tensor that fits in one strip."""
        return self.upsample is None and self.x.numel() * self.x.element_size() <= STRIP

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return the rows from `top` to below `bottom`, shape (B, C, bottom − top, w)."""
        if self.upsample is None:
            return self.x[:, :, top:bottom]
        # a doubled row depends on the rows beside its own
        first, last = (max(0, top // 2 - 1), min(self.x.shape[2], (bottom + 1) // 2 + 1))
        return self.upsample(self.x[:, :, first:last])[:, :, top - 2 * first : bottom - 2 * first]

    def strips(self) -> Iterator[tuple[int, int]]:
        """Yield (top, bottom) of each strip."""
        step = max(8, STRIP // (self.batch * self.channels * self.width * self.x.element_size()) // 2 * 2)
        for top in range(0, self.height, step):
            yield top, min(self.height, top + step)

    def empty(self, channels: int) -> Tensor:
        """Return an uninitialized map of this size, channels last, shape (B, channels, h, w)."""
        return torch.empty(
            self.batch,
            channels,
            self.height,
            self.width,
            dtype=self.x.dtype,
            device=self.x.device,
            memory_format=torch.channels_last,
        )


class Convolved(Map):
    """Norm, SiLU and 3×3 convolution of another map, recomputed whenever its rows are read.

    Args:
        ops: The operators.
        source: The other map.
        affine: Scale and shift of the norm.
        conv: The convolution.
    """

    def __init__(self, ops: TorchOps, source: Map, affine: Affine, conv: nn.Conv2d) -> None:
        super().__init__(source.x)
        self.ops, self.source, self.affine, self.conv = ops, source, affine, conv
        self.channels, self.height, self.width = conv.out_channels, source.height, source.width

    def rows(self, top: int, bottom: int) -> Tensor:
        """Return the rows from `top` to below `bottom`, shape (B, C_out, bottom − top, w)."""
        above, below = min(top, 1), min(self.height - bottom, 1)
        # (B, C_out, above + bottom − top + below, w)
        y = self.conv(self.ops.affine(self.source.rows(top - above, bottom + below), *self.affine, silu=True))
        return y[:, :, above : above + bottom - top]


def group_statistics(ops: TorchOps, source: Map, norm: nn.GroupNorm) -> Affine:
    """Return the scale and shift of a group norm with the statistics of the whole map.

    The statistics of strips are combined as in Chan et al. (1979, eq. 2.1).

    Args:
        ops: The operators.
        source: The map that is normalized.
        norm: The group norm, with G groups.

    Returns:
        Scale and shift of each channel, (B, C) each, float32.
    """
    parts = []
    for top, bottom in source.strips():
        mean, m2 = ops.moments(source.rows(top, bottom))  # (B, C) each
        parts.append((float((bottom - top) * source.width), mean, m2))
    count = sum(n for n, _, _ in parts)
    mean = torch.stack([n * mean for n, mean, _ in parts]).sum(0) / count  # (B, C)
    m2 = torch.stack([part + n * (own - mean).square() for n, own, part in parts]).sum(0)  # (B, C)
    grouped = mean.unflatten(1, (norm.num_groups, -1))  # (B, G, C/G)
    mu = grouped.mean(2, keepdim=True)  # (B, G, 1)
    # (B, G, 1)
    var = (m2.unflatten(1, (norm.num_groups, -1)) / count + (grouped - mu).square()).mean(2, keepdim=True)
    scale = (var + norm.eps).rsqrt().expand_as(grouped).flatten(1) * norm.weight.double()  # (B, C)
    shift = norm.bias.double() - mu.expand_as(grouped).flatten(1) * scale  # (B, C)
    return scale.float(), shift.float()


def normed_conv(
    ops: TorchOps, source: Map, affine: Affine, conv: Callable[[Tensor], Tensor]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield the strips of norm, SiLU and 3×3 convolution of a map.

    A strip is read with one more row on either side, so that its rows are those of the whole map.

    Args:
        ops: The operators.
        source: The map.
        affine: Scale and shift of the norm.
        conv: The convolution.

    Yields:
        Top, bottom, the source's rows (B, C, bottom − top, w), the result's rows (B, C_out, bottom − top, w).
    """
    for top, bottom in source.strips():
        above, below = min(top, 1), min(source.height - bottom, 1)
        x = source.rows(top - above, bottom + below)
        y = conv(ops.affine(x, *affine, silu=True))
        inner = slice(above, above + bottom - top)
        yield top, bottom, x[:, :, inner], y[:, :, inner]


def res_block(ops: TorchOps, block: ResBlock, source: Map, inner: Tensor | None) -> Tensor:
    """Return the output of a residual block without time embedding.

    If the source is a tensor with the channels of the output, it is overwritten and returned.

    Args:
        ops: The operators.
        block: The residual block, with group norms.
        source: The input.
        inner: Buffer of the output's shape for the map between the convolutions. None to compute that map
            twice instead of keeping it.

    Returns:
        Shape (B, C_out, h, w), channels last.
    """
    norm1, norm2 = block.norm1, block.norm2
    assert isinstance(norm1, nn.GroupNorm) and isinstance(norm2, nn.GroupNorm)
    in_place = block.conv_shortcut is None and source.upsample is None
    out = source.x if in_place else source.empty(block.conv1.out_channels)  # (B, C_out, h, w)
    first = group_statistics(ops, source, norm1)
    if inner is None:
        middle: Map = Convolved(ops, source, first, block.conv1)
    else:
        for top, bottom, x, y in normed_conv(ops, source, first, block.conv1):
            inner[:, :, top:bottom] = y
            if not in_place:
                out[:, :, top:bottom] = shortcut(block, x)
        middle = Map(inner)
    strips = normed_conv(ops, middle, group_statistics(ops, middle, norm2), block.conv2)
    for top, bottom, _, y in strips if inner is not None else delayed(strips):
        if inner is None and not in_place:
            out[:, :, top:bottom] = shortcut(block, source.rows(top, bottom))
        out[:, :, top:bottom] += y
    return out


def shortcut(block: ResBlock, x: Tensor) -> Tensor:
    """Return the skip connection (B, C_out, h, w) of a residual block for x (B, C, h, w)."""
    return x if block.conv_shortcut is None else block.conv_shortcut(x)


def delayed(strips: Iterator[T]) -> Iterator[T]:
    """Yield each strip after the next is computed, which still reads the rows that the strip overwrites."""
    for before, _ in pairwise(chain(strips, [None])):
        assert before is not None
        yield before


def module_needs_gradient(module: nn.Module, x: Tensor) -> bool:
    """Return whether a map or a parameter of a module requires a gradient."""
    return needs_gradient(x, *module.parameters())


def has_inner_hooks(module: nn.Module) -> bool:
    """Return whether parts of a module have forward hooks, which must be called with whole maps.

    A hook with a method `applies` counts where that returns True: one of `ldm.trace` in the traced calls.
    """
    return any(
        getattr(hook, "applies", _always)()
        for part in module.modules()
        if part is not module
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )


def _always() -> bool:
    return True


class StripDecoder(VAEDecoder):
    """The autoencoder's decoder, with maps that exceed a strip computed by strips.

    At any time two maps of the largest layer are in memory. It computes whole maps if a gradient is required,
    if a latent modulates the norms, on other devices than the CPU, and if single layers have hooks.

    Attributes:
        ops: The operators.
        spare: Whether to keep one map instead of two for maps above `LARGE`, by computing some convolutions
            twice (`ldm.optimize` with memory=True).
    """

    ops: TorchOps
    spare: bool = False

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Return the decoded patches; the arguments are those of `VAEDecoder.forward`."""
        norm_out = self.conv_norm_out
        if (
            module_needs_gradient(self, x)
            or self.training
            or isinstance(norm_out, SpatialNorm)
            or x.device.type != "cpu"
            or has_inner_hooks(self)
        ):
            return super().forward(x, z)
        x = self.mid_block(self.conv_in(x)).contiguous(memory_format=torch.channels_last)
        source = Map(x)
        del x
        for level in self.up_blocks:
            inner = None
            for i, resnet in enumerate(level.resnets):
                if source.small:
                    source = Map(resnet(source.x))
                else:
                    if not (
                        self.spare
                        and source.height * source.width * source.batch * resnet.conv1.out_channels > LARGE
                    ):
                        inner = source.empty(resnet.conv1.out_channels) if inner is None else inner
                    source = Map(res_block(self.ops, resnet, source, inner))
                if level.attentions is not None:
                    source = Map(level.attentions[i](source.x))
            del inner
            if level.upsamplers is not None:  # large maps are doubled when their rows are read
                doubled = Map(source.x, level.upsamplers[0])
                source = doubled if 4 * source.x.numel() >= LARGE else Map(doubled.rows(0, doubled.height))
        out = source.empty(self.conv_out.out_channels)
        affine = group_statistics(self.ops, source, norm_out)
        for top, bottom, _, y in normed_conv(self.ops, source, affine, self.conv_out):
            out[:, :, top:bottom] = y
        return out
