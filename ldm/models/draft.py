"""A draft of the latent from an embedding alone, of a text or an image, which the denoiser starts from and corrects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.clip import check_positive


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """``embed_dim``: E, the width of an embedding; ``width``: of the ``layers`` hidden ones; ``channels`` and ``size``: the latent's C and side."""

    embed_dim: int
    width: int = 1024
    layers: int = 1
    channels: int = 4
    size: int = 16

    def __post_init__(self) -> None:
        check_positive(embed_dim=self.embed_dim, width=self.width, layers=self.layers, channels=self.channels, size=self.size)


class Draft(nn.Module):
    """Embeddings (B, E) → E[x0 | embedding] (B, C, s, s), in units of the scaled latent.

    Learned by squared error beside the diffusion, whose network then sees it joined to x_t: Grad-TTS's μ and its prior loss (Popov et al. 2021),
    for pictures. What a name looks like is thus remembered by a layer that is run once a prompt, not by one that is run at every position and step.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.embed_dim, config.width)
        self.hidden = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers - 1))
        self.fc2 = nn.Linear(config.width, config.channels * config.size**2)

    def forward(self, embedding: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, s, s), or (B, C, *size) by bilinear interpolation where a latent of another size is asked for."""
        c = self.config
        x = F.gelu(self.fc1(embedding))
        for layer in self.hidden:
            x = F.gelu(layer(x))  # (B, width)
        x = self.fc2(x).view(-1, c.channels, c.size, c.size)
        return x if size in (None, (c.size, c.size)) else F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def widened(self, width: int) -> Draft:
        """The same function with more hidden units: random weights go into the new ones and zeros come out (after Net2Net, Chen et al. 2016).

        ValueError for a smaller width.
        """
        if width < self.config.width:
            raise ValueError(f"width {width}: expected at least the draft's own, {self.config.width}")
        wide, own = Draft(replace(self.config, width=width)), dict(self.named_parameters())
        for name, p in wide.named_parameters():
            old = own[name]
            p[: len(old)] = 0
            p[tuple(map(slice, old.shape))] = old
        return wide

    def agreeing(self, embedding: Tensor, known: Tensor, hole: Tensor, *, tie: float = 3.0, steps: int = 100, ridge: float = 1.0) -> Tensor:
        """Drafts (B, C, s, s) of embeddings (B, E) moved so that they agree with what is known (B, C, s, s) of a latent outside a hole (B, 1, s, s).

        First e moves, to the least of mean |draft(e) − known|² + tie·|e − embedding|²/(E·var(embedding)), by ``steps`` of Adam: the likeliest e
        under a normal prior around the text's. Then the last hidden layer does, which holds more than a text can say: `_kriged` with ``ridge``.
        Each sample by itself, in float32. ``tie`` and ``ridge`` are near the least error over the hidden half of pictures held out of training.
        """
        parameters = {name: p.detach().float() for name, p in self.named_parameters()}
        start, known = embedding.detach().float(), known.float()
        shown = (1 - hole).expand_as(known)
        share = shown.flatten(1).mean(1).clamp_min(1e-8)

        def drawn(e: Tensor) -> Tensor:
            return cast(Tensor, torch.func.functional_call(self, parameters, (e,)))

        with torch.inference_mode(False), torch.enable_grad():
            e = start.clone().requires_grad_()
            optimizer = torch.optim.Adam([e], lr=0.02)
            for _ in range(steps):
                misfit = ((drawn(e) - known).square() * shown).flatten(1).mean(1) / share
                moved = (e - start).square().mean(1) / start.var(dim=1).clamp_min(1e-8)
                (gradient,) = torch.autograd.grad((misfit + tie * moved).sum(), e)
                e.grad = gradient
                optimizer.step()
            fitted = drawn(e).detach()
        return self._kriged(fitted, known, shown, ridge)

    @torch.no_grad()
    def _kriged(self, fitted: Tensor, known: Tensor, shown: Tensor, ridge: float) -> Tensor:
        """Drafts corrected by their misfit where the latent is shown, all (B, C, s, s), ``shown`` 0 or 1: the mean of a normal process.

        The hidden layer's deviation being normal and white, the draft's has the covariance K = W·Wᵀ, W of the last layer, and the correction is
        K[:, shown]·(K[shown, shown] + ridge·mean diagonal·1)⁻¹·(known − fitted)[shown]  (Rasmussen and Williams 2006, eq. 2.23).
        """
        weight = self.fc2.weight.float()
        covariance = weight @ weight.T  # (C·s², C·s²)
        corrected = []
        for draft, misfit, seen in zip(fitted.flatten(1), (known - fitted).flatten(1), shown.flatten(1) > 0, strict=True):
            own = covariance[seen][:, seen]
            noise = ridge * own.diagonal().mean() * torch.eye(len(own), device=own.device)
            corrected.append(draft + covariance[:, seen] @ torch.linalg.solve(own + noise, misfit[seen]))
        return torch.stack(corrected).view_as(fitted)
