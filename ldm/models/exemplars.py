"""A network that turns exemplar images of the things in a prompt into context tokens.

The denoiser attends to them beside the tokens of the text, as in retrieval-augmented diffusion (Blattmann et
al. 2022; Chen et al. 2022, Re-Imagen): it learns to place, scale, recolor and combine what it is shown, and
does not have to remember it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.checks import check_positive
from ldm.models.clip.transformer import MLP
from ldm.models.dit import NormedAttention, plane_sinusoid
from ldm.models.layers.modules import ModuleListOf


@dataclass(frozen=True, kw_only=True)
class ExemplarConfig:
    """Shape of an `ExemplarEncoder`.

    Args:
        size: Side S of the exemplar images in pixels. Default: 128.
        patch: Side p of the image patches that are the tokens, a divisor of `size`. Default: 16.
        cell: Side f of the parts of a patch that are projected alike, a divisor of `patch`. Default: 8.
        components: Components of a cell that are kept, at most 3·f². Default: 32.
        slots: Largest number K of different things in a prompt. Default: 2.
        width: Width D of a token, a multiple of 4 and of `head_dim`. Default: 256.
        depth: Number of transformer blocks. Default: 1.
        head_dim: Channels of an attention head. Default: 32.

    Raises:
        ValueError: If a number is below 1, or does not divide as stated.
    """

    size: int = 128
    patch: int = 16
    cell: int = 8
    components: int = 32
    slots: int = 2
    width: int = 256
    depth: int = 1
    head_dim: int = 32

    def __post_init__(self) -> None:
        check_positive(
            size=self.size,
            patch=self.patch,
            cell=self.cell,
            components=self.components,
            slots=self.slots,
            width=self.width,
            depth=self.depth,
            head_dim=self.head_dim,
        )
        for name, value, divisor in (
            ("size", self.size, self.patch),
            ("patch", self.patch, self.cell),
            ("width", self.width, self.head_dim),
            ("width", self.width, 4),
        ):
            if value % divisor:
                raise ValueError(f"{name} {value}: expected a multiple of {divisor}")
        if self.components > 3 * self.cell**2:
            raise ValueError(f"components {self.components}: expected at most {3 * self.cell**2}")

    @property
    def tokens(self) -> int:
        """The number of tokens of one exemplar."""
        return (self.size // self.patch) ** 2


class ExemplarBlock(nn.Module):
    """Self-attention and MLP, each after a layer norm and added to its input."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = NormedAttention(width, heads=width // head_dim, head_dim=head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, L, D) for x (B, L, D)."""
        x = x + self.attn(self.norm1(x))  # (B, L, D)
        return x + self.mlp(self.norm2(x))


class ExemplarEncoder(nn.Module):
    """Encoder of K exemplar images with opacity as K·L tokens of width D.

    The colors are composed on white and projected cell by cell onto a fixed basis, that of a
    `PatchAutoencoder` (see `use_basis`); the mean opacity of a cell is one number more. Tokens know their
    position in the exemplar, and the slot, the place of their thing in the prompt.
    """

    basis: Tensor
    offset: Tensor

    def __init__(self, config: ExemplarConfig) -> None:
        super().__init__()
        self.config = config
        numbers = (config.patch // config.cell) ** 2 * (config.components + 1)
        self.register_buffer("basis", torch.zeros(config.components, 3 * config.cell**2))
        self.register_buffer("offset", torch.zeros(config.components))
        self.embed_in = nn.Linear(numbers, config.width)
        self.embed_position = nn.Linear(config.width, config.width, bias=False)
        self.slots = nn.Parameter(0.02 * torch.randn(config.slots, config.width))
        self.blocks: ModuleListOf[ExemplarBlock] = ModuleListOf(
            ExemplarBlock(config.width, config.head_dim) for _ in range(config.depth)
        )
        self.norm_out = nn.LayerNorm(config.width)

    def use_basis(self, weight: Tensor, bias: Tensor) -> None:
        """Copy the projection of cells from an autoencoder.

        Args:
            weight: `PatchAutoencoder.project.weight`, shape (C, 3·f², 1, 1), with at least `components` rows.
            bias: `PatchAutoencoder.project.bias`, shape (C,).

        Raises:
            ValueError: If the shapes do not fit.
        """
        kept, numbers = self.basis.shape
        if len(weight) < kept or weight[0].numel() != numbers:
            raise ValueError(
                f"the projection has shape {tuple(weight.shape)}: expected ({kept} or more, {numbers}, 1, 1)"
            )
        self.basis.copy_(weight.detach()[:kept].flatten(1))
        self.offset.copy_(bias.detach()[:kept])

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens of exemplars.

        Args:
            images: RGB and opacity in [0, 1], not premultiplied, shape (B, K, 4, S, S), K at most `slots`.

        Returns:
            Shape (B, K·L, D), with L tokens for each exemplar.

        Raises:
            ValueError: If the shape does not fit.
        """
        config, (batch, k) = self.config, images.shape[:2]
        if images.ndim != 5 or images.shape[2:] != (4, config.size, config.size) or k > config.slots:
            raise ValueError(
                f"exemplars of shape {tuple(images.shape)}: expected (B, up to {config.slots}, 4,"
                f" {config.size}, {config.size})"
            )
        x = self.embed_in(self.patches(images.flatten(0, 1)))  # (B·K, L, D)
        side = config.size // config.patch
        positions = plane_sinusoid(side, side, config.width, device=x.device).to(x.dtype)  # (L, D)
        x = x + self.embed_position(positions)  # (B·K, L, D)
        x = rearrange(x, "(b k) l d -> b k l d", b=batch) + self.slots[:k, None]  # (B, K, L, D)
        x = x.flatten(0, 1)  # (B·K, L, D)
        for block in self.blocks:
            x = block(x)  # (B·K, L, D)
        return rearrange(self.norm_out(x), "(b k) l d -> b (k l) d", b=batch)

    def patches(self, images: Tensor) -> Tensor:
        """Return the projected cells of images (N, 4, S, S), patch by patch, (N, L, numbers)."""
        cell, per = self.config.cell, self.config.patch // self.config.cell
        color, alpha = images[:, :3], images[:, 3:]
        x = 2 * (color * alpha + (1 - alpha)) - 1  # (N, 3, S, S), on white
        x = F.pixel_unshuffle(x, cell)  # (N, 3·f², S/f, S/f)
        x = torch.einsum("nihw,ci->nchw", x, self.basis) + self.offset[:, None, None]  # (N, C, S/f, S/f)
        x = torch.cat([x, F.avg_pool2d(alpha, cell)], dim=1)  # (N, C + 1, S/f, S/f)
        return rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=per, q=per)


def multiplied(images: Tensor) -> Tensor:
    """Return images (..., 4, S, S) with their colors multiplied by opacity, as `Cond.exemplars` has them."""
    return torch.cat([images[..., :3, :, :] * images[..., 3:, :, :], images[..., 3:, :, :]], dim=-3)
