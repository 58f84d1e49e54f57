"""What a prior makes of captions, in the place of embeddings of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.conditioning.clip import ClipPair
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.guidance import cfg
from ldm.diffusion.noise import initial_noise
from ldm.models.unclip.prior import Prior, PriorConfig
from ldm.samplers.ode.ddim import ddim
from ldm.support.config import build
from ldm.training.config import at_least
from ldm.training.parts.latent_diffusion import Diffusion
from ldm.weights.formats.ldm_folder import about_part, read_part


@dataclass(frozen=True, kw_only=True)
class Imagined:
    """A ``share`` of embeddings that are not a picture's own but those that a prior makes of its caption.

    ``prior``: the folder of a diffusion prior, which stays as it is; ``steps``: of DDIM. A network that has
    only ever seen the embeddings of pictures takes what a prior gets wrong for another picture.
    """

    prior: str
    share: float = 0.5
    steps: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected more than 0 and at most 1, got {self.share}")
        at_least(1, steps=self.steps)

    @property
    def length(self) -> int:
        """How many tokens the prior reads."""
        return int(about_part(self.prior, "prior")["model"]["length"])

    @property
    def key(self) -> str:
        """What tells the embeddings of two priors apart: its weights, and how they are used."""
        return f"{about_part(self.prior, 'prior')['sha256']}/{self.steps}"

    def maker(self, clip: ClipPair) -> Callable[[Sequence[str]], Tensor]:
        """Captions → embeddings (B, E), by the prior, of the CLIP that it was trained with (ValueError for
        another), its texts read by ``clip``."""
        net, about = read_part(self.prior, "prior", PriorConfig, Prior)
        assert isinstance(net, Prior)
        if about["clip"] != clip.name:
            raise ValueError(
                f"the prior in {self.prior!r} makes embeddings of {about['clip']!r}, expected {clip.name!r}"
            )
        denoiser = Denoiser(
            net.to(next(clip.parameters()).device).eval(),
            build(Diffusion, about["diffusion"], "diffusion").make(),
            "x0",
        )
        return lambda captions: imagine(denoiser, clip, captions, steps=self.steps)


@torch.no_grad()
def imagine(
    denoiser: Denoiser,
    clip: ClipPair,
    captions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 10,
    guidance: float = 1.0,
) -> Tensor:
    """Image embeddings (B, E), as CLIP gives them, that a diffusion prior makes of captions."""
    net = denoiser.net
    assert isinstance(net, Prior)
    fn = cfg(denoiser, clip.read(captions), clip.read([""]), guidance)
    x = initial_noise(range(seed, seed + len(captions)), (net.config.embed_dim,)).to(
        next(net.parameters()).device
    )
    return net.denormalize(ddim(fn, x, TimeGrid.make(denoiser.schedule, steps, spacing="trailing")))
