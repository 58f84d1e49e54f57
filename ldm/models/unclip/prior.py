"""The diffusion prior of unCLIP (Ramesh et al. 2022, section 2.2).

It maps the CLIP embedding of a text to that of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.checks import check_positive
from ldm.models.layers.embeddings import VectorMLP, sinusoid
from ldm.models.unclip.prior_blocks import CosineStack, PlainStack

EXTRA = 4  # tokens after the text: text embedding, time, noisy image embedding, learned query


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Shape of a prior; the defaults are those of Karlo and Kandinsky 2.1.

    Args:
        embed_dim: Width E of image and text embeddings. Default: 768.
        text_dim: Width D of a text token. Default: 768.
        length: Number L of text tokens, padding included. Default: 77.
        width: Width W of the transformer. Default: 2048.
        layers: Number of transformer blocks. Default: 20.
        heads: Number of attention heads. Default: 32.
        head_dim: Channels of a head. Default: 64.
        blocks: "plain" for the blocks of a GPT with learned positions (Karlo, Kandinsky). "cosine" for the
            blocks of DALLE2-pytorch, which require E = D = W and learn embeddings for missing tokens.
            Default: "plain".
        timesteps: Size of an embedding table of timesteps. None for a sinusoid and an MLP. Default: None.
        normalize: Space of the diffusion. "statistics": embeddings minus their mean, divided by their
            standard deviation, which are stored with the weights. "unit": embeddings of length √E.
            Default: "statistics".
        cosine_sim: For "cosine" blocks, whether queries and keys are normalized; the names of the weights do
            not tell. Default: True.
        norm_mlp: For "cosine" blocks, whether the MLP has a norm inside. Default: True.

    Raises:
        ValueError: If an argument is out of range, or the widths do not fit the blocks.
    """

    embed_dim: int = 768
    text_dim: int = 768
    length: int = 77
    width: int = 2048
    layers: int = 20
    heads: int = 32
    head_dim: int = 64
    blocks: Literal["plain", "cosine"] = "plain"
    timesteps: int | None = None
    normalize: Literal["statistics", "unit"] = "statistics"
    cosine_sim: bool = True
    norm_mlp: bool = True

    def __post_init__(self) -> None:
        check_positive(
            embed_dim=self.embed_dim,
            text_dim=self.text_dim,
            length=self.length,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            head_dim=self.head_dim,
        )
        if self.blocks not in ("plain", "cosine"):
            raise ValueError(f'blocks: expected "plain" or "cosine", got {self.blocks!r}')
        if self.normalize not in ("statistics", "unit"):
            raise ValueError(f'normalize: expected "statistics" or "unit", got {self.normalize!r}')
        if self.blocks == "cosine" and not self.embed_dim == self.text_dim == self.width:
            raise ValueError(
                "cosine blocks do not project their tokens: expected one width for embed_dim, text_dim and"
                f" width, got {self.embed_dim}, {self.text_dim} and {self.width}"
            )


class Prior(nn.Module):
    """The network `net(x_t, t, cond)` that predicts x0 of image embeddings.

    A causal transformer reads the text tokens `Cond.context` (B, L, D), the text embedding `Cond.pooled`
    (B, E), which is not normalized, the time, x_t, and a learned query, whose output is the prediction.

    Attributes:
        clip_mean: Mean of image embeddings, shape (1, E), if `normalize` is "statistics".
        clip_std: Their standard deviation, shape (1, E), if `normalize` is "statistics".
    """

    clip_mean: Tensor
    clip_std: Tensor

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        c, width = config, config.width
        self.time_embedding: nn.Module = (
            VectorMLP(width, width) if c.timesteps is None else nn.Embedding(c.timesteps, width)
        )
        self.transformer: PlainStack | CosineStack
        if c.blocks == "plain":
            self._init_plain(c)
        else:
            self._init_cosine(c)
        if c.normalize == "statistics":
            self.register_buffer("clip_mean", torch.zeros(1, c.embed_dim))
            self.register_buffer("clip_std", torch.ones(1, c.embed_dim))

    def _init_plain(self, c: PriorConfig) -> None:
        width = c.width
        # the learned query, under its published name
        self.prd_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.proj_in = nn.Linear(c.embed_dim, width)
        self.embedding_proj = nn.Linear(c.embed_dim, width)
        self.encoder_hidden_states_proj = nn.Linear(c.text_dim, width)
        self.positional_embedding = nn.Parameter(torch.empty(1, c.length + EXTRA, width))
        self.transformer = PlainStack(width, layers=c.layers, heads=c.heads, head_dim=c.head_dim)
        self.proj_to_clip_embeddings = nn.Linear(width, c.embed_dim)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.prd_embedding, std=0.02)

    def _init_cosine(self, c: PriorConfig) -> None:
        width = c.width
        self.learned_query = nn.Parameter(torch.empty(width))
        self.null_text_encodings = nn.Parameter(torch.empty(1, c.length, width))
        self.null_text_embeds = nn.Parameter(torch.empty(1, 1, width))
        # used by trainings that drop the image, never by sampling
        self.null_image_embed = nn.Parameter(torch.empty(1, width))
        self.transformer = CosineStack(
            width,
            layers=c.layers,
            heads=c.heads,
            head_dim=c.head_dim,
            cosine_sim=c.cosine_sim,
            norm_mlp=c.norm_mlp,
        )
        self.proj_to_clip_embeddings = nn.Linear(width, c.embed_dim, bias=False)
        for null in (
            self.learned_query,
            self.null_text_encodings,
            self.null_text_embeds,
            self.null_image_embed,
        ):
            nn.init.normal_(null, std=0.02)

    def reset_buffers(self) -> None:
        """Set the mean to 0 and the standard deviation to 1, for a prior without trained weights."""
        if self.config.normalize == "statistics":
            self.clip_mean.zero_()
            self.clip_std.fill_(1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the prediction of x0.

        Args:
            x_t: Noisy embeddings in the space of the diffusion, shape (B, E).
            t: Timesteps, shape (B,).
            cond: `context` (B, L, D) with its mask, and `pooled` (B, E).

        Returns:
            Shape (B, E).

        Raises:
            ValueError: If x_t or the condition has another shape; see `check`.
        """
        self.check(x_t, cond)
        text, pooled = self.text(cond)  # (B, L, W), (B, 1, W)
        times = self.times(t, x_t.dtype)[:, None]  # (B, 1, W)
        plain = self.config.blocks == "plain"
        image = (self.proj_in(x_t) if plain else x_t)[:, None]  # (B, 1, W)
        query = self.prd_embedding if plain else self.learned_query[None, None]  # (1, 1, W)
        x = torch.cat([text, pooled, times, image, query.expand(len(x_t), -1, -1)], dim=1)  # (B, L + 4, W)
        mask = None
        if plain:
            x = x + self.positional_embedding  # (B, L + 4, W)
            # (B, L + 4)
            mask = None if cond.context_mask is None else F.pad(cond.context_mask, (0, EXTRA), value=True)
        return self.proj_to_clip_embeddings(self.transformer(x, mask)[:, -1])

    def text(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """Return the transformer's text tokens (B, L, W) and text-embedding token (B, 1, W).

        "cosine" blocks replace masked tokens by learned ones, and the text embedding too if all are masked.
        """
        context, pooled, mask = cond.context, cond.pooled, cond.context_mask
        assert context is not None and pooled is not None
        if self.config.blocks == "plain":
            return self.encoder_hidden_states_proj(context), self.embedding_proj(pooled)[:, None]
        if mask is None:
            return context, pooled[:, None]
        # (B, L, W)
        context = torch.where(mask[..., None], context, self.null_text_encodings.to(context.dtype))
        nothing = ~mask.any(dim=1)[:, None, None]  # (B, 1, 1)
        return context, torch.where(nothing, self.null_text_embeds.to(pooled.dtype), pooled[:, None])

    def times(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the time token (B, W) of timesteps t (B,)."""
        if self.config.timesteps is None:
            return self.time_embedding(sinusoid(t, self.config.width).to(dtype))
        return self.time_embedding(t.round().long())

    def check(self, x_t: Tensor, cond: Cond) -> None:
        """Raise ValueError if x_t or a field of the condition has another shape, or is missing."""
        c = self.config
        if x_t.ndim != 2 or x_t.shape[1] != c.embed_dim:
            raise ValueError(
                f"this prior predicts embeddings {c.embed_dim} wide, got x_t of shape {tuple(x_t.shape)}"
            )
        for name, value, shape in (
            ("context", cond.context, (c.length, c.text_dim)),
            ("pooled", cond.pooled, (c.embed_dim,)),
        ):
            if value is None or tuple(value.shape[1:]) != shape:
                got = None if value is None else tuple(value.shape)
                raise ValueError(
                    f"this prior reads Cond.{name} of shape (B, {', '.join(map(str, shape))}), got {got}"
                )

    def unconditional(self, n: int, *, device: torch.device | None = None) -> Cond:
        """Return the learned condition of no text, with batch size n, for a prior with "cosine" blocks.

        Raises:
            ValueError: If the blocks are "plain", whose unconditional input is the empty text.
        """
        c = self.config
        if c.blocks != "cosine":
            raise ValueError(
                "a prior with plain blocks has no learned condition of no text: pass that of the empty text"
            )
        context = torch.zeros(n, c.length, c.text_dim, device=device, dtype=torch.float32)
        return Cond(
            context=context,
            context_mask=torch.zeros(n, c.length, dtype=torch.bool, device=device),
            pooled=context[:, 0],
        )

    def normalize(self, embedding: Tensor) -> Tensor:
        """Return CLIP embeddings (B, E) in the space of the diffusion; "unit" ignores their length."""
        if self.config.normalize == "unit":
            return F.normalize(embedding, dim=-1) * self.config.embed_dim**0.5
        return (embedding - self.clip_mean) / self.clip_std

    def denormalize(self, x: Tensor) -> Tensor:
        """Return samples of the diffusion (B, E) as CLIP embeddings; with "unit" their length is about 1."""
        if self.config.normalize == "unit":
            return x / self.config.embed_dim**0.5
        return x * self.clip_std + self.clip_mean
