"""Decoders of unCLIP: a UNet told an image's CLIP embedding, and its text (Ramesh et al. 2022, section
2.1)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.draft import Draft, DraftConfig
from ldm.models.unet import UNet, UNetConfig

Norm = Literal["image", "tokens", "text", "pooled"]


@dataclass(frozen=True, kw_only=True)
class ImageConditionConfig:
    """How an image embedding and a text enter the UNet; the defaults are Karlo's.

    ``embed_dim``: E of the image embedding, which gives a vector for the time embedding and ``tokens`` of
    context. ``interleaved``: in the one vector that holds all tokens the token is the fastest axis, as in
    Karlo; otherwise they stand one behind the other. ``text_dim``, ``pooled_dim``: widths of the text's
    tokens and of its embedding, None where the decoder reads none. ``norms``: which projections have a
    LayerNorm behind them. ``null_image``: whether the embedding of no image is learned.
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
    """The shape of a decoder; ``unet.embedded`` and ``unet.context_dim`` must be set, as the condition is
    projected before it.

    ``draft``: of a latent from the image embedding, joined to x_t (`ldm.models.draft`); None for none, as in
    every published decoder. ``draft_text``: whether the draft reads the text's embedding too, behind the
    image's.
    """

    unet: UNetConfig
    condition: ImageConditionConfig = field(default_factory=ImageConditionConfig)
    draft: DraftConfig | None = None
    draft_text: bool = False

    def __post_init__(self) -> None:
        if not self.unet.embedded or not self.unet.takes_context:
            raise ValueError(
                "unet: expected embedded=True and attention with a context_dim, which the image's vector and"
                " tokens enter"
            )
        if self.draft_text and (self.draft is None or self.condition.pooled_dim is None):
            raise ValueError(
                "draft_text: expected a draft, and condition.pooled_dim, the width of the text's embedding"
            )
        read = self.condition.embed_dim + (self.condition.pooled_dim or 0 if self.draft_text else 0)
        if self.draft is not None and self.draft.embed_dim != read:
            raise ValueError(
                f"draft.embed_dim {self.draft.embed_dim}: the embedding that it reads is {read} wide"
            )

    @property
    def guidance_dim(self) -> int | None:
        """The width of an embedded guidance scale: see `UNetConfig`."""
        return self.unet.guidance_dim


class ImageCondition(nn.Module):
    """Image embedding and text → the vector and tokens that a UNet takes."""

    def __init__(self, config: ImageConditionConfig, *, emb_dim: int, context_dim: int) -> None:
        super().__init__()
        self.config = config
        c = config
        self.null_image = nn.Parameter(torch.zeros(c.embed_dim)) if c.null_image else None
        self.image = nn.Linear(c.embed_dim, emb_dim)
        self.tokens = nn.Linear(c.embed_dim, c.tokens * context_dim)
        self.pooled = None if c.pooled_dim is None else nn.Linear(c.pooled_dim, emb_dim)
        self.text = None if c.text_dim is None else nn.Linear(c.text_dim, context_dim)
        widths = {"image": emb_dim, "pooled": emb_dim, "tokens": context_dim, "text": context_dim}
        self.norms = nn.ModuleDict({f"{name}_norm": nn.LayerNorm(widths[name]) for name in c.norms})

    def forward(self, cond: Cond) -> Cond:
        """`Cond.image_emb` (B, E), where text is read also `Cond.context` (B, L, D) and `Cond.pooled` → the
        context and pooled of the UNet."""
        self.check(cond)
        assert cond.image_emb is not None
        emb = self._normed("image", self.image(cond.image_emb))  # (B, 4·C)
        order = "b (d k) -> b k d" if self.config.interleaved else "b (k d) -> b k d"
        context = self._normed("tokens", rearrange(self.tokens(cond.image_emb), order, k=self.config.tokens))
        mask = None
        if self.pooled is not None:
            emb = emb + self._normed("pooled", self.pooled(cond.pooled))
        if self.text is not None:
            # (B, k + L, D)
            context = torch.cat([context, self._normed("text", self.text(cond.context))], dim=1)
            mask = (
                None
                if cond.context_mask is None
                else F.pad(cond.context_mask, (self.config.tokens, 0), value=True)
            )
        return replace(cond, context=context, context_mask=mask, pooled=emb, image_emb=None)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        key = f"{name}_norm"
        return self.norms[key](x) if key in self.norms else x

    def check(self, cond: Cond) -> None:
        """ValueError for a condition that is missing, of another width, or not taken."""
        c = self.config
        for name, width in (("image_emb", c.embed_dim), ("context", c.text_dim), ("pooled", c.pooled_dim)):
            value: Tensor | None = getattr(cond, name)
            got = None if value is None else value.shape[-1]
            if got != width:
                what = f"width {width}" if width else "none"
                raise ValueError(
                    f"Cond.{name}: this decoder takes {what}, got {f'width {got}' if got else 'none'}"
                )

    def taken(self, cond: Cond) -> Cond:
        """The condition without what this decoder does not read of a text."""
        cond = cond if self.text is not None else replace(cond, context=None, context_mask=None)
        return cond if self.pooled is not None else replace(cond, pooled=None)

    def nothing(self) -> Tensor:
        """The embedding (1, E) of no image; ValueError where it is not learned."""
        if self.null_image is None:
            raise ValueError(
                "this decoder has no learned embedding of no image: give it one, of an empty picture or of a"
                " negative prompt"
            )
        return self.null_image[None]


class Decoder(nn.Module):
    """net(x_t, t, cond) → the raw prediction: the UNet under `Cond.image_emb` and the text."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        assert config.unet.context_dim is not None
        self.unet = UNet(config.unet)
        self.condition = ImageCondition(
            config.condition, emb_dim=4 * config.unet.channels[0], context_dim=config.unet.context_dim
        )
        self.draft = None if config.draft is None else Draft(config.draft)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t (B, C, h, w), t (B,) in timesteps → (B, C_out, h, w)."""
        told = self.condition(cond)
        if self.draft is not None:
            read = (
                torch.cat([cond.image_emb, cond.pooled], dim=-1) if self.config.draft_text else cond.image_emb
            )
            draft = self.draft(read, size=tuple(x_t.shape[-2:]))  # (B, C, h, w)
            told = replace(
                told, concat=draft if told.concat is None else torch.cat([told.concat, draft], dim=1)
            )
        return self.unet(x_t, t, told)
