"""The autoregressive prior: an image embedding's components one after the other, as words (Ramesh et al.
2022, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.noise import keyed_normal
from ldm.models.unclip.embedding_codes import EmbeddingCodes
from ldm.models.unclip.prior_blocks import PlainStack


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """The shape of an autoregressive prior; the defaults are near the paper's (319 components of 1024, in
    1024 buckets).

    ``similarities``: buckets of the dot product of text and image, a token that the embedding's components
    follow.
    """

    embed_dim: int = 768
    text_dim: int = 768
    length: int = 77
    width: int = 2048
    layers: int = 24
    heads: int = 32
    head_dim: int = 64
    components: int = 319
    buckets: int = 1024
    similarities: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.components > self.embed_dim:
            raise ValueError(
                f"components: expected at most embed_dim {self.embed_dim}, got {self.components}"
            )


class AutoregressivePrior(nn.Module):
    """Text tokens, text embedding and similarity, then the components of an image embedding: each foretold
    from all before it."""

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.config = config
        c, width = config, config.width
        self.codes = EmbeddingCodes(c.embed_dim, c.components, c.buckets)
        self.text_proj = nn.Linear(c.text_dim, width)
        self.embedding_proj = nn.Linear(c.embed_dim, width)
        self.similarity = nn.Embedding(c.similarities, width)
        self.code = nn.Embedding(c.buckets, width)
        # the last component is never read
        self.position = nn.Parameter(0.01 * torch.randn(1, c.length + 1 + c.components, width))
        self.transformer = PlainStack(width, layers=c.layers, heads=c.heads, head_dim=c.head_dim)
        self.logits = nn.Linear(width, c.buckets)
        for table in (self.similarity, self.code):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, codes: Tensor, similarity: Tensor, cond: Cond) -> Tensor:
        """codes (B, k) for k = 0 … K − 1 known components, similarity (B,) in buckets → logits (B, k + 1,
        buckets) of 0 … k."""
        c = self.config
        if cond.context is None or cond.pooled is None or cond.context.shape[1:] != (c.length, c.text_dim):
            raise ValueError(
                f"this prior reads Cond.context of shape (B, {c.length}, {c.text_dim}) and Cond.pooled of (B,"
                f" {c.embed_dim})"
            )
        if codes.shape[1] >= c.components:
            raise ValueError(f"codes: expected less than the {c.components} components, got {codes.shape[1]}")
        parts = [
            self.text_proj(cond.context),
            self.embedding_proj(cond.pooled)[:, None],
            self.similarity(similarity)[:, None],
            self.code(codes),
        ]
        x = torch.cat(parts, dim=1)  # (B, L + 2 + k, W)
        mask = (
            None
            if cond.context_mask is None
            else F.pad(cond.context_mask, (0, x.shape[1] - c.length), value=True)
        )
        x = self.transformer(x + self.position[:, : x.shape[1]], mask)
        return self.logits(x[:, c.length + 1 :])

    def loss(self, image: Tensor, cond: Cond) -> Tensor:
        """Cross-entropy of the components of image embeddings (B, E), a number in nats for each sample:
        (B,)."""
        codes = self.codes.encode(image)
        logits = self(codes[:, :-1], self.bucket(image, cond), cond)
        return F.cross_entropy(logits.float().movedim(-1, 1), codes, reduction="none").mean(1)

    def bucket(self, image: Tensor, cond: Cond) -> Tensor:
        """The bucket of the cosine of text and image, (B,): equal parts of [−1, 1]."""
        assert cond.pooled is not None
        cosine = F.cosine_similarity(image.float(), cond.pooled.float(), dim=-1)
        return (
            ((cosine + 1) / 2 * self.config.similarities)
            .floor()
            .long()
            .clamp(0, self.config.similarities - 1)
        )

    @torch.no_grad()
    def sample(
        self,
        cond: Cond,
        seeds: Sequence[int],
        *,
        similarity: float = 0.5,
        temperature: float = 1.0,
        first: int = 0,
    ) -> Tensor:
        """Image embeddings (B, E) for a condition of batch B, as like the text as the cosine ``similarity``
        says.

        Component k of sample i depends on (seeds[i], ``first`` + k) alone, by the Gumbel trick.
        ``temperature`` 0 takes the likeliest. ValueError for a similarity outside [−1, 1], or a number of
        seeds that is not B.
        """
        c = self.config
        if not -1 <= similarity <= 1:
            raise ValueError(f"similarity: expected a cosine in [−1, 1], got {similarity}")
        if temperature < 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        if cond.batch != len(seeds):
            raise ValueError(f"{len(seeds)} seeds for a condition of batch size {cond.batch}")
        device = self.position.device
        bucket = min(int((similarity + 1) / 2 * c.similarities), c.similarities - 1)
        cond = cond.to(device, self.position.dtype)
        level = torch.full((len(seeds),), bucket, device=device)
        codes = torch.empty(len(seeds), 0, dtype=torch.long, device=device)
        for k in range(c.components):
            logits = self(codes, level, cond)[:, -1].float()
            if temperature > 0:
                logits = logits / temperature + torch.stack(
                    [gumbel(seed, first + k, c.buckets) for seed in seeds]
                ).to(device)
            codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], dim=1)
        return self.codes.decode(codes)


def gumbel(seed: int, k: int, n: int) -> Tensor:
    """n Gumbel numbers, float32: the largest of them added to logits is a draw from their softmax."""
    u = torch.special.ndtr(keyed_normal(seed, k, (n,)).double()).clamp(1e-12, 1 - 1e-12)
    return -torch.log(-torch.log(u)).float()
