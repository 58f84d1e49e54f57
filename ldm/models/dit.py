"""The diffusion transformer (Peebles & Xie 2023) with cross-attention.

The blocks follow PixArt-α (Chen et al. 2023, section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.checks import check_positive
from ldm.models.clip.transformer import MLP
from ldm.models.exemplars import CellHead, ExemplarCells
from ldm.models.layers.attention import Attention
from ldm.models.layers.embeddings import VectorMLP, guidance_sinusoid, one_time, sinusoid
from ldm.models.layers.grouped import GroupedLinear
from ldm.models.layers.modules import ModuleListOf


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a `DiT`.

    Args:
        in_channels: Channels of the input, x_t and `Cond.concat` together.
        out_channels: Channels of the prediction.
        patch: Side p of the patches of the latent that are the tokens. Default: 2.
        width: Width D of a token, a multiple of 4 and of `head_dim`. Default: 256.
        depth: Number of blocks. Default: 8.
        head_dim: Channels d of an attention head. Default: 32.
        context_dim: Width D_c of the context.
        guidance_dim: Width of the sinusoid of `Cond.guidance`, for a network that embeds the guidance scale.
            None for one that does not. Default: None.
        slots: Number K of things whose exemplars lie on a canvas, `Cond.exemplars`; 0 for a network that
            takes none. Default: 0.
        cell: Side of a number of the latent in pixels of that canvas. Default: 8.

    Raises:
        ValueError: If a number is below 1, the width is not such a multiple, or there is no such block.
    """

    in_channels: int
    out_channels: int
    patch: int = 2
    width: int = 256
    depth: int = 8
    head_dim: int = 32
    context_dim: int
    guidance_dim: int | None = None
    slots: int = 0
    cell: int = 8

    def __post_init__(self) -> None:
        check_positive(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            patch=self.patch,
            width=self.width,
            depth=self.depth,
            head_dim=self.head_dim,
            context_dim=self.context_dim,
            guidance_dim=self.guidance_dim,
            cell=self.cell,
        )
        if self.width % self.head_dim or self.width % 4:
            raise ValueError(f"width {self.width}: expected a multiple of 4 and of head_dim {self.head_dim}")
        if self.slots < 0:
            raise ValueError(f"slots {self.slots}: expected at least 0")

    @property
    def multiple(self) -> int:
        """The number of which the sides of the input must be multiples."""
        return self.patch

    @property
    def takes_context(self) -> bool:
        """Whether the network attends to `Cond.context`: always."""
        return True


def plane_sinusoid(h: int, w: int, dim: int, *, device: torch.device | None = None) -> Tensor:
    """Return sinusoids of the positions of a grid, as fractions of its height and width.

    A position (y, x) in [0, 1)² is encoded as sin and cos of π·y·f, then of π·x·f, for dim/4 frequencies f
    that grow geometrically from 1 to 32. Grids of different sizes agree where they cover the same place.

    Args:
        h, w: Rows and columns of the grid.
        dim: Width of the encoding, a multiple of 4.
        device: Device of the result. Default: the CPU.

    Returns:
        Shape (h·w, dim), float32, row by row.
    """
    frequencies = torch.exp(torch.linspace(0.0, math.log(32.0), dim // 4, dtype=torch.float32, device=device))
    y, x = (
        math.pi * (torch.arange(n, dtype=torch.float32, device=device) + 0.5)[:, None] / n * frequencies
        for n in (h, w)
    )  # (h, dim/4), (w, dim/4)
    rows = torch.cat([y.sin(), y.cos()], dim=-1)[:, None].expand(h, w, dim // 2)  # (h, w, dim/2)
    columns = torch.cat([x.sin(), x.cos()], dim=-1)[None].expand(h, w, dim // 2)  # (h, w, dim/2)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class NormedAttention(Attention):
    """Attention whose queries and keys have unit mean square (Henry et al. 2020; Dehghani et al. 2023).

    The logits stay bounded, which keeps training stable at high learning rates.
    """

    linear = GroupedLinear

    def product(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention of normalized queries and keys; shapes as in `attend`."""
        dim = (q.shape[-1],)
        return super().product(F.rms_norm(q, dim), F.rms_norm(k, dim), v, mask)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each after a layer norm and added to its input.

    The time scales, shifts and gates self-attention and MLP. One projection of the time serves all blocks,
    each of which adds a table of its own (PixArt-α, section 2.3, adaLN-single).

    Args:
        width: Width D of a token.
        head_dim: Channels of an attention head.
        context_dim: Width D_c of the context.
    """

    def __init__(self, width: int, *, head_dim: int, context_dim: int) -> None:
        super().__init__()
        heads = width // head_dim
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.attn1 = NormedAttention(width, heads=heads, head_dim=head_dim)
        self.attn2 = NormedAttention(width, heads=heads, head_dim=head_dim, context_dim=context_dim)
        self.mlp = MLP(width, 4 * width, "gelu", linear=GroupedLinear)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """Return the output (B, L, D).

        Args:
            x: Tokens, shape (B, L, D).
            emb: The projected time, shape (B, 6, D).
            context: Shape (B, M, D_c).
            mask: True for tokens of the context that are attended to, bool, shape (B, M), or None.
        """
        # (B, 1, D) each
        scale1, shift1, gate1, scale3, shift3, gate3 = (emb + self.modulation)[:, :, None].unbind(1)
        y = self.norm1(x) * (1 + scale1) + shift1  # (B, L, D)
        x = x + self.attn1(y) * (1 + gate1)  # (B, L, D)
        x = x + self.attn2(self.norm2(x), context, mask)  # (B, L, D)
        y = self.norm3(x) * (1 + scale3) + shift3  # (B, L, D)
        return x + self.mlp(y) * (1 + gate3)


class DiTEncoder(nn.Module):
    """What a `DiT` and a ControlNet for one share: all but the output.

    Args:
        config: Shape of the DiT.
        depth: Number of blocks. Default: that of the configuration.
    """

    def __init__(self, config: DiTConfig, depth: int | None = None) -> None:
        super().__init__()
        self.config = config
        width, area = config.width, config.patch**2
        channels = config.in_channels + config.slots * ExemplarCells.DIM  # of a cell
        self.embed_in = GroupedLinear(area * channels, width)
        self.embed_position = nn.Linear(width, width, bias=False)
        self.time_embedding = VectorMLP(width, width, extra_dim=config.guidance_dim)
        self.time_modulation = nn.Linear(width, 6 * width)
        self.blocks: ModuleListOf[DiTBlock] = ModuleListOf(
            DiTBlock(width, head_dim=config.head_dim, context_dim=config.context_dim)
            for _ in range(config.depth if depth is None else depth)
        )
        self.exemplars = ExemplarCells(config.cell) if config.slots else None

    def cells(self, x_t: Tensor, cond: Cond) -> Tensor:
        """Return the input of each cell, (B, C_in + K·E, h, w): x_t, `concat`, and features of exemplars.

        Raises:
            ValueError: If x_t or the condition does not fit the configuration; see `check`.
        """
        cells = x_t if cond.concat is None else torch.cat([x_t, cond.concat], dim=1)  # (B, C_in, h, w)
        self.check(cells, cond)
        if self.exemplars is not None and cond.exemplars is not None:
            cells = torch.cat([cells, self.exemplars(cond.exemplars)], dim=1)  # (B, C_in + K·E, h, w)
        return cells

    def tokens(self, cells: Tensor) -> Tensor:
        """Return the tokens (B, L, D) of cells (B, C_in + K·E, h, w), with their positions."""
        p, (h, w) = self.config.patch, cells.shape[-2:]
        patches = rearrange(cells, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        positions = plane_sinusoid(h // p, w // p, self.config.width, device=cells.device).to(cells.dtype)
        return self.embed_in(patches) + self.embed_position(positions)

    def embed(self, t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """Return the modulation of timesteps t (B,) and, if embedded, of the guidance scale.

        Its shape is (B, 6, D), or (1, 6, D) if it is one for all rows; see `one_time`.
        """
        guidance = None
        if self.config.guidance_dim is not None and cond.guidance is not None:
            guidance = guidance_sinusoid(cond.guidance, self.config.guidance_dim).to(dtype)  # (B, D_g)
        times = sinusoid(one_time(t), self.config.width).to(dtype)  # (B, D), or one row
        emb = self.time_embedding(times, guidance)  # (B, D)
        return self.time_modulation(F.silu(emb)).unflatten(-1, (6, self.config.width))

    def check(self, x: Tensor, cond: Cond) -> None:
        """Raise ValueError for an input or a condition that the network does not take.

        Args:
            x: x_t and `Cond.concat`, concatenated, shape (B, C_in, h, w).
            cond: The condition.
        """
        config = self.config
        if x.shape[1] != config.in_channels:
            raise ValueError(
                f"input has {x.shape[1]} channels, this DiT takes {config.in_channels} (x_t and Cond.concat"
                " together)"
            )
        if x.shape[-2] % config.patch or x.shape[-1] % config.patch:
            raise ValueError(
                f"input size {x.shape[-2]}×{x.shape[-1]}: expected multiples of the patch {config.patch}"
            )
        if cond.context is None or cond.context.shape[-1] != config.context_dim:
            found = None if cond.context is None else tuple(cond.context.shape)
            raise ValueError(
                f"this DiT attends to a context of width {config.context_dim}: Cond.context is {found}"
            )
        if (config.guidance_dim is None) != (cond.guidance is None):
            takes = "takes no" if config.guidance_dim is None else "takes the"
            raise ValueError(f"this DiT {takes} guidance scale: Cond.guidance is {cond.guidance}")
        self.check_exemplars(cond.exemplars, x.shape[-2:])
        if len(cond.residuals or ()) > config.depth:
            raise ValueError(
                f"Cond.residuals: this DiT takes up to {config.depth}, got {len(cond.residuals or ())}"
            )
        shape = (len(x), config.out_channels, *x.shape[-2:])
        if bad := [tuple(each.shape) for each in cond.output or () if tuple(each.shape) != shape]:
            raise ValueError(f"Cond.output: expected the shape {shape} of the prediction, got {bad[0]}")
        if cond.pooled is not None:
            raise ValueError(
                f"this DiT takes no Cond.pooled, expected None, got shape {tuple(cond.pooled.shape)}"
            )

    def check_exemplars(self, canvas: Tensor | None, size: torch.Size) -> None:
        """Raise ValueError for exemplars that the network does not take, or for none where it takes some.

        Args:
            canvas: `Cond.exemplars`.
            size: (h, w) of the input.
        """
        config, found = self.config, None if canvas is None else tuple(canvas.shape)
        expected = (config.slots, 4, size[0] * config.cell, size[1] * config.cell)
        if not config.slots:
            if found is not None:
                raise ValueError(f"this DiT takes no exemplars: Cond.exemplars has shape {found}")
        elif found is None or found[1:] != expected:
            raise ValueError(
                f"this DiT takes exemplars of {config.slots} things: Cond.exemplars has shape {found},"
                f" expected (B, {', '.join(map(str, expected))})"
            )


class DiT(DiTEncoder):
    """The network `net(x_t, t, cond)` that returns the raw prediction, for x_t of multiples of the patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width, area = config.width, config.patch**2
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.proj_out = (
            CellHead(
                width,
                in_channels=config.in_channels,
                slots=config.slots,
                out_channels=config.out_channels,
                patch=config.patch,
            )
            if config.slots
            else nn.Linear(width, area * config.out_channels)
        )

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the raw prediction.

        Args:
            x_t: Noisy sample, shape (B, C, h, w).
            t: Timesteps, shape (B,); they may be fractional.
            cond: `context` (B, M, D_c) with its mask, `concat`, `guidance` and `exemplars` if the
                configuration has them, and of a ControlNet `residuals`, (B, L, D) for each of the first
                blocks, and `output`, (B, C_out, h, w).

        Returns:
            Shape (B, C_out, h, w).

        Raises:
            ValueError: If x_t or the condition does not fit the configuration; see `check`.
        """
        cells = self.cells(x_t, cond)  # (B, C_in + K·E, h, w)
        x = self.tokens(cells)  # (B, L, D)
        emb = self.embed(t, cond, x.dtype)  # (B, 6, D)
        found = self.predict(self.pass_blocks(x, emb, cond, range(len(self.blocks))), cells)
        return sum(cond.output or (), start=found)

    def pass_blocks(self, x: Tensor, emb: Tensor, cond: Cond, numbers: Iterable[int]) -> Tensor:
        """Return the tokens (B, L, D) behind some of the blocks, by their numbers from 0."""
        assert cond.context is not None
        added = dict(enumerate(cond.residuals or ()))
        for i in numbers:
            x = self.blocks[i](x, emb, cond.context, cond.context_mask)  # (B, L, D)
            x = x + added[i] if i in added else x
        return x

    def predict(self, x: Tensor, cells: Tensor) -> Tensor:
        """Return the prediction (B, C_out, h, w) of the last tokens (B, L, D) and of `cells`."""
        x = self.norm_out(x)  # (B, L, D)
        if isinstance(self.proj_out, CellHead):
            return self.proj_out(x, cells)
        p, h = self.config.patch, cells.shape[-2]
        return rearrange(self.proj_out(x), "b (h w) (c p q) -> b c (h p) (w q)", h=h // p, p=p, q=p)
