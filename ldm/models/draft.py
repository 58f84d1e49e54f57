"""A draft of the latent, computed from an embedding of the prompt alone.

The denoiser reads the draft as additional channels. See `Draft`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.checks import check_positive


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Shape of a `Draft`.

    Args:
        embed_dim: Width E of the embedding.
        width: Width W of the hidden layers. Default: 1024.
        layers: Number of hidden layers. Default: 1.
        channels: Channels C of the latent. Default: 4.
        size: Side s of the latent. Default: 16.
        finish: Hidden channels of the convolutions in `Finish`. None for a draft without them.
            Default: None.

    Raises:
        ValueError: If a number is below 1.
    """

    embed_dim: int
    width: int = 1024
    layers: int = 1
    channels: int = 4
    size: int = 16
    finish: int | None = None

    def __post_init__(self) -> None:
        check_positive(
            embed_dim=self.embed_dim,
            width=self.width,
            layers=self.layers,
            channels=self.channels,
            size=self.size,
            finish=self.finish,
        )


class Finish(nn.Module):
    """Three convolutions with a residual sum, whose hidden channels an embedding scales and shifts.

    The modulation is FiLM (Perez et al. 2018). The convolutions learn what a prompt changes at every position
    alike, such as the background color, once for all objects. The last convolution starts at 0, so that a
    new `Finish` does not change the draft.

    Args:
        embed_dim: Width E of the embedding.
        channels: Channels C of the latent.
        width: Hidden channels.
    """

    def __init__(self, embed_dim: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        self.film = nn.Linear(embed_dim, 4 * width)
        for zero in (*self.conv_out.parameters(), *self.film.parameters()):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Return the finished draft (B, C, s, s) of a draft x (B, C, s, s) and embeddings e (B, E)."""
        # (B, width, 1, 1) each
        scale_in, shift_in, scale, shift = self.film(e)[..., None, None].chunk(4, dim=1)
        h = F.gelu(self.conv_in(x) * (1 + scale_in) + shift_in)  # (B, width, s, s)
        h = F.gelu(self.conv(h) * (1 + scale) + shift)  # (B, width, s, s)
        return x + self.conv_out(h)


class Draft(nn.Module):
    """Network that estimates E[x0 | embedding], in units of the scaled latent.

    It is trained with a squared error together with the diffusion network, which reads the draft concatenated
    to x_t. This is the encoder output μ of Grad-TTS with its prior loss (Popov et al. 2021), for images. The
    appearance of an object is thus stored in a layer that runs once per prompt, and not in one that runs at
    every position and step.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.embed_dim, config.width)
        self.hidden = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers - 1))
        self.fc2 = nn.Linear(config.width, config.channels * config.size**2)
        self.finish = (
            None if config.finish is None else Finish(config.embed_dim, config.channels, config.finish)
        )

    def forward(self, embedding: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the drafts of embeddings.

        Args:
            embedding: Shape (B, E).
            size: (h, w) of the result, by bilinear interpolation. None for (s, s). Default: None.

        Returns:
            Shape (B, C, h, w).
        """
        c = self.config
        x = self._unfinished(embedding)  # (B, C, s, s)
        x = x if self.finish is None else self.finish(x, embedding)  # (B, C, s, s)
        return (
            x
            if size in (None, (c.size, c.size))
            else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        )

    def _unfinished(self, embedding: Tensor) -> Tensor:
        """Return the draft before `finish`, (B, C, s, s), which is linear in the last hidden layer."""
        x = F.gelu(self.fc1(embedding))  # (B, W)
        for layer in self.hidden:
            x = F.gelu(layer(x))  # (B, W)
        return self.fc2(x).view(-1, self.config.channels, self.config.size, self.config.size)

    @torch.no_grad()
    def grown(self, config: DraftConfig) -> Draft:
        """Return a larger draft that computes the same function (after Net2Net, Chen et al. 2016).

        The inputs of new hidden units have random weights, their outputs have zeros.

        Args:
            config: The configuration of this draft with a larger `width`, a new `finish`, or both.

        Raises:
            ValueError: If anything else differs.
        """
        own = self.config
        if (
            replace(config, width=own.width, finish=own.finish) != own
            or config.width < own.width
            or own.finish not in (None, config.finish)
        ):
            raise ValueError(
                f"this draft is {own}: expected a larger width, or finish where it is None, got {config}"
            )
        grown, known = Draft(config), dict(self.named_parameters())
        for name, p in grown.named_parameters():
            if name in known:
                old = known[name]
                p[: len(old)] = 0
                p[tuple(map(slice, old.shape))] = old
        return grown

    def agreeing(
        self,
        embedding: Tensor,
        known: Tensor,
        hole: Tensor,
        *,
        tie: float = 3.0,
        steps: int = 100,
        ridge: float = 1.0,
    ) -> Tensor:
        """Return drafts that agree with the known part of a latent.

        First the embedding e is optimized with Adam, from `embedding`, to minimize the mean over the known
        part of |draft(e) − known|² plus tie·|e − embedding|² / (E·var(embedding)): the most probable e under
        a normal prior around `embedding`. Then the last hidden layer, which holds more than the embedding
        determines, is corrected by kriging (see `_corrected`). Every sample is computed on its own, in
        float32. The defaults of `tie` and `ridge` are close to the least error over the hidden half of
        images that were held out of training.

        Args:
            embedding: Shape (B, E).
            known: Latent, of which the part outside the hole is read, shape (B, C, s, s).
            hole: 1 where the latent is unknown, else 0, shape (B, 1, s, s).
            tie: Weight of the distance to `embedding`. Default: 3.
            steps: Steps of Adam. Default: 100.
            ridge: Noise variance of the kriging, in units of the mean prior variance. Default: 1.

        Returns:
            Shape (B, C, s, s).
        """
        with torch.inference_mode(False), torch.enable_grad():
            net = self._float32_copy()
            start, known = embedding.detach().float(), known.float()  # (B, E), (B, C, s, s)
            shown = (1 - hole).expand_as(known)  # (B, C, s, s)
            share = shown.flatten(1).mean(1).clamp_min(1e-8)  # (B,)
            e = start.clone().requires_grad_()  # (B, E)
            optimizer = torch.optim.Adam([e], lr=0.02)
            for _ in range(steps):
                misfit = ((net(e) - known).square() * shown).flatten(1).mean(1) / share  # (B,)
                moved = (e - start).square().mean(1) / start.var(dim=1).clamp_min(1e-8)  # (B,)
                (gradient,) = torch.autograd.grad((misfit + tie * moved).sum(), e)
                e.grad = gradient
                optimizer.step()
            return net._corrected(e.detach(), known, shown, ridge)

    def _float32_copy(self) -> Draft:
        """Return a copy in float32 with differentiable layers, also if `ldm.optimize` changed this one."""
        with torch.device("meta"):
            net = Draft(self.config)
        net.load_state_dict({name: p.detach().float() for name, p in self.state_dict().items()}, assign=True)
        return net.requires_grad_(False)

    @torch.no_grad()
    def _corrected(self, embedding: Tensor, known: Tensor, shown: Tensor, ridge: float) -> Tensor:
        """Return drafts corrected by kriging, the posterior mean of a Gaussian process.

        If the hidden layer has a white normal prior, the draft has the covariance K = W·Wᵀ, where W is the
        Jacobian of the draft with respect to the hidden layer. The correction is
        K[:, shown]·(K[shown, shown] + ridge·mean diagonal·1)⁻¹·(known − draft)[shown]
        (Rasmussen and Williams 2006, eq. 2.23).

        Args:
            embedding: Shape (B, E).
            known: Latent, shape (B, C, s, s).
            shown: 1 where the latent is known, else 0, shape (B, C, s, s).
            ridge: Noise variance, in units of the mean prior variance.

        Returns:
            Shape (B, C, s, s).
        """
        corrected = []
        for e, truth, seen in zip(embedding.split(1), known.flatten(1), shown.flatten(1) > 0, strict=True):
            draft, weight = self(e).flatten(), self._jacobian(e)  # (C·s²,), (C·s², W)
            covariance = weight @ weight.T  # (C·s², C·s²)
            own = covariance[seen][:, seen]  # (n, n) for n known numbers
            noise = (
                ridge * own.diagonal().mean() * torch.eye(len(own), device=own.device, dtype=own.dtype)
            )  # (n, n)
            corrected.append(
                draft + covariance[:, seen] @ torch.linalg.solve(own + noise, (truth - draft)[seen])
            )
        return torch.stack(corrected).view_as(known)

    def _jacobian(self, embedding: Tensor) -> Tensor:
        """Return the Jacobian (C·s², W) of the draft of one embedding (1, E) by the last hidden layer."""
        if self.finish is None:
            return self.fc2.weight
        finish, unfinished = self.finish, self._unfinished(embedding)
        derivative = torch.func.jacrev(lambda x: finish(x, embedding), chunk_size=256)(unfinished)
        return derivative.view(unfinished.numel(), -1) @ self.fc2.weight
