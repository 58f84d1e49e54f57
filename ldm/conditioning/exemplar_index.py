"""The images of a library as CLIP sees them, among which an image embedding finds its nearest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.clip import ClipPair
from ldm.conditioning.exemplar_library import Exemplar, ExemplarLibrary
from ldm.models.layout import ThingLayout, multiplied, place_exemplars

SHOWN_SIDE = 0.85  # of an exemplar on its canvas, the mean of things at full size in training scenes
BATCH = 64
RIDGE = 1e-6  # added to the variances of a metric, of embeddings of length 1


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneMetric:
    """How embeddings are compared, so that a thing is found again in another scene.

    The background, the place and the color of a thing change its embedding more than another thing of the
    same kind does. The directions in which they do are divided by their standard deviations (within-class
    covariance normalization, Hatch et al. 2006).

    Attributes:
        offset: Mean difference of an embedding in a scene from that on white, (E,).
        weight: The whitening of these differences, (E, E).
        center: The mean of the library's whitened embeddings, (E,).
    """

    offset: Tensor
    weight: Tensor
    center: Tensor

    @classmethod
    def fit(cls, vectors: Tensor, differences: Tensor) -> SceneMetric:
        """Return the metric of a library.

        Args:
            vectors: Embeddings of its images on white, of length 1, (N, E).
            differences: Embeddings of scenes, of length 1, minus those of their things on white, (n, E).
        """
        offset = differences.mean(0)
        covariance = torch.cov(differences.T) + RIDGE * torch.eye(
            len(offset), dtype=offset.dtype, device=offset.device
        )
        variances, directions = torch.linalg.eigh(covariance)
        weight = directions * variances.rsqrt()
        return cls(offset=offset, weight=weight, center=((vectors + offset) @ weight).mean(0))

    def keys(self, vectors: Tensor) -> Tensor:
        """Return what embeddings on white (N, E), of length 1, are compared by, (N, E) of length 1."""
        return self.query(vectors + self.offset)

    def query(self, vectors: Tensor) -> Tensor:
        """Return what embeddings of scenes (N, E), of length 1, are compared by, (N, E) of length 1."""
        return F.normalize(vectors @ self.weight - self.center, dim=-1)


class ExemplarIndex:
    """CLIP's embeddings of the images of a library, each on white.

    The embeddings of images that are added to the library are computed when they are first needed. Those that
    are there, and the metric, belong to the CLIP that was loaded, and stay if its weights are changed.

    Args:
        library: The library.
        clip: The CLIP that embeds its images.
        vectors: The embeddings of the library's images, in its order, (N, E); None to compute all of them
            when they are first needed. Default: None.
        metric: How they are compared; None for the cosine. Default: None.

    Raises:
        ValueError: If there is another number of embeddings, or they have another width.
    """

    def __init__(
        self,
        library: ExemplarLibrary,
        clip: ClipPair,
        vectors: Tensor | None = None,
        metric: SceneMetric | None = None,
    ) -> None:
        if vectors is not None and vectors.shape != (len(library), clip.width):
            raise ValueError(
                f"embeddings of shape {tuple(vectors.shape)}: expected ({len(library)}, {clip.width}), a row"
                " for each exemplar"
            )
        self.library = library
        self.clip = clip
        self.metric = metric
        self._vectors: dict[Exemplar, Tensor] = {}
        if vectors is not None:
            self._vectors = dict(zip(library, F.normalize(vectors.float(), dim=-1), strict=True))

    def vectors(self, exemplars: Iterable[Exemplar] | None = None) -> Tensor:
        """Return the embeddings of exemplars, (N, E) float32 of length 1.

        Args:
            exemplars: The exemplars. Default: all of the library, in its order.
        """
        wanted = list(self.library if exemplars is None else exemplars)
        absent = [exemplar for exemplar in dict.fromkeys(wanted) if exemplar not in self._vectors]
        for start in range(0, len(absent), BATCH):
            part = absent[start : start + BATCH]
            self._vectors |= zip(part, self._embedded(part), strict=True)
        return torch.stack([self._vectors[exemplar] for exemplar in wanted])

    def nearest(self, vector: Tensor, exemplars: Iterable[Exemplar] | None = None) -> Exemplar:
        """Return the exemplar that is most similar to an image embedding, by the metric.

        Args:
            vector: The embedding, (E,).
            exemplars: Those to choose from, at least one. Default: all of the library.
        """
        among = list(self.library if exemplars is None else exemplars)
        keys = self.vectors(among)
        query = F.normalize(vector.to(keys), dim=-1)
        if self.metric is not None:
            keys, query = self.metric.keys(keys), self.metric.query(query)
        return among[int((keys @ query).argmax())]

    @torch.no_grad()
    def _embedded(self, exemplars: list[Exemplar]) -> Iterator[Tensor]:
        """Return the embeddings of exemplars, each (E,) float32 of length 1, on the CPU."""
        images = torch.stack([self.library.pixels(exemplar) for exemplar in exemplars])  # (B, 4, S, S)
        embedded = self.clip.image_embedding(on_white(images, self.library.size)).unit().vector
        return iter(embedded.float().cpu())


def on_white(images: Tensor, size: int) -> Tensor:
    """Return exemplars (B, 4, S, S) in the middle of white images (B, 3, size, size), in [0, 1]."""
    places = images.new_tensor([0.5, 0.5, SHOWN_SIDE, 0.0]).expand(len(images), 1, 4)
    owner = torch.zeros(len(images), 1, dtype=torch.int64, device=images.device)
    layout = ThingLayout(places=places, owner=owner)
    canvas = place_exemplars(multiplied(images)[:, None], layout, (size, size))[:, 0]  # (B, 4, H, W)
    return canvas[:, :3] + 1 - canvas[:, 3:]
