"""ControlNet for a diffusion transformer: a copy of its first blocks that reads a hint.

Chen et al. 2024, PixArt-δ, arXiv:2401.05252, section 3.2. The hint, an image of the size of the result, is
cut into the patches of the tokens:

    x = embed(x_t) + E(hint),    x = block_i(x),    residual_i = Z_i(x)

Each Z is a linear layer, zero before training. The transformer adds residual i to the output of its block i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.checks import check_positive
from ldm.models.control.controlled import Added, MapsOnly
from ldm.models.dit import DiTConfig, DiTEncoder
from ldm.models.layers.modules import ModuleListOf


@dataclass(frozen=True, kw_only=True)
class DiTControlConfig:
    """Shape of a `DiTControl`.

    Args:
        dit: Shape of the transformer that it copies.
        blocks: Number of blocks that it copies, at most those of the transformer.
        hint_channels: Channels of the hint. Default: 3.

    Raises:
        ValueError: If a number is out of range.
    """

    dit: DiTConfig
    blocks: int
    hint_channels: int = 3

    def __post_init__(self) -> None:
        check_positive(blocks=self.blocks, hint_channels=self.hint_channels)
        if self.blocks > self.dit.depth:
            raise ValueError(f"blocks {self.blocks}: expected at most {self.dit.depth}, those of the DiT")


class DiTControl(DiTEncoder):
    """The network `net(x_t, t, cond, hint)` that returns the residuals of a transformer's first blocks.

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

    @classmethod
    def copy_of(cls, net: DiTEncoder, blocks: int, *, hint_channels: int = 3) -> DiTControl:
        """Return a ControlNet with a copy of a transformer's first blocks, whose residuals are zero.

        Args:
            net: The transformer.
            blocks: See `DiTControlConfig`.
            hint_channels: See `DiTControlConfig`.
        """
        made = cls(DiTControlConfig(dit=net.config, blocks=blocks, hint_channels=hint_channels))
        first = next(net.parameters())
        made.to(first.device, first.dtype)
        state = net.state_dict()
        with torch.no_grad():
            for name, value in made.state_dict().items():
                if name in state:
                    value.copy_(state[name])
        return made.train(net.training)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, hint: Tensor) -> tuple[Tensor, ...]:
        """Return the residuals, each (B, L, D).

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
        return tuple(found)


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
        """Return the residuals; the arguments are those of `ControlKind.added`."""
        found = self.network(x_t, t, replace(cond, residuals=None), *prepared)
        weights = [strength * (10 ** (i / len(found) - 1) if guess else 1) for i in range(len(found))]
        return {"residuals": tuple(w * each for w, each in zip(weights, found, strict=True))}
