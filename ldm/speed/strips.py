"""Decoding large pictures by strips of rows, layer by layer, with the seams of the whole picture: in little
memory, which is used again and again rather than asked for anew, and so a little sooner than whole maps.
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
from ldm.speed.kernels.ops import Plain
from ldm.speed.packed import with_grad

# bytes of a map in one strip: below what the C library's allocator gives back to the system at once
STRIP = 2**24
LARGE = 2**28  # numbers from which on a doubled map is not kept, but made again for each use
T = TypeVar("T")
Affine = tuple[Tensor, Tensor]  # scale and shift of each channel (B, C)


class Map:
    """A map (B, C, h, w) that is read by rows: a tensor, or the double of one by an `Upsample`, which is then
    never whole in memory."""

    def __init__(self, x: Tensor, upsample: Upsample | None = None) -> None:
        self.x, self.upsample = x, upsample
        factor = 1 if upsample is None else 2
        self.batch, self.channels = len(x), x.shape[1]
        self.height, self.width = factor * x.shape[2], factor * x.shape[3]

    @property
    def small(self) -> bool:
        """Whether it is a tensor that fits into one strip."""
        return self.upsample is None and self.x.numel() * self.x.element_size() <= STRIP

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows from top to below bottom: (B, C, bottom − top, w)."""
        if self.upsample is None:
            return self.x[:, :, top:bottom]
        # a doubled row sees the rows beside its own
        first, last = (max(0, top // 2 - 1), min(self.x.shape[2], (bottom + 1) // 2 + 1))
        return self.upsample(self.x[:, :, first:last])[:, :, top - 2 * first : bottom - 2 * first]

    def strips(self) -> Iterator[tuple[int, int]]:
        """(top, bottom) of each strip."""
        step = max(8, STRIP // (self.batch * self.channels * self.width * self.x.element_size()) // 2 * 2)
        for top in range(0, self.height, step):
            yield top, min(self.height, top + step)

    def empty(self, channels: int) -> Tensor:
        """A map of this size, channels last, to be filled."""
        return torch.empty(
            self.batch,
            channels,
            self.height,
            self.width,
            dtype=self.x.dtype,
            memory_format=torch.channels_last,
        )


class Convolved(Map):
    """A map that is norm, SiLU and a 3×3 convolution of another, made anew whenever its rows are read, and so
    never whole in memory."""

    def __init__(self, ops: Plain, source: Map, affine: Affine, conv: nn.Conv2d) -> None:
        super().__init__(source.x)
        self.ops, self.source, self.affine, self.conv = ops, source, affine, conv
        self.channels, self.height, self.width = conv.out_channels, source.height, source.width

    def rows(self, top: int, bottom: int) -> Tensor:
        above, below = min(top, 1), min(self.height - bottom, 1)
        y = self.conv(self.ops.affine(self.source.rows(top - above, bottom + below), *self.affine, silu=True))
        return y[:, :, above : above + bottom - top]


def group_statistics(ops: Plain, source: Map, norm: nn.GroupNorm) -> Affine:
    """What a group norm multiplies and adds, by the statistics of the whole map, put together from strips
    (Chan et al. 1979, eq. 2.1)."""
    parts = []
    for top, bottom in source.strips():
        mean, m2 = ops.moments(source.rows(top, bottom))
        parts.append((float((bottom - top) * source.width), mean, m2))
    count = sum(n for n, _, _ in parts)
    mean = torch.stack([n * mean for n, mean, _ in parts]).sum(0) / count  # (B, C)
    m2 = torch.stack([part + n * (own - mean).square() for n, own, part in parts]).sum(0)
    grouped = mean.unflatten(1, (norm.num_groups, -1))  # (B, G, C/G)
    mu = grouped.mean(2, keepdim=True)
    var = (m2.unflatten(1, (norm.num_groups, -1)) / count + (grouped - mu).square()).mean(2, keepdim=True)
    scale = (var + norm.eps).rsqrt().expand_as(grouped).flatten(1) * norm.weight.double()
    shift = norm.bias.double() - mu.expand_as(grouped).flatten(1) * scale
    return scale.float(), shift.float()


def normed_conv(
    ops: Plain, source: Map, affine: Affine, conv: Callable[[Tensor], Tensor]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Norm, SiLU and a 3×3 convolution by strips: (top, bottom, the source's rows, the result's rows).

    A strip is read with a row more on either side, so that its own rows see what they see in the whole map.
    """
    for top, bottom in source.strips():
        above, below = min(top, 1), min(source.height - bottom, 1)
        x = source.rows(top - above, bottom + below)
        y = conv(ops.affine(x, *affine, silu=True))
        inner = slice(above, above + bottom - top)
        yield top, bottom, x[:, :, inner], y[:, :, inner]


def res_block(ops: Plain, block: ResBlock, source: Map, inner: Tensor | None) -> Tensor:
    """A residual block without embedding; ``inner``: a map of its output's size, to be overwritten, or None:
    what lies between the convolutions is made twice in place of being kept.

    Where its input is a tensor of as many channels, that becomes the output.
    """
    in_place = block.conv_shortcut is None and source.upsample is None
    out = source.x if in_place else source.empty(block.conv1.out_channels)
    first = group_statistics(ops, source, block.norm1)
    if inner is None:
        middle: Map = Convolved(ops, source, first, block.conv1)
    else:
        for top, bottom, x, y in normed_conv(ops, source, first, block.conv1):
            inner[:, :, top:bottom] = y
            if not in_place:
                out[:, :, top:bottom] = shortcut(block, x)
        middle = Map(inner)
    strips = normed_conv(ops, middle, group_statistics(ops, middle, block.norm2), block.conv2)
    for top, bottom, _, y in strips if inner is not None else delayed(strips):
        if inner is None and not in_place:
            out[:, :, top:bottom] = shortcut(block, source.rows(top, bottom))
        out[:, :, top:bottom] += y
    return out


def shortcut(block: ResBlock, x: Tensor) -> Tensor:
    """What a residual block adds its convolutions to."""
    return x if block.conv_shortcut is None else block.conv_shortcut(x)


def delayed(strips: Iterator[T]) -> Iterator[T]:
    """Each when the next is made: a strip is not written before the one behind it has seen the rows that it
    replaces."""
    for before, _ in pairwise(chain(strips, [None])):
        assert before is not None
        yield before


def learning(module: nn.Module, x: Tensor) -> bool:
    """Whether a gradient must flow through a map or to a module's weights."""
    return with_grad(x) or (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))


def watched(module: nn.Module) -> bool:
    """Whether hooks look at parts of a module, which must then be called each, with whole maps."""
    return any(
        part._forward_hooks or part._forward_pre_hooks for part in module.modules() if part is not module
    )


class StripDecoder(VAEDecoder):
    """The autoencoder's decoder; maps beyond the size of a strip by strips, so that at any moment two maps of
    the largest layer are in memory; one where ``spare`` is set (`ldm.optimize` with memory=True), for maps
    beyond LARGE, at the cost of computing some convolutions twice.

    Whole where a gradient is wanted, a latent modulates the norms, off the CPU, and where hooks look at
    single layers.
    """

    ops: Plain
    spare: bool = False

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        whole = (
            learning(self.conv_norm_out, x)
            or self.training
            or isinstance(self.conv_norm_out, SpatialNorm)
            or x.device.type != "cpu"
        )
        if whole or watched(self):
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
        for top, bottom, _, y in normed_conv(
            self.ops, source, group_statistics(self.ops, source, self.conv_norm_out), self.conv_out
        ):
            out[:, :, top:bottom] = y
        return out
