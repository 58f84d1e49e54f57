"""What an autoencoder encodes an image to: a Gaussian over latents, or one latent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents.

    Args:
        mean: Shape (B, C, h, w).
        logvar: Logarithm of the variance, shape (B, C, h, w).
    """

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """Return the most probable latent, the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std · noise, for standard normal noise (B, C, h, w)."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Return KL(q ‖ N(0, 1)) of each sample in nats, summed over the latent's entries, shape (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


@dataclass(frozen=True)
class Point:
    """Latent of an autoencoder without a posterior, with the interface of `Posterior`.

    Args:
        mean: The latent, shape (B, C, h, w).
    """

    mean: Tensor

    def mode(self) -> Tensor:
        """Return the latent."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Return the latent; the noise is ignored."""
        return self.mean
