"""The text encoder of DALL·E Mini (Dayma et al. 2021), over tokens or over the states of a text tower.

The latter also sees exemplars, as they lie on a canvas: retrieval-augmented autoregression (Yasunaga et al.
2022, RA-CM3; Blattmann et al. 2022) with a layout. Each token of an image has a cell of the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.models.checks import check_positive
from ldm.models.dalle.layers import DalleEncoderLayer
from ldm.models.layers.modules import ModuleListOf

TEXT_PAD = 1  # id of the padding, which no token attends to


@dataclass(frozen=True, kw_only=True)
class DalleEncoderConfig:
    """Shape of the encoder; the defaults are those of DALL·E Mini.

    Args:
        vocabulary: Number of text tokens. Default: 50264.
        length: Number M of tokens of a text, with padding. Default: 64.
        width: Width D. Default: 1024.
        layers: Number of layers. Default: 12.
        heads: Number of heads, a divisor of D. Default: 16.
        inner: Width of the gated linear units. Default: 2730.

    Raises:
        ValueError: If a number is below 1, or D is no multiple of the heads.
    """

    vocabulary: int = 50264
    length: int = 64
    width: int = 1024
    layers: int = 12
    heads: int = 16
    inner: int = 2730

    def __post_init__(self) -> None:
        check_positive(**vars(self))
        check_heads(self.width, self.heads)


@dataclass(frozen=True, kw_only=True)
class StateEncoderConfig:
    """Shape of an encoder that reads the states of a text tower and sees exemplars.

    Args:
        text_width: Width of the tower's states.
        width: Width D.
        slots: Number K of things on a canvas. Default: 2.
        cell: Side f of a cell of the canvas in pixels, that of an image's token. Default: 8.
        layers: Number of layers; with 0, states are projected and normed alone. Default: 0.
        heads: Number of heads, a divisor of D. Default: 4.
        inner: Width of the gated linear units. Default: 512.

    Raises:
        ValueError: If `layers` is negative, another number is below 1, or D is no multiple of the heads.
    """

    text_width: int
    width: int
    slots: int = 2
    cell: int = 8
    layers: int = 0
    heads: int = 4
    inner: int = 512

    def __post_init__(self) -> None:
        check_positive(**{name: value for name, value in vars(self).items() if name != "layers"})
        if self.layers < 0:
            raise ValueError(f"layers: expected at least 0, got {self.layers}")
        check_heads(self.width, self.heads)


class DalleEncoder(nn.Module):
    """Transformer over the tokens of a text."""

    def __init__(self, config: DalleEncoderConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width)
        self.embed_positions = nn.Embedding(c.length, c.width)
        self.layers: ModuleListOf[DalleEncoderLayer] = ModuleListOf(
            DalleEncoderLayer(c.width, c.heads, c.inner) for _ in range(c.layers)
        )
        self.layernorm_embedding = nn.LayerNorm(c.width)
        self.final_ln = nn.LayerNorm(c.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the states (B, M, D) of texts.

        Args:
            tokens: Ids, padded by `TEXT_PAD`, int64, shape (B, M), M at most `config.length`.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (M,)
        x = self.layernorm_embedding(self.embed_tokens(tokens) + self.embed_positions(positions))  # (B, M, D)
        mask = text_mask(tokens)[:, None, None]  # (B, 1, 1, M)
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_ln(x)


class StateEncoder(nn.Module):
    """DALL·E Mini's encoder with a projection of a text tower's states in place of embeddings.

    `cells` embeds what a canvas shows in the cell of each token.
    """

    def __init__(self, config: StateEncoderConfig) -> None:
        super().__init__()
        self.config = c = config
        self.project = nn.Linear(c.text_width, c.width)
        self.embed_cells = nn.Linear(4 * c.slots * c.cell**2, c.width)
        self.layers: ModuleListOf[DalleEncoderLayer] = ModuleListOf(
            DalleEncoderLayer(c.width, c.heads, c.inner) for _ in range(c.layers)
        )
        self.layernorm_embedding = nn.LayerNorm(c.width)
        self.final_ln = nn.LayerNorm(c.width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the states (B, M, D) of texts.

        Args:
            states: States of the tower, shape (B, M, D_text).
            mask: True for tokens of the texts, bool, shape (B, M).
        """
        x = self.layernorm_embedding(self.project(states))  # (B, M, D)
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return self.final_ln(x)

    @torch.no_grad()
    def use_basis(self, weight: Tensor, bias: Tensor, scale: float) -> None:
        """Begin with the latents of patches as the first features of cells, as the canvas lies on white.

        Args:
            weight: Projection of patches in [−1, 1] onto latents, shape (C, 3·f², 1, 1), C at most D.
            bias: Its bias, shape (C,).
            scale: Factor of the latents.
        """
        c, count = self.config, len(weight)
        colors = scale * weight.view(count, 3, c.cell, c.cell)  # (C, 3, f, f)
        kernel = 2 * torch.cat([colors, -colors.sum(1, keepdim=True)], dim=1)  # of colors and opacity
        self.embed_cells.weight[:count] = kernel.flatten(1).repeat(1, c.slots)
        self.embed_cells.bias[:count] = colors.sum((1, 2, 3)) + scale * bias

    def cells(self, canvas: Tensor) -> Tensor:
        """Return the embeddings (B, N, D) of the cells of canvases, in the order of an image's tokens.

        Args:
            canvas: See `ldm.models.layout.place_exemplars`, shape (B, K, 4, H, W).
        """
        # no convolution: oneDNN's of this shape is wrong in bfloat16
        f, dtype = self.config.cell, self.embed_cells.weight.dtype
        x = rearrange(canvas, "b k c (h p) (w q) -> b (h w) (k c p q)", p=f, q=f)  # (B, N, K·4·f²)
        return self.embed_cells(x.to(dtype))


def text_mask(tokens: Tensor) -> Tensor:
    """Return the mask (B, M) of the ids (B, M) that are no padding."""
    return tokens != TEXT_PAD


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError unless the width is a multiple of the number of heads."""
    if width % heads:
        raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
