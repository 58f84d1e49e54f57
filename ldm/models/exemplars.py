"""The layers by which a diffusion transformer sees exemplars that lie on a canvas.

The canvas shows the things of a prompt where they are to be drawn: retrieval-augmented diffusion (Blattmann
et al. 2022; Chen et al. 2022, Re-Imagen) with a layout. The network recolors, shades and combines what it is
shown, and does not have to remember it. A token is too narrow for all pixels of its patch. The output is
therefore computed cell by cell from the pixels themselves, modulated by the token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.layers.grouped import GroupedLinear


class ExemplarCells(nn.Module):
    """Linear features of the exemplars in each cell of the latent, the same for all slots.

    Args:
        cell: Side f of a cell in pixels of the canvas.
    """

    DIM = 64  # features E of a slot

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, self.DIM, cell, stride=cell)

    @torch.no_grad()
    def use_basis(self, weight: Tensor) -> None:
        """Begin with the components of an autoencoder as the first features, which training may change.

        Args:
            weight: `PatchAutoencoder.project.weight`, shape (C, 3·f², 1, 1), C at most E.
        """
        kernel, (count, numbers) = self.embed.weight, weight.shape[:2]
        if count > self.DIM or numbers != kernel[0, :3].numel():
            raise ValueError(
                f"the projection has shape {tuple(weight.shape)}: expected (up to {self.DIM},"
                f" {kernel[0, :3].numel()}, 1, 1)"
            )
        kernel[:count, :3] = 2 * weight.to(kernel).view(count, 3, *kernel.shape[2:])  # of colors in [0, 1]
        kernel[:count, 3] = 0

    def forward(self, canvas: Tensor) -> Tensor:
        """Return features (B, K·E, h, w) of a canvas (B, K, 4, h·f, w·f), in its dtype."""
        batch = len(canvas)
        seen = self.embed(canvas.flatten(0, 1))  # (B·K, E, h, w)
        return rearrange(seen, "(b k) e h w -> b (k e) h w", b=batch)


class CellHead(nn.Module):
    """The output of each cell, computed from what the cell receives and modulated by its token.

    It is the sum of an MLP, of the cell's input times a gate, and of the exemplars' features times a gate.
    Before training the MLP and the first gate are 0, and the second gate is 1.

    Args:
        width: Width D of a token.
        in_channels: Channels C of the network's input.
        slots: Number K of slots.
        out_channels: Channels of the prediction, at most C and E.
        patch: Side p of a token in cells.
        hidden: Width of the MLP. Default: 256.
    """

    def __init__(
        self,
        width: int,
        *,
        in_channels: int,
        slots: int,
        out_channels: int,
        patch: int,
        hidden: int = 256,
    ) -> None:
        super().__init__()
        self.in_channels, self.slots, self.out_channels, self.patch = in_channels, slots, out_channels, patch
        self.modulation = GroupedLinear(width, 2 * hidden * patch**2)
        self.gates = GroupedLinear(width, 2 * out_channels * patch**2)
        self.embed_in = GroupedLinear(in_channels + slots * ExemplarCells.DIM, hidden)
        self.fc = GroupedLinear(hidden, hidden)
        self.proj_out = GroupedLinear(hidden, out_channels)
        for zero in (*self.gates.parameters(), *self.proj_out.parameters()):
            nn.init.zeros_(zero)

    def forward(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """Return the prediction (B, C_out, h, w).

        Args:
            tokens: Shape (B, (h/p)·(w/p), D).
            cells: Input of the network and features of the exemplars, (B, C + K·E, h, w).
        """
        p, h, kept = self.patch, cells.shape[-2], self.out_channels
        own = rearrange(cells, "b c (h p) (w q) -> b (h w) (p q) c", p=p, q=p)
        scale, shift = rearrange(self.modulation(tokens), "b l (n p e) -> n b l p e", n=2, p=p * p)
        gate_x, gate_seen = rearrange(self.gates(tokens), "b l (n p c) -> n b l p c", n=2, p=p * p)
        x, seen = own.split([self.in_channels, self.slots * ExemplarCells.DIM], dim=-1)
        seen = seen.unflatten(-1, (self.slots, ExemplarCells.DIM)).sum(-2)  # (B, L, p², E)
        y = F.gelu(self.embed_in(own) * (1 + scale) + shift)  # (B, L, p², hidden)
        y = self.proj_out(F.gelu(self.fc(y)))  # (B, L, p², C_out)
        y = y + gate_x * x[..., :kept] + (1 + gate_seen) * seen[..., :kept]
        return rearrange(y, "b (h w) (p q) c -> b c (h p) (w q)", h=h // p, p=p, q=p)
