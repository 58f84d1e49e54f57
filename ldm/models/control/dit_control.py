"""ControlNet for a diffusion transformer: a copy of its first blocks that reads a hint.

Chen et al. 2024, PixArt-δ, arXiv:2401.05252, section 3.2. The hint, an image of the size of the result, is
cut into the patches of the tokens:

    x = embed(x_t) + E(hint),    x = block_i(x),    residual_i = Z_i(x)

Each Z is a linear layer, zero before training. The transformer adds residual i to the output of its block i.

A transformer with exemplars computes its output cell by cell, as a token is too narrow for all pixels of its
patch (`ldm.models.exemplars`). Its control reads the hint in the same way: a head of its own adds to the
output of each cell what it computes of the cell's hint and of what the cell receives, modulated by the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.checks import check_positive
from ldm.models.control.controlled import Added, MapsOnly
from ldm.models.dit import DiTConfig, DiTEncoder
from ldm.models.exemplars import ExemplarCells
from ldm.models.layers.grouped import GroupedLinear
from ldm.models.layers.modules import ModuleListOf


@dataclass(frozen=True, kw_only=True)
class DiTControlConfig:
    """Shape of a `DiTControl`.

    Args:
        dit: Shape of the transformer that it copies.
        blocks: Number of blocks that it copies, at most those of the transformer.
        hint_channels: Channels of the hint. Default: 3.
        cell_head: Whether it adds to the output of each cell, for a transformer with exemplars. Default:
            False.

    Raises:
        ValueError: If a number is out of range, or there is a head for a transformer without exemplars.
    """

    dit: DiTConfig
    blocks: int
    hint_channels: int = 3
    cell_head: bool = False

    def __post_init__(self) -> None:
        check_positive(blocks=self.blocks, hint_channels=self.hint_channels)
        if self.blocks > self.dit.depth:
            raise ValueError(f"blocks {self.blocks}: expected at most {self.dit.depth}, those of the DiT")
        if self.cell_head and not self.dit.slots:
            raise ValueError("cell_head: expected False, the DiT has no exemplars")


class HintHead(nn.Module):
    """What a hint adds to the output of each cell; zero before training.

    An MLP reads the cell's input and features of the hint in the cell and its neighbours. Its first layer is
    scaled and shifted by the token.

    Args:
        dit: Shape of the transformer.
        numbers: Numbers of the hint in a cell, C_hint·f².
    """

    HIDDEN, FEATURES = 128, 64

    def __init__(self, dit: DiTConfig, numbers: int) -> None:
        super().__init__()
        self.patch = dit.patch
        self.embed_hint = nn.Conv2d(numbers, self.FEATURES, 3, padding=1)
        inputs = dit.in_channels + dit.slots * ExemplarCells.DIM + self.FEATURES
        self.norm = nn.LayerNorm(dit.width, elementwise_affine=False)
        self.modulation = GroupedLinear(dit.width, 2 * self.HIDDEN * dit.patch**2)
        self.embed_in = GroupedLinear(inputs, self.HIDDEN)
        self.fc = GroupedLinear(self.HIDDEN, self.HIDDEN)
        self.proj_out = GroupedLinear(self.HIDDEN, dit.out_channels)
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, cells: Tensor, hint: Tensor) -> Tensor:
        """Return what is added to the raw prediction, (B, C_out, h, w).

        Args:
            tokens: Shape (B, (h/p)·(w/p), D).
            cells: What each cell receives, (B, C_in + K·E, h, w).
            hint: The hint's pixels by cell, (B, C_hint·f², h, w).
        """
        p, h = self.patch, cells.shape[-2]
        read = torch.cat([cells, self.embed_hint(hint)], dim=1)
        own = rearrange(read, "b c (h p) (w q) -> b (h w) (p q) c", p=p, q=p)
        tokens = self.modulation(self.norm(tokens))
        scale, shift = rearrange(tokens, "b l (n p e) -> n b l p e", n=2, p=p * p)
        y = F.gelu(self.embed_in(own) * (1 + scale) + shift)  # (B, L, p², hidden)
        y = self.proj_out(F.gelu(self.fc(y)))  # (B, L, p², C_out)
        return rearrange(y, "b (h w) (p q) c -> b c (h p) (w q)", h=h // p, p=p, q=p)


class DiTControl(DiTEncoder):
    """The network `net(x_t, t, cond, hint)` that returns what is added to a transformer.

    `DiTControl(config)` has random weights; `DiTControl.copy_of(net, blocks)` begins a training.
    """

    def __init__(self, config: DiTControlConfig) -> None:
        super().__init__(config.dit, config.blocks)
        self.control = config
        dit = config.dit
        self.embed_hint = nn.Conv2d(
            config.hint_channels * dit.cell**2, dit.width, dit.patch, stride=dit.patch, bias=False
        )
        self.control_blocks: ModuleListOf[nn.Linear] = ModuleListOf(
            nn.Linear(dit.width, dit.width) for _ in range(config.blocks)
        )
        for parameter in self.control_blocks.parameters():
            nn.init.zeros_(parameter)
        self.head = HintHead(dit, self.embed_hint.in_channels) if config.cell_head else None

    @classmethod
    def copy_of(cls, net: DiTEncoder, blocks: int, *, hint_channels: int = 3) -> DiTControl:
        """Return a ControlNet with a copy of a transformer's first blocks, which adds nothing yet.

        For a transformer with exemplars it has a head of its own.

        Args:
            net: The transformer.
            blocks: See `DiTControlConfig`.
            hint_channels: See `DiTControlConfig`.
        """
        made = cls(
            DiTControlConfig(
                dit=net.config,
                blocks=blocks,
                hint_channels=hint_channels,
                cell_head=net.config.slots > 0,
            )
        )
        first = next(net.parameters())
        made.to(first.device, first.dtype)
        state = net.state_dict()
        with torch.no_grad():
            for name, value in made.state_dict().items():
                if name in state:
                    value.copy_(state[name])
        return made.train(net.training)

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Cond, hint: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the residuals, each (B, L, D), and the output, (B, C_out, h, w), of its head if it has one.

        Args:
            x_t: Noisy sample, shape (B, C, h, w).
            t: Timesteps, shape (B,); they may be fractional.
            cond: The transformer's condition.
            hint: The hint's pixels by cell, shape (B, C_hint·f², h, w); see `DiTControlKind.prepare`.

        Raises:
            ValueError: If x_t, the condition or the hint do not fit.
        """
        cells, wanted = self.cells(x_t, cond), (self.embed_hint.in_channels, *x_t.shape[-2:])
        if tuple(hint.shape[1:]) != wanted:
            raise ValueError(f"hint: expected the shape (B, {wanted}), got {tuple(hint.shape)}")
        x = self.tokens(cells) + self.embed_hint(hint).flatten(2).transpose(1, 2)  # (B, L, D)
        emb, context = self.embed(t, cond, x.dtype), cond.context  # (B, 6, D)
        assert context is not None
        found = []
        for block, zero in zip(self.blocks, self.control_blocks, strict=True):
            x = block(x, emb, context, cond.context_mask)  # (B, L, D)
            found.append(zero(x))
        return tuple(found), () if self.head is None else (self.head(x, cells, hint),)


@dataclass(frozen=True, kw_only=True, eq=False)
class DiTControlKind(MapsOnly):
    """A `DiTControl`, as a `ControlKind`.

    In guess mode residual i of n is multiplied by 10^(i/n − 1).
    """

    network: DiTControl
    count = 1

    @property
    def factor(self) -> int:
        """Size of a hint divided by that of the latent."""
        return self.network.config.cell

    @property
    def hint_channels(self) -> int:
        """Channels of a hint."""
        return self.network.control.hint_channels

    def prepare(self, hint: Tensor) -> tuple[Tensor, ...]:
        """Return the pixels of hints (B, C, H, W) by cell, (B, C·f², h, w)."""
        return (F.pixel_unshuffle(hint, self.factor),)

    def added(
        self, x_t: Tensor, t: Tensor, cond: Cond, prepared: Sequence[Tensor], *, strength: float, guess: bool
    ) -> Added:
        """Return residuals and output; the arguments are those of `ControlKind.added`."""
        residuals, output = self.network(x_t, t, replace(cond, residuals=None, output=None), *prepared)
        n = len(residuals)
        weights = [strength * (10 ** (i / n - 1) if guess else 1) for i in range(n)]
        found = {"residuals": tuple(w * each for w, each in zip(weights, residuals, strict=True))}
        return {**found, "output": tuple(strength * each for each in output)} if output else found
