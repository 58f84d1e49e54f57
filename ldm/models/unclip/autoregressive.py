"""The autoregressive prior of unCLIP (Ramesh et al. 2022, section 2.2).

It predicts the components of an image embedding one after the other, as tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.diffusion.noise import keyed_normal
from ldm.models.checks import check_positive
from ldm.models.unclip.embedding_codes import EmbeddingCodes
from ldm.models.unclip.prior_blocks import PlainStack
from ldm.support.calls import checkpoint
from ldm.support.device import computing_dtype


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig:
    """Shape of an autoregressive prior; the defaults are close to the paper's.

    The paper has 319 components of a 1024-dimensional embedding, in 1024 buckets.

    Args:
        embed_dim: Width E of image and text embeddings. Default: 768.
        text_dim: Width D of a text token. Default: 768.
        length: Number L of text tokens. Default: 77.
        width: Width W of the transformer. Default: 2048.
        layers: Number of transformer blocks. Default: 24.
        heads: Number of attention heads. Default: 32.
        head_dim: Channels of a head. Default: 64.
        components: Number K of components, at most E. Default: 319.
        buckets: Number of buckets of a component. Default: 1024.
        similarities: Buckets of the cosine of text and image, a token that precedes the components.
            Default: 64.

    Raises:
        ValueError: If a number is out of range.
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
        check_positive(**vars(self))
        if self.components > self.embed_dim:
            raise ValueError(
                f"components: expected at most embed_dim {self.embed_dim}, got {self.components}"
            )


class AutoregressivePrior(nn.Module):
    """Causal transformer over text tokens, text embedding, similarity, and codes of an image embedding."""

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.config = config
        c, width = config, config.width
        self.codes = EmbeddingCodes(c.embed_dim, c.components, c.buckets)
        self.text_proj = nn.Linear(c.text_dim, width)
        self.embedding_proj = nn.Linear(c.embed_dim, width)
        self.similarity = nn.Embedding(c.similarities, width)
        self.code = nn.Embedding(c.buckets, width)
        # the last component is predicted, but not read
        self.position = nn.Parameter(0.01 * torch.randn(1, c.length + 1 + c.components, width))
        self.transformer = PlainStack(width, layers=c.layers, heads=c.heads, head_dim=c.head_dim)
        self.logits = nn.Linear(width, c.buckets)
        for table in (self.similarity, self.code):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, codes: Tensor, similarity: Tensor, cond: Cond) -> Tensor:
        """Return the logits of the known components and of the next one.

        Args:
            codes: The first k components, int64, shape (B, k), with 0 ≤ k < K.
            similarity: Bucket of the similarity, int64, shape (B,).
            cond: `context` (B, L, D) with its mask, and `pooled` (B, E).

        Returns:
            Logits of components 0 to k, shape (B, k + 1, buckets).

        Raises:
            ValueError: If the condition or the codes have another shape.
        """
        c = self.config
        if cond.context is None or cond.pooled is None or cond.context.shape[1:] != (c.length, c.text_dim):
            raise ValueError(
                f"this prior reads Cond.context of shape (B, {c.length}, {c.text_dim}) and Cond.pooled of"
                f" shape (B, {c.embed_dim})"
            )
        if codes.shape[1] >= c.components:
            raise ValueError(f"codes: expected less than {c.components} components, got {codes.shape[1]}")
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
        )  # (B, L + 2 + k)
        x = self.transformer(x + self.position[:, : x.shape[1]], mask)  # (B, L + 2 + k, W)
        return self.logits(x[:, c.length + 1 :])

    def loss(self, image: Tensor, cond: Cond) -> Tensor:
        """Return the cross-entropy of the components of image embeddings (B, E), in nats, shape (B,)."""
        codes = self.codes.encode(image)  # (B, K)
        logits = self(codes[:, :-1], self.bucket(image, cond), cond)  # (B, K, buckets)
        return F.cross_entropy(logits.float().movedim(-1, 1), codes, reduction="none").mean(1)

    def bucket(self, image: Tensor, cond: Cond) -> Tensor:
        """Return the bucket (B,) of the cosine of image (B, E) and text, among equal parts of [−1, 1]."""
        assert cond.pooled is not None
        cosine = F.cosine_similarity(image.float(), cond.pooled.float(), dim=-1)  # (B,)
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
        """Return sampled image embeddings (B, E).

        Component k of sample i depends only on (seeds[i], `first` + k), by the Gumbel-max trick.

        Args:
            cond: Condition with batch size B.
            seeds: B seeds.
            similarity: Cosine of text and image that is requested, in [−1, 1]. Default: 0.5.
            temperature: Divisor of the logits; 0 takes the most probable bucket. Default: 1.
            first: Key of the random numbers of component 0. Default: 0.

        Raises:
            ValueError: If `similarity` or `temperature` is out of range, or the number of seeds is not B.
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
        cond = cond.to(device, computing_dtype(self))
        level = torch.full((len(seeds),), bucket, device=device)  # (B,)
        codes = torch.empty(len(seeds), 0, dtype=torch.long, device=device)  # (B, 0)
        for k in range(c.components):
            checkpoint(k + 1, c.components)
            logits = self(codes, level, cond)[:, -1].float()  # (B, buckets)
            if temperature > 0:
                # (B, buckets)
                logits = logits / temperature + torch.stack(
                    [gumbel(seed, first + k, c.buckets) for seed in seeds]
                ).to(device)
            codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], dim=1)  # (B, k + 1)
        return self.codes.decode(codes)


def gumbel(seed: int, k: int, n: int) -> Tensor:
    """Return n Gumbel random numbers of the key (seed, k), float32.

    The position of the largest sum of logits and Gumbel numbers is a sample from the softmax of the logits.
    """
    u = torch.special.ndtr(keyed_normal(seed, k, (n,)).double()).clamp(1e-12, 1 - 1e-12)  # (n,)
    return -torch.log(-torch.log(u)).float()
