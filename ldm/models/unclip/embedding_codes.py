"""Embeddings as sequences of whole numbers: principal components, each cut into buckets (Ramesh et al. 2022,
section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EmbeddingCodes(nn.Module):
    """(B, E) ↔ (B, K) whole numbers in [0, buckets): the K components of the largest variance, in its order.

    Its numbers are buffers, measured by `fit` on embeddings and stored with the weights.
    """

    mean: Tensor
    basis: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, embed_dim: int, components: int, buckets: int) -> None:
        super().__init__()
        if not 1 <= components <= embed_dim or buckets < 2:
            raise ValueError(
                f"expected 1 to {embed_dim} components and at least 2 buckets, got {components} and {buckets}"
            )
        self.buckets = buckets
        self.register_buffer("mean", torch.empty(embed_dim))
        self.register_buffer("basis", torch.empty(components, embed_dim))
        self.register_buffer("low", torch.empty(components))
        self.register_buffer("high", torch.empty(components))
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """The embedding's first entries, each between −1 and 1, for codes that are fitted to nothing."""
        self.mean.zero_()
        self.basis.copy_(torch.eye(*self.basis.shape))
        self.low.fill_(-1)
        self.high.fill_(1)

    @torch.no_grad()
    def fit(self, embeddings: Tensor, *, outside: float = 1e-3) -> float:
        """Measure the components of embeddings (N, E), N > K; → the part of their variance that the K
        components keep, in [0, 1].

        ``outside``: the part of the values of a component at either end that falls into its first and last
        bucket.
        """
        e = embeddings.to("cpu", torch.float64)
        k = len(self.basis)
        if e.ndim != 2 or e.shape[1] != len(self.mean) or len(e) <= k:
            raise ValueError(f"embeddings: expected (N, {len(self.mean)}) with N > {k}, got {tuple(e.shape)}")
        mean = e.mean(0)
        _, s, v = torch.linalg.svd(e - mean, full_matrices=False)
        # the same on every machine
        sign = (
            torch.where(v[:k].abs().max(1).indices[:, None] == torch.arange(v.shape[1]), v[:k], 0)
            .sum(1)
            .sign()
        )
        basis = v[:k] * sign[:, None]  # (K, E)
        ordered = ((e - mean) @ basis.T).sort(dim=0).values  # (N, K)
        cut = int(outside * (len(e) - 1))
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        self.low.copy_(ordered[cut])
        self.high.copy_(ordered[len(e) - 1 - cut])
        return float(s[:k].square().sum() / s.square().sum())

    def project(self, embeddings: Tensor) -> Tensor:
        """(B, E) → the components (B, K)."""
        return (embeddings.to(self.mean.dtype) - self.mean) @ self.basis.T

    def restore(self, components: Tensor) -> Tensor:
        """The first k components (B, k) → embeddings (B, E), the others being their mean."""
        return components @ self.basis[: components.shape[1]] + self.mean

    def encode(self, embeddings: Tensor) -> Tensor:
        """(B, E) → whole numbers (B, K)."""
        place = (self.project(embeddings) - self.low) / (self.high - self.low)
        return (place * self.buckets).floor().long().clamp(0, self.buckets - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Whole numbers (B, K) → embeddings (B, E): the middles of the buckets."""
        return self.restore(self.low + (codes + 0.5) / self.buckets * (self.high - self.low))


def truncate(embeddings: Tensor, components: int, basis: EmbeddingCodes) -> Tensor:
    """Embeddings (B, E) of which all but the first components are replaced by their mean (Ramesh et al. 2022,
    figure 7)."""
    if not 0 <= components <= len(basis.basis):
        raise ValueError(f"components: expected 0 to {len(basis.basis)}, got {components}")
    return basis.restore(basis.project(embeddings)[:, :components])
