"""A draft of the latent from an embedding alone, of a text or an image, which the denoiser starts from and
corrects."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.clip.towers import check_positive


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """``embed_dim``: E, the width of an embedding; ``width``: of the ``layers`` hidden ones; ``channels`` and
    ``size``: the latent's C and side; ``finish``: the channels of the convolutions that finish the draft,
    None for none.
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
        )
        if self.finish is not None:
            check_positive(finish=self.finish)


class Finish(nn.Module):
    """Three convolutions whose hidden channels an embedding scales and shifts (FiLM, Perez et al. 2018); x
    (B, C, s, s), e (B, E) → (B, C, s, s).

    What a caption changes at every position alike, such as the colour of the ground, they need to learn but
    once for all things. The last begins at 0, so that a draft is what it was without them.
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
        # (B, width, 1, 1) each
        scale_in, shift_in, scale, shift = self.film(e)[..., None, None].chunk(4, dim=1)
        h = F.gelu(self.conv_in(x) * (1 + scale_in) + shift_in)
        h = F.gelu(self.conv(h) * (1 + scale) + shift)
        return x + self.conv_out(h)


class Draft(nn.Module):
    """Embeddings (B, E) → E[x0 | embedding] (B, C, s, s), in units of the scaled latent.

    Learned by squared error beside the diffusion, whose network then sees it joined to x_t: Grad-TTS's μ and
    its prior loss (Popov et al. 2021), for pictures. What a name looks like is thus remembered by a layer
    that is run once a prompt, not by one that is run at every position and step.
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
        """(B, C, s, s), or (B, C, *size) by bilinear interpolation where a latent of another size is asked
        for."""
        c = self.config
        x = self._begun(embedding)
        x = x if self.finish is None else self.finish(x, embedding)
        return (
            x
            if size in (None, (c.size, c.size))
            else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        )

    def _begun(self, embedding: Tensor) -> Tensor:
        """(B, C, s, s): the draft before it is finished, linear in the last hidden layer."""
        x = F.gelu(self.fc1(embedding))
        for layer in self.hidden:
            x = F.gelu(layer(x))  # (B, width)
        return self.fc2(x).view(-1, self.config.channels, self.config.size, self.config.size)

    @torch.no_grad()
    def grown(self, config: DraftConfig) -> Draft:
        """The same function by a draft with more hidden units, whose random weights go in and zeros come out
        (after Net2Net, Chen et al. 2016), or with a `Finish` that it had not.

        ValueError for a configuration that is not this one's with a larger width, or with ``finish``.
        """
        own = self.config
        if (
            replace(config, width=own.width, finish=own.finish) != own
            or config.width < own.width
            or own.finish not in (None, config.finish)
        ):
            raise ValueError(
                f"this draft is {own}: expected more width, or finish where it is None, got {config}"
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
        """Drafts (B, C, s, s) of embeddings (B, E) moved so that they agree with what is known (B, C, s, s)
        of a latent outside a hole (B, 1, s, s).

        First e moves, to the least of mean |draft(e) − known|² + tie·|e − embedding|²/(E·var(embedding)), by
        ``steps`` of Adam: the likeliest e under a normal prior around the text's. Then the last hidden layer
        does, which holds more than a text can say: `_kriged` with ``ridge``. Each sample by itself, in
        float32. ``tie`` and ``ridge`` are near the least error over the hidden half of pictures held out of
        training.
        """
        with torch.inference_mode(False), torch.enable_grad():
            net = self._plain()
            start, known = embedding.detach().float(), known.float()
            shown = (1 - hole).expand_as(known)
            share = shown.flatten(1).mean(1).clamp_min(1e-8)
            e = start.clone().requires_grad_()
            optimizer = torch.optim.Adam([e], lr=0.02)
            for _ in range(steps):
                misfit = ((net(e) - known).square() * shown).flatten(1).mean(1) / share
                moved = (e - start).square().mean(1) / start.var(dim=1).clamp_min(1e-8)
                (gradient,) = torch.autograd.grad((misfit + tie * moved).sum(), e)
                e.grad = gradient
                optimizer.step()
            return net._kriged(e.detach(), known, shown, ridge)

    def _plain(self) -> Draft:
        """The same draft in float32, of plain layers that gradients flow through, whatever `ldm.optimize` has
        made of it; weights do not learn."""
        with torch.device("meta"):
            net = Draft(self.config)
        net.load_state_dict({name: p.detach().float() for name, p in self.state_dict().items()}, assign=True)
        return net.requires_grad_(False)

    @torch.no_grad()
    def _kriged(self, embedding: Tensor, known: Tensor, shown: Tensor, ridge: float) -> Tensor:
        """Drafts corrected by their misfit where the latent is shown, (B, C, s, s), ``shown`` 0 or 1: the
        mean of a normal process.

        The hidden layer's deviation being normal and white, the draft's has the covariance K = W·Wᵀ, W of the
        last layer (behind it the derivative of what finishes the draft), and the correction is K[:,
        shown]·(K[shown, shown] + ridge·mean diagonal·1)⁻¹·(known − draft)[shown]  (Rasmussen and Williams
        2006, eq. 2.23).
        """
        corrected = []
        for e, truth, seen in zip(embedding.split(1), known.flatten(1), shown.flatten(1) > 0, strict=True):
            draft, weight = self(e).flatten(), self._directions(e)
            covariance = weight @ weight.T  # (C·s², C·s²)
            own = covariance[seen][:, seen]
            noise = ridge * own.diagonal().mean() * torch.eye(len(own), device=own.device)
            corrected.append(
                draft + covariance[:, seen] @ torch.linalg.solve(own + noise, (truth - draft)[seen])
            )
        return torch.stack(corrected).view_as(known)

    def _directions(self, embedding: Tensor) -> Tensor:
        """(C·s², width): the derivative of the draft of an embedding (1, E) by the last hidden layer."""
        if self.finish is None:
            return self.fc2.weight
        finish, begun = self.finish, self._begun(embedding)
        derivative = torch.func.jacrev(lambda x: finish(x, embedding), chunk_size=256)(begun)
        return derivative.view(begun.numel(), -1) @ self.fc2.weight
