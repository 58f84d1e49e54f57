"""Decoders of unCLIP (Ramesh et al. 2022, section 2.1).

A decoder is a UNet or a diffusion transformer with an image's CLIP embedding, and optionally a text, as
condition.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.dit import DiT, DiTConfig
from ldm.models.unet import UNet
from ldm.models.unet_config import UNetConfig

Norm = Literal["image", "tokens", "text", "pooled"]


@dataclass(frozen=True, kw_only=True)
class ImageConditionConfig:
    """How an image embedding and a text enter the network; the defaults are Karlo's.

    Args:
        embed_dim: Width E of the image embedding. Default: 768.
        tokens: Number k of context tokens that the image embedding is projected to. Default: 4.
        interleaved: Layout of the projection to tokens: True if the token is its fastest axis, as in Karlo,
            False if the tokens are consecutive. Default: True.
        text_dim: Width D of a text token; None if the decoder reads no tokens. Default: 768.
        pooled_dim: Width P of the text embedding; None if the decoder reads none. Default: 768.
        norms: Projections that are followed by a layer norm. Default: ("text",).
        null_image: Whether the embedding that means "no image" is learned. Default: True.

    Raises:
        ValueError: If a number is below 1, or a norm belongs to a projection that does not exist.
    """

    embed_dim: int = 768
    tokens: int = 4
    interleaved: bool = True
    text_dim: int | None = 768
    pooled_dim: int | None = 768
    norms: tuple[Norm, ...] = ("text",)
    null_image: bool = True

    def __post_init__(self) -> None:
        for name in ("embed_dim", "tokens", "text_dim", "pooled_dim"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for norm, width in (("text", self.text_dim), ("pooled", self.pooled_dim)):
            if norm in self.norms and width is None:
                raise ValueError(f"norms: {norm!r} of a decoder that reads none, got {self.norms}")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder, whose network is a UNet or a diffusion transformer.

    Args:
        unet: Shape of the UNet; `embedded` and `context_dim` must be set, because the condition is projected
            outside the UNet. None for a transformer. Default: None.
        dit: Shape of the transformer, which reads the condition as context alone; None for a UNet.
            Default: None.
        condition: How the condition is projected.

    Raises:
        ValueError: If the parts do not fit together.
    """

    unet: UNetConfig | None = None
    dit: DiTConfig | None = None
    condition: ImageConditionConfig = field(default_factory=ImageConditionConfig)

    def __post_init__(self) -> None:
        if (self.unet is None) == (self.dit is None):
            raise ValueError("expected one of unet and dit")
        if self.unet is not None and not (self.unet.embedded and self.unet.takes_context):
            raise ValueError(
                "unet: expected embedded=True and attention with a context_dim, for the vector and the tokens"
                " of the image"
            )
        if self.dit is not None and (
            self.condition.pooled_dim is not None or "image" in self.condition.norms
        ):
            raise ValueError(
                "dit: it takes no vector, expected condition.pooled_dim null and no norm of image, got"
                f" {self.condition.pooled_dim} and norms {self.condition.norms}"
            )

    @property
    def network(self) -> UNetConfig | DiTConfig:
        """Shape of the network."""
        network = self.unet or self.dit
        assert network is not None
        return network

    @property
    def multiple(self) -> int:
        """The number of which the sides of the input must be multiples."""
        return self.network.multiple

    @property
    def guidance_dim(self) -> int | None:
        """Width of an embedded guidance scale; see `UNetConfig`."""
        return self.network.guidance_dim


class ImageCondition(nn.Module):
    """Projection of image embedding and text to the vector and the context of the network.

    Args:
        config: Widths of the condition.
        emb_dim: Width D_t of the time embedding, to which the vector is added; None for a network that takes
            no vector.
        context_dim: Width D_c of the context.
    """

    def __init__(self, config: ImageConditionConfig, *, emb_dim: int | None, context_dim: int) -> None:
        super().__init__()
        self.config = config
        c = config
        self.null_image = nn.Parameter(torch.zeros(c.embed_dim)) if c.null_image else None
        self.image = None if emb_dim is None else nn.Linear(c.embed_dim, emb_dim)
        self.tokens = nn.Linear(c.embed_dim, c.tokens * context_dim)
        self.pooled = None if emb_dim is None or c.pooled_dim is None else nn.Linear(c.pooled_dim, emb_dim)
        self.text = None if c.text_dim is None else nn.Linear(c.text_dim, context_dim)
        widths = {"image": emb_dim, "pooled": emb_dim, "tokens": context_dim, "text": context_dim}
        self.norms = nn.ModuleDict({f"{name}_norm": nn.LayerNorm(widths[name]) for name in c.norms})

    def forward(self, cond: Cond) -> Cond:
        """Return the condition of the network: `context` (B, k + L, D_c), its mask, and `pooled` (B, D_t).

        Args:
            cond: `image_emb` (B, E) and, if the decoder reads text, `context` (B, L, D) with its mask and
                `pooled` (B, P).

        Raises:
            ValueError: If the condition has other widths; see `check`.
        """
        self.check(cond)
        assert cond.image_emb is not None
        emb = None if self.image is None else self._norm("image", self.image(cond.image_emb))  # (B, D_t)
        order = "b (d k) -> b k d" if self.config.interleaved else "b (k d) -> b k d"
        # (B, k, D_c)
        context = self._norm("tokens", rearrange(self.tokens(cond.image_emb), order, k=self.config.tokens))
        mask = None
        if self.pooled is not None:
            assert emb is not None
            emb = emb + self._norm("pooled", self.pooled(cond.pooled))  # (B, D_t)
        if self.text is not None:
            # (B, k + L, D_c)
            context = torch.cat([context, self._norm("text", self.text(cond.context))], dim=1)
            mask = (
                None
                if cond.context_mask is None
                else F.pad(cond.context_mask, (self.config.tokens, 0), value=True)
            )  # (B, k + L)
        return replace(cond, context=context, context_mask=mask, pooled=emb, image_emb=None)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """Return the layer norm of x that belongs to a projection, or x if it has none."""
        key = f"{name}_norm"
        return self.norms[key](x) if key in self.norms else x

    def check(self, cond: Cond) -> None:
        """Raise ValueError if a field of the condition is missing, has another width, or is not read."""
        c = self.config
        for name, width in (("image_emb", c.embed_dim), ("context", c.text_dim), ("pooled", c.pooled_dim)):
            value: Tensor | None = getattr(cond, name)
            got = None if value is None else value.shape[-1]
            if got != width:
                expected = f"width {width}" if width else "none"
                raise ValueError(
                    f"Cond.{name}: this decoder takes {expected}, got {f'width {got}' if got else 'none'}"
                )

    def taken(self, cond: Cond) -> Cond:
        """Return the condition without the fields of the text that this decoder does not read."""
        cond = cond if self.text is not None else replace(cond, context=None, context_mask=None)
        return cond if self.pooled is not None else replace(cond, pooled=None)

    def nothing(self) -> Tensor:
        """Return the learned embedding (1, E) that means "no image".

        Raises:
            ValueError: If the decoder has none.
        """
        if self.null_image is None:
            raise ValueError(
                "this decoder has no learned embedding for no image: pass one, of an empty image or of a"
                " negative prompt"
            )
        return self.null_image[None]


class Decoder(nn.Module):
    """The network `net(x_t, t, cond)`, conditioned on `Cond.image_emb` and the text."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        shape, emb_dim = config.network, None
        if config.unet is not None:
            self.unet = UNet(config.unet)
            emb_dim = 4 * config.unet.channels[0]
        elif config.dit is not None:
            self.dit = DiT(config.dit)
        assert shape.context_dim is not None
        self.condition = ImageCondition(config.condition, emb_dim=emb_dim, context_dim=shape.context_dim)

    @property
    def network(self) -> UNet | DiT:
        """The UNet or the transformer."""
        return self.dit if self.config.unet is None else self.unet

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the raw prediction.

        Args:
            x_t: Noisy sample, shape (B, C, h, w).
            t: Timesteps, shape (B,).
            cond: The condition that `ImageCondition` takes, `concat`, and the `exemplars` of a transformer
                that takes some.

        Returns:
            Shape (B, C_out, h, w).
        """
        prediction: Tensor = self.network(x_t, t, self.condition(cond))
        return prediction
