"""The diffusion prior: from a text's CLIP embedding to an image's (Ramesh et al. 2022, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.layers.embeddings import VectorMLP, sinusoid
from ldm.models.unclip.prior_blocks import CosineStack, PlainStack

EXTRA = 4  # tokens behind the text: text embedding, time, noisy image embedding, learned query


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The shape of a prior; the defaults are Karlo's, and Kandinsky 2.1's.

    ``embed_dim``: E of image and text embeddings; ``text_dim``: width of a text token; ``length``: L, text
    tokens, always as many. ``blocks``: "plain" for a GPT's, with learned positions (Karlo, Kandinsky);
    "cosine" for those of DALLE2-pytorch, whose width is E and whose missing tokens are learned
    (``cosine_sim``: whether queries and keys are of one length, which its keys do not tell; ``norm_mlp``: a
    norm inside the MLP). ``timesteps``: the size of a table of times, None for a sinusoid and an MLP.

    ``normalize``: the space that the diffusion runs in: "statistics", embeddings less their mean, over their
    deviation (both in the weights); "unit", embeddings of length √E.
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
        for name in ("embed_dim", "text_dim", "length", "width", "layers", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.blocks not in ("plain", "cosine"):
            raise ValueError(f'blocks: expected "plain" or "cosine", got {self.blocks!r}')
        if self.normalize not in ("statistics", "unit"):
            raise ValueError(f'normalize: expected "statistics" or "unit", got {self.normalize!r}')
        if self.blocks == "cosine" and not self.embed_dim == self.text_dim == self.width:
            raise ValueError(
                f"cosine blocks take all tokens as they are: expected one width, got {self.embed_dim},"
                f" {self.text_dim}, {self.width}"
            )


class Prior(nn.Module):
    """net(x_t, t, cond) → x0 for embeddings x_t (B, E): a causal transformer over text, text embedding, time,
    x_t and a learned query.

    `Cond.context` (B, L, D) are the text's token states with their mask, `Cond.pooled` (B, E) its embedding,
    not of length 1.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        c, width = config, config.width
        self.time_embedding: nn.Module = (
            VectorMLP(width, width) if c.timesteps is None else nn.Embedding(c.timesteps, width)
        )
        self.transformer: nn.Module
        if c.blocks == "plain":
            # the learned query, under the name it was published by
            self.prd_embedding = nn.Parameter(torch.empty(1, 1, width))
            self.proj_in = nn.Linear(c.embed_dim, width)
            self.embedding_proj = nn.Linear(c.embed_dim, width)
            self.encoder_hidden_states_proj = nn.Linear(c.text_dim, width)
            self.positional_embedding = nn.Parameter(torch.empty(1, c.length + EXTRA, width))
            self.transformer = PlainStack(width, layers=c.layers, heads=c.heads, head_dim=c.head_dim)
            self.proj_to_clip_embeddings = nn.Linear(width, c.embed_dim)
            nn.init.normal_(self.positional_embedding, std=0.01)
            nn.init.normal_(self.prd_embedding, std=0.02)
        else:
            self.learned_query = nn.Parameter(torch.empty(width))
            self.null_text_encodings = nn.Parameter(torch.empty(1, c.length, width))
            self.null_text_embeds = nn.Parameter(torch.empty(1, 1, width))
            # of training that drops the image, which sampling never does
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
        if c.normalize == "statistics":
            self.register_buffer("clip_mean", torch.zeros(1, c.embed_dim))
            self.register_buffer("clip_std", torch.ones(1, c.embed_dim))

    def reset_buffers(self) -> None:
        """Statistics that change nothing, for a prior without trained weights."""
        if self.config.normalize == "statistics":
            self.clip_mean.zero_()
            self.clip_std.fill_(1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t (B, E) and t (B,) in timesteps → x0 (B, E); ValueError for a condition that is missing or of
        another shape."""
        self.check(x_t, cond)
        text, pooled = self.text(cond)  # (B, L, W), (B, 1, W)
        times = self.times(t, x_t.dtype)[:, None]  # (B, 1, W)
        plain = self.config.blocks == "plain"
        image = (self.proj_in(x_t) if plain else x_t)[:, None]  # (B, 1, W)
        query = self.prd_embedding if plain else self.learned_query[None, None]
        x = torch.cat([text, pooled, times, image, query.expand(len(x_t), -1, -1)], dim=1)  # (B, L + 4, W)
        mask = None
        if plain:
            x = x + self.positional_embedding
            mask = None if cond.context_mask is None else F.pad(cond.context_mask, (0, EXTRA), value=True)
        return self.proj_to_clip_embeddings(self.transformer(x, mask)[:, -1])

    def text(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """The tokens of the text and of its embedding, as the transformer takes them; absent ones are learned
        in the cosine kind."""
        context, pooled, mask = cond.context, cond.pooled, cond.context_mask
        assert context is not None and pooled is not None
        if self.config.blocks == "plain":
            return self.encoder_hidden_states_proj(context), self.embedding_proj(pooled)[:, None]
        if mask is not None:  # padding is not hidden from attention but replaced
            context = torch.where(mask[..., None], context, self.null_text_encodings.to(context.dtype))
            # (B, 1, 1) no text at all: its embedding is a learned one too
            nothing = ~mask.any(dim=1)[:, None, None]
            return context, torch.where(nothing, self.null_text_embeds.to(pooled.dtype), pooled[:, None])
        return context, pooled[:, None]

    def times(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The time's token, (B, W)."""
        if self.config.timesteps is None:
            return self.time_embedding(sinusoid(t, self.config.width).to(dtype))
        return self.time_embedding(t.round().long())

    def check(self, x_t: Tensor, cond: Cond) -> None:
        """ValueError for an embedding or condition that this network cannot take, or lacks."""
        c = self.config
        if x_t.ndim != 2 or x_t.shape[1] != c.embed_dim:
            raise ValueError(f"this prior makes embeddings {c.embed_dim} wide, got {tuple(x_t.shape)}")
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
        """The condition of no text for the cosine kind, whose absent tokens are learned; the plain kind reads
        the empty text instead."""
        c = self.config
        if c.blocks != "cosine":
            raise ValueError(
                "a prior with plain blocks has no learned condition of no text: give it the empty text's"
            )
        context = torch.zeros(n, c.length, c.text_dim, device=device)
        return Cond(
            context=context,
            context_mask=torch.zeros(n, c.length, dtype=torch.bool, device=device),
            pooled=context[:, 0],
        )

    def normalize(self, embedding: Tensor) -> Tensor:
        """CLIP's embeddings (B, E) → what the diffusion runs on; those of "unit" kind are scaled whatever
        their length."""
        if self.config.normalize == "unit":
            return F.normalize(embedding, dim=-1) * self.config.embed_dim**0.5
        return (embedding - self.clip_mean) / self.clip_std

    def denormalize(self, x: Tensor) -> Tensor:
        """What the diffusion made (B, E) → embeddings as CLIP gives them; those of "unit" kind are of length
        about 1."""
        if self.config.normalize == "unit":
            return x / self.config.embed_dim**0.5
        return x * self.clip_std + self.clip_mean
