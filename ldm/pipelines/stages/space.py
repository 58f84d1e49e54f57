"""The space that a diffusion works in: the latents of an autoencoder, or pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.support.device import computing_dtype


class Space(nn.Module):
    """Images (B, 3, H, W) in [0, 1] ↔ the states of a diffusion.

    Args:
        vae: The autoencoder. None: the diffusion runs on pixels in [−1, 1].
        scale: Factor by which encoded latents are multiplied. Default: 1.
        mean: Mean of each channel of the latents, which is subtracted first. Default: none.
        std: Standard deviation of each channel, which is divided out then. Default: none.

    Raises:
        ValueError: If there is another number of means or standard deviations than channels.
    """

    def __init__(
        self,
        vae: nn.Module | None = None,
        scale: float = 1.0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.vae: Any = vae  # an autoencoder of any kind: encode, decode, config
        self.scale = scale
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (0, self.channels):
                raise ValueError(
                    f"latent_{name}: expected {self.channels} numbers, one per channel, got {len(values)}"
                )
        self.mean, self.std = tuple(mean), tuple(std)

    @property
    def channels(self) -> int:
        """Channels of a state."""
        return 3 if self.vae is None else self.vae.config.latent_channels

    @property
    def factor(self) -> int:
        """Image size divided by the size of a state."""
        return 1 if self.vae is None else self.vae.config.factor

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of a state.

        Raises:
            ValueError: If a side is not a positive multiple of `factor`.
        """
        for side, value in (("height", height), ("width", width)):
            if value < self.factor or value % self.factor:
                near = max(self.factor, round(value / self.factor) * self.factor)
                raise ValueError(
                    f"{side} {value}: expected a multiple of {self.factor}, the autoencoder's factor; the"
                    f" nearest is {near}"
                )
        return self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, x: Tensor, device: torch.device) -> Tensor:
        """Encode images as states, float32 on `device`; of a latent space, the scaled posterior mean.

        Args:
            x: Images (B, 3, H, W) in [0, 1].
            device: Where the autoencoder is.

        Returns:
            States (B, C, H/factor, W/factor).
        """
        x = (2 * x - 1).to(device)
        if self.vae is None:
            return x.float()
        z: Tensor = self.vae.encode(x.to(computing_dtype(self.vae))).mode()
        return self.scaled(z.float())

    def scaled(self, z: Tensor) -> Tensor:
        """Return the autoencoder's latents (B, C, h, w) as states."""
        if self.mean:
            z = z - per_channel(self.mean, z)
        if self.std:
            z = z / per_channel(self.std, z)
        return z * self.scale

    def unscaled(self, z: Tensor) -> Tensor:
        """Return states (B, C, h, w) in the units of the autoencoder's latents."""
        z = z / self.scale
        if self.std:
            z = z * per_channel(self.std, z)
        return z + per_channel(self.mean, z) if self.mean else z

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode states (B, C, h, w) to images (B, 3, H, W), float32 in [0, 1] on the CPU.

        Values outside [0, 1] are clamped. NaN is kept, so that it is found later.
        """
        x: Tensor = z
        if self.vae is not None:
            x = self.vae.decode(self.unscaled(z).to(computing_dtype(self.vae)))
        return ((x.float() + 1) / 2).clamp(0, 1).cpu()


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Return C values as a tensor (1, C, 1, 1) in the dtype and on the device of ``like``."""
    return like.new_tensor(values)[None, :, None, None]
