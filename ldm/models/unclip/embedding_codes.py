"""Embeddings as sequences of integers (Ramesh et al. 2022, section 2.2).

An embedding is projected to its principal components, and each component is quantized to buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EmbeddingCodes(nn.Module):
    """Conversion between embeddings (B, E) and codes (B, K), integers in [0, buckets).

    The codes are the K principal components of largest variance, in this order. The buffers are measured with
    `fit` and stored with the weights.

    Args:
        embed_dim: Width E of the embedding.
        components: Number K of components, at most E.
        buckets: Number of buckets of a component, at least 2.

    Attributes:
        mean: Mean of the embeddings, shape (E,).
        basis: Principal directions, shape (K, E).
        low: Lower end of the first bucket of each component, shape (K,).
        high: Upper end of the last bucket of each component, shape (K,).

    Raises:
        ValueError: If a number is out of range.
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
        """Use the first K entries of the embedding as components, in [−1, 1]."""
        self.mean.zero_()
        self.basis.copy_(torch.eye(*self.basis.shape, device=self.basis.device, dtype=self.basis.dtype))
        self.low.fill_(-1)
        self.high.fill_(1)

    @torch.no_grad()
    def fit(self, embeddings: Tensor, *, outside: float = 1e-3) -> float:
        """Measure the principal components and their ranges.

        Args:
            embeddings: Shape (N, E), with N > K.
            outside: Fraction of the values below `low`, and above `high`, of a component. Default: 0.001.

        Returns:
            The fraction of the variance that the K components keep, in [0, 1].

        Raises:
            ValueError: If the embeddings have another shape, or less than K components vary.
        """
        e = embeddings.to("cpu", torch.float64)  # (N, E)
        k = len(self.basis)
        if e.ndim != 2 or e.shape[1] != len(self.mean) or len(e) <= k:
            raise ValueError(f"embeddings: expected (N, {len(self.mean)}) with N > {k}, got {tuple(e.shape)}")
        mean = e.mean(0)  # (E,)
        _, s, v = torch.linalg.svd(e - mean, full_matrices=False)
        # the sign of the largest entry, so that the basis is the same on every machine; (K,)
        sign = (
            torch.where(
                v[:k].abs().max(1).indices[:, None] == torch.arange(v.shape[1], device=v.device), v[:k], 0
            )
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
        if constant := int((self.high <= self.low).sum()):
            raise ValueError(f"embeddings: expected {k} components that vary, got {k - constant}")
        return float(s[:k].square().sum() / s.square().sum())

    def project(self, embeddings: Tensor) -> Tensor:
        """Return the components (B, K) of embeddings (B, E)."""
        return (embeddings.to(self.mean.dtype) - self.mean) @ self.basis.T

    def restore(self, components: Tensor) -> Tensor:
        """Return embeddings (B, E) of the first k components (B, k); the others are set to their mean."""
        return components @ self.basis[: components.shape[1]] + self.mean

    def encode(self, embeddings: Tensor) -> Tensor:
        """Return the codes (B, K) of embeddings (B, E), int64."""
        place = (self.project(embeddings) - self.low) / (self.high - self.low)  # (B, K)
        return (place * self.buckets).floor().long().clamp(0, self.buckets - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Return embeddings (B, E) of codes (B, K): the centres of the buckets."""
        return self.restore(self.low + (codes.float() + 0.5) / self.buckets * (self.high - self.low))


def truncate(embeddings: Tensor, components: int, basis: EmbeddingCodes) -> Tensor:
    """Return embeddings whose other components are replaced by their mean (Ramesh et al. 2022, figure 7).

    Args:
        embeddings: Shape (B, E).
        components: Number of first components that are kept, in [0, K].
        basis: The principal components.

    Returns:
        Shape (B, E).

    Raises:
        ValueError: If `components` is out of range.
    """
    if not 0 <= components <= len(basis.basis):
        raise ValueError(f"components: expected 0 to {len(basis.basis)}, got {components}")
    return basis.restore(basis.project(embeddings)[:, :components])
