"""The latent cache: every composition that is kept, encoded once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data import Composition
from ldm.models.vae import AutoencoderKL
from ldm.support.config import to_dict
from ldm.training.compositions import Compositions
from ldm.training.config import RunConfig
from ldm.training.data import Pictures
from ldm.training.loop import Draws

CACHES = Path("runs") / "latents"


@dataclass(frozen=True)
class LatentCache:
    """Means and standard deviations of posteriors, (N, 2, C, h, w) float16, memory-mapped: a row for each
    composition."""

    moments: np.ndarray
    compositions: Compositions
    scale: float

    @classmethod
    def of_run(
        cls, run: RunConfig, pictures: Pictures, vae: AutoencoderKL, about: Mapping[str, Any], variants: int
    ) -> LatentCache:
        """The cache of a run, shared by all that have its pictures, seed and autoencoder; ``about``: what the
        autoencoder's YAML says."""
        scale, key = float(about["latent_scale"]), about["sha256"]
        return cls.build(CACHES, pictures, vae, variants=variants, seed=run.seed, scale=scale, key=key)

    @classmethod
    def build(
        cls,
        folder: Path,
        pictures: Pictures,
        vae: AutoencoderKL,
        *,
        variants: int,
        seed: int,
        scale: float,
        key: str,
    ) -> LatentCache:
        """Encode what is not yet in ``folder``; ``key`` names the autoencoder's weights."""
        compositions = Compositions.of(pictures, variants=variants, seed=seed)
        path = folder / f"latents-{cache_name(pictures, variants, seed, key)}.npy"
        if not path.exists():
            encode_all(path, compositions.rows, pictures, vae)
        return cls(np.load(path, mmap_mode="r"), compositions, scale)

    def choose(self, composition: Composition, rng: np.random.Generator) -> tuple[Composition, int]:
        """See `Compositions.choose`."""
        return self.compositions.choose(composition, rng)

    def sample(self, rows: Sequence[int], draws: Draws) -> Tensor:
        """Scaled latents drawn from the posteriors of rows, (B, C, h, w) float32."""
        moments = torch.from_numpy(self.moments[np.asarray(rows)]).float()  # (B, 2, C, h, w)
        return self.scale * (moments[:, 0] + moments[:, 1] * draws.normal(*moments[:, 0].shape))


def cache_name(pictures: Pictures, variants: int, seed: int, key: str) -> str:
    """A name for what a network (``key``: its weights) makes of a run's compositions."""
    # which are kept, not how often each is drawn
    config = {name: value for name, value in to_dict(pictures.config).items() if name != "drawn"}
    made_of = [key, config, variants, seed, pictures.data.manifest]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


@torch.no_grad()
def encode_all(
    path: Path, compositions: Sequence[Composition], pictures: Pictures, vae: AutoencoderKL
) -> None:
    """Write the moments of all the compositions."""
    side = pictures.config.size // vae.config.factor

    def moments(part: Sequence[Composition]) -> Tensor:
        posterior = vae.encode(pictures.tensor(part).to(next(vae.parameters()).device))
        return torch.stack([posterior.mean, (0.5 * posterior.logvar).exp()], 1)

    write_rows(path, compositions, (2, vae.config.latent_channels, side, side), moments)


@torch.no_grad()
def write_rows(
    path: Path,
    compositions: Sequence[Composition],
    shape: tuple[int, ...],
    compute: Callable[[Sequence[Composition]], Tensor],
    batch: int = 32,
) -> None:
    """Write what ``compute`` makes of some compositions, (B, *shape), for all of them, in float16, whole or
    not at all."""
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part.npy")
    out = np.lib.format.open_memmap(temporary, "w+", np.float16, (len(compositions), *shape))
    for start in tqdm(range(0, len(compositions), batch), desc=f"compute {path.name}", disable=None):
        out[start : start + batch] = compute(compositions[start : start + batch]).half().cpu().numpy()
    out.flush()
    os.replace(temporary, path)


@torch.no_grad()
def measure_scale(vae: AutoencoderKL, pictures: Pictures, seed: int = 0, n: int = 2048) -> float:
    """1 / std of sampled latents over n training compositions: the factor that gives them unit variance
    (Rombach et al. 2022, appendix G)."""
    draws = Draws(seed, 0)
    total, square, count = 0.0, 0.0, 0
    for _ in range(0, n, 32):
        posterior = vae.encode(
            pictures.tensor(pictures.draw(draws.rng, 32)).to(next(vae.parameters()).device)
        )
        z = posterior.sample(draws.normal(*posterior.mean.shape).to(posterior.mean.device)).double()
        total, square, count = total + float(z.sum()), square + float(z.square().sum()), count + z.numel()
    return float((square / count - (total / count) ** 2) ** -0.5)
