"""Compare a set of generated images with a set of reference images by every metric."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.analysis.metrics.bootstrap import Bootstrap, Estimate
from ldm.analysis.metrics.features import FeatureExtractor, extract
from ldm.analysis.metrics.frechet import check_features, frechet_curve, frechet_estimate
from ldm.analysis.metrics.kernels import clip_discrepancy_estimate, kernel_estimate
from ldm.analysis.metrics.manifold import manifold_estimates, mean_estimate, nearest_images, realism
from ldm.support.config import nearest

METRICS = ("fid", "kid", "cmmd", "precision", "recall", "clip_score")
PACKAGES = ("torchmetrics", "torch_fidelity")
SHOWN_MATCHES = 8  # best and worst images in a report


class ImageSet(Protocol):
    """A set of images, read as often as needed."""

    @property
    def name(self) -> str:
        """What the set is, for the report."""

    def __len__(self) -> int:
        """Return the number of images."""

    def images(self, indices: Sequence[int] | None = None) -> Iterator[Tensor]:
        """Yield images (3, H, W) float32 in [0, 1], in the order of their numbers.

        Args:
            indices: The numbers of the images, rising; None for all. Default: None.
        """

    def captions(self) -> list[str] | None:
        """Return the caption of each image; None if an image has none."""

    def labels(self) -> list[str]:
        """Return a short name of each image, such as that of its file."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """A generated image with the reference image nearest to it.

    Args:
        generated: Its number.
        reference: The number of the reference image.
        distance: Distance of their features.
        realism: Realism of the generated image; infinite for a copy.
    """

    generated: int
    reference: int
    distance: float
    realism: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How two sets lie to each other in the space of some features.

    Args:
        features: Name of the features.
        preprocessing: What is done to an image before the network.
        curve: Fréchet distances at growing numbers of generated images: (number, distance) for each.
        to_reference: Distance of each generated image to the nearest reference image, rising.
        within_reference: Distance of each reference image to the nearest other one, rising.
        closer: Share of generated images that are nearer to a reference image than that one is to any other
            (one minus the authenticity of Alaa et al. 2022): about a half for new images of one
            distribution, 1 for copies.
        best: The generated images of highest realism.
        worst: The generated images of lowest realism.
    """

    features: str
    preprocessing: str
    curve: list[tuple[int, float]]
    to_reference: list[float]
    within_reference: list[float]
    closer: float
    best: list[Match]
    worst: list[Match]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of a set of generated images.

    Args:
        generated: What the generated set is.
        reference: What the reference set is; None if there is none.
        estimates: The metrics.
        comparisons: For each of the features, how the sets lie; empty without a reference.
    """

    generated: str
    reference: str | None
    estimates: list[Estimate]
    comparisons: list[Comparison]

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as JSON can hold it."""
        return asdict(self)

    def table(self) -> str:
        """Return the metrics as lines of text."""
        lines = [f"{'metric':<11} {'features':<16} {'value':>10}  {'interval':<23} {'n':>6} {'of':>6}"]
        for each in self.estimates:
            interval = f"[{each.low:.5g}, {each.high:.5g}]"
            of = "" if each.reference is None else str(each.reference)
            lines.append(
                f"{each.metric:<11} {each.features:<16} {each.value:>10.5g}  {interval:<23}"
                f" {each.generated:>6} {of:>6}"
            )
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """Return what limits the metrics, each once."""
        return list(dict.fromkeys(text for each in self.estimates for text in each.warnings))


def evaluate(
    generated: ImageSet,
    reference: ImageSet | None,
    extractors: Sequence[FeatureExtractor],
    *,
    metrics: Sequence[str] = METRICS,
    bootstrap: Bootstrap | None = None,
    batch: int = 32,
) -> Evaluation:
    """Compute metrics of generated images, each with its interval.

    CMMD is computed for features of a CLIP, and the CLIP score where a CLIP has a text tower and the
    generated images have captions.

    Args:
        generated: The generated images.
        reference: The images to compare with; None for the CLIP score alone.
        extractors: The features.
        metrics: Which metrics, of `METRICS`. Default: all.
        bootstrap: How intervals are computed. Default: 200 resamples, level 0.95.
        batch: Images per call of a network. Default: 32.

    Raises:
        ModuleNotFoundError: If a package is absent; the message states how to install it.
        ValueError: If a metric is unknown, none can be computed, or a set has too few images.
    """
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metric {name!r}; {nearest(name, METRICS)}")
    if reference is not None:
        check_packages()
    bootstrap = bootstrap or Bootstrap()
    estimates: list[Estimate] = []
    comparisons: list[Comparison] = []
    for extractor in extractors:
        x = extract(generated.images(), extractor, batch=batch)
        if reference is not None:
            y = extract(reference.images(), extractor, batch=batch)
            check_features(x, y)
            estimates += distances(x, y, extractor, metrics, bootstrap)
            comparisons.append(compare(x, y, extractor))
        if "clip_score" in metrics and (score := clip_scores(x, generated, extractor)) is not None:
            estimates.append(mean_estimate(score, "clip_score", extractor.name, bootstrap))
    if not estimates:
        raise ValueError(
            f"no metric of {', '.join(metrics)} can be computed: distances need reference images, CMMD a"
            " CLIP, and the CLIP score a CLIP with a text tower and captions"
        )
    return Evaluation(
        generated=generated.name,
        reference=None if reference is None else reference.name,
        estimates=estimates,
        comparisons=comparisons,
    )


def check_packages() -> None:
    """Raise ModuleNotFoundError unless the packages that compute distances are installed."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"{name}, which computes metrics, is absent: pip install 'ldm[metrics]'"
            )


def distances(
    x: Tensor, y: Tensor, extractor: FeatureExtractor, metrics: Sequence[str], bootstrap: Bootstrap
) -> list[Estimate]:
    """Return the metrics that compare two sets of features, (n, D) generated and (m, D) reference."""
    name = extractor.name
    found = []
    if "fid" in metrics:
        found.append(frechet_estimate(x, y, name, bootstrap))
    if "kid" in metrics:
        found.append(kernel_estimate(x, y, name, bootstrap))
    if "cmmd" in metrics and extractor.is_clip:
        found.append(clip_discrepancy_estimate(x, y, name, bootstrap))
    if {"precision", "recall"} & set(metrics):
        found += [each for each in manifold_estimates(x, y, name, bootstrap) if each.metric in metrics]
    return found


def clip_scores(x: Tensor, generated: ImageSet, extractor: FeatureExtractor) -> Tensor | None:
    """Return 100 times the cosine of each generated image and its caption, (n,) (Hessel et al. 2021).

    As in torchmetrics, negative cosines count. None if the features are no CLIP's with a text tower, or an
    image has no caption.

    Args:
        x: The features of the generated images, (n, D).
        generated: The generated images.
        extractor: The features.
    """
    captions = generated.captions() if extractor.is_clip else None
    if captions is None:
        return None
    parts = [extractor.text_features(captions[i : i + 64]) for i in range(0, len(captions), 64)]
    texts = [part for part in parts if part is not None]
    if len(texts) < len(parts):
        return None
    return 100 * F.cosine_similarity(x.double(), torch.cat(texts).double().cpu(), dim=1)


def compare(x: Tensor, y: Tensor, extractor: FeatureExtractor) -> Comparison:
    """Return how generated features (n, D) lie to reference features (m, D)."""
    x, y = x.double(), y.double()
    near, own = nearest_images(x, y), nearest_images(y, y, same=True)
    real = realism(x, y)
    # copies have infinite realism; among them, and among equals, the nearer one is the better
    order = sorted(range(len(x)), key=lambda i: (-float(real[i]), float(near.distance[i])))

    def match(i: int) -> Match:
        return Match(
            generated=i,
            reference=int(near.number[i]),
            distance=float(near.distance[i]),
            realism=float(real[i]),
        )

    return Comparison(
        features=extractor.name,
        preprocessing=extractor.preprocessing,
        curve=frechet_curve(x, y),
        to_reference=near.distance.sort().values.tolist(),
        within_reference=own.distance.sort().values.tolist(),
        closer=float((near.distance < own.distance[near.number]).double().mean()),
        best=[match(i) for i in order[:SHOWN_MATCHES]],
        worst=[match(i) for i in order[-SHOWN_MATCHES:][::-1]],
    )
