"""The latent cache: every picture on every ground, encoded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.config import to_dict
from ldm.data import PALETTE, Composition, held_out_pair
from ldm.models.vae import AutoencoderKL
from ldm.training.config import RunConfig
from ldm.training.data import Pictures
from ldm.training.loop import Draws


@dataclass(frozen=True)
class LatentCache:
    """Means and standard deviations of posteriors, (N, 2, C, h, w) float16, memory-mapped, and which composition each belongs to.

    All pictures of the mix that training may see, on every ground that it may see them on, and ``variants`` drawn once from the mix's small and
    double ones.
    """

    moments: np.ndarray
    row_of: dict[tuple[int, str | None], int]
    variants: tuple[Composition, ...]
    scale: float

    @classmethod
    def of_run(cls, run: RunConfig, pictures: Pictures, vae: AutoencoderKL, about: Mapping[str, Any], variants: int) -> LatentCache:
        """The cache of a run, shared by all that have its pictures, seed and autoencoder; ``about``: what the autoencoder's YAML says."""
        scale, key = float(about["latent_scale"]), about["sha256"]
        return cls.build(Path("runs") / "latents", pictures, vae, variants=variants, seed=run.seed, scale=scale, key=key)

    @classmethod
    def build(cls, folder: Path, pictures: Pictures, vae: AutoencoderKL, *, variants: int, seed: int, scale: float, key: str) -> LatentCache:
        """Encode what is not yet in ``folder``; ``key`` names the autoencoder's weights."""
        mix = pictures.config.mix
        plain = [
            Composition(picture=int(row), ground=ground)
            for row in pictures.data.train
            if getattr(mix, pictures.data.index[int(row)].style) > 0
            for ground in (None, *(PALETTE if mix.ground > 0 else ()))
            if ground != "white" and not held_out_pair(pictures.data.index[int(row)].name, ground)
        ]
        drawn = draw_variants(pictures, variants, seed)
        made_of = [key, to_dict(pictures.config), variants, seed, pictures.data.manifest]
        name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        path = folder / f"latents-{name}.npy"
        if not path.exists():
            encode_all(path, [*plain, *drawn], pictures, vae)
        moments = np.load(path, mmap_mode="r")
        rows = {(c.picture, c.ground): i for i, c in enumerate(plain)}
        rows.update({(c.picture, "white"): i for i, c in enumerate(plain) if c.ground is None})  # white said or unsaid is one picture
        return cls(moments, rows, tuple(drawn), scale)

    def choose(self, composition: Composition, rng: np.random.Generator) -> tuple[Composition, int]:
        """The composition that the cache has for a drawn one (a small or double one becomes one of the variants), and its row."""
        if composition.second is None and composition.size == "full":
            return composition, self.row_of[composition.picture, composition.ground]
        i = int(rng.integers(len(self.variants)))
        return self.variants[i], len(self.moments) - len(self.variants) + i

    def sample(self, rows: Sequence[int], draws: Draws) -> Tensor:
        """Scaled latents drawn from the posteriors of rows, (B, C, h, w) float32."""
        moments = torch.from_numpy(self.moments[np.asarray(rows)]).float()  # (B, 2, C, h, w)
        return self.scale * (moments[:, 0] + moments[:, 1] * draws.normal(*moments[:, 0].shape))


def draw_variants(pictures: Pictures, n: int, seed: int) -> list[Composition]:
    """n compositions of the mix that are small or double."""
    mix = pictures.config.mix
    if n and mix.small + mix.two == 0:
        raise ValueError(f"variants {n}: the mix has neither small nor double pictures to draw them from")
    if not n and mix.small + mix.two > 0:
        raise ValueError("variants 0: the mix has small or double pictures, so expected at least 1")
    rng, drawn = np.random.default_rng(seed), []
    while len(drawn) < n:
        drawn += [c for c in pictures.draw(rng, n) if c.second is not None or c.size == "small"]
    return drawn[:n]


@torch.no_grad()
def encode_all(path: Path, compositions: Sequence[Composition], pictures: Pictures, vae: AutoencoderKL, batch: int = 32) -> None:
    """Write the moments of all the compositions."""
    import os

    from tqdm import tqdm

    side = pictures.config.size // vae.config.factor
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part.npy")
    out = np.lib.format.open_memmap(temporary, "w+", np.float16, (len(compositions), 2, vae.config.latent_channels, side, side))
    for start in tqdm(range(0, len(compositions), batch), desc="encode", disable=None):
        x = pictures.tensor(compositions[start : start + batch]).to(next(vae.parameters()).device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=False):
            posterior = vae.encode(x)
        out[start : start + batch] = torch.stack([posterior.mean, (0.5 * posterior.logvar).exp()], 1).half().cpu().numpy()
    out.flush()
    os.replace(temporary, path)


@torch.no_grad()
def measure_scale(vae: AutoencoderKL, pictures: Pictures, seed: int = 0, n: int = 2048) -> float:
    """1 / std of sampled latents over n training compositions: the factor that gives them unit variance (Rombach et al. 2022, appendix G)."""
    draws = Draws(seed, 0)
    total, square, count = 0.0, 0.0, 0
    for _ in range(0, n, 32):
        posterior = vae.encode(pictures.tensor(pictures.draw(draws.rng, 32)).to(next(vae.parameters()).device))
        z = posterior.sample(draws.normal(*posterior.mean.shape).to(posterior.mean.device)).double()
        total, square, count = total + float(z.sum()), square + float(z.square().sum()), count + z.numel()
    return float((square / count - (total / count) ** 2) ** -0.5)
