"""Image embeddings that a prior samples from captions, used in place of the images' own embeddings."""

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
from ldm.training.config import check_at_least
from ldm.training.diffusion import DiffusionConfig
from ldm.weights.formats.ldm_folder import about_part, read_part


@dataclass(frozen=True, kw_only=True)
class PriorEmbeddings:
    """A share of training embeddings that a frozen prior samples from captions.

    A network that is trained on the embeddings of images alone misreads the errors of a prior as another
    image.

    Args:
        prior: Folder of a diffusion prior.
        share: Share of embeddings that come from the prior, in (0, 1]. Default: 0.5.
        steps: DDIM steps. Default: 2.
    """

    prior: str
    share: float = 0.5
    steps: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected more than 0 and at most 1, got {self.share}")
        check_at_least(1, steps=self.steps)

    @property
    def length(self) -> int:
        """The number of tokens that the prior reads."""
        return int(about_part(self.prior, "prior")["model"]["length"])

    @property
    def key(self) -> str:
        """The hash of the prior's weights and the number of steps, which identify the embeddings."""
        return f"{about_part(self.prior, 'prior')['sha256']}/{self.steps}"

    def sampler(self, clip: ClipPair) -> Callable[[Sequence[str]], Tensor]:
        """Read the prior and return a function from captions to embeddings (B, E).

        Args:
            clip: Reads the captions; it must be the CLIP that the prior was trained with.

        Raises:
            ValueError: If the prior was trained with another CLIP.
        """
        net, about = read_part(self.prior, "prior", PriorConfig, Prior)
        assert isinstance(net, Prior)
        if about["clip"] != clip.name:
            raise ValueError(
                f"the prior in {self.prior!r} makes embeddings of {about['clip']!r}, expected {clip.name!r}"
            )
        config: DiffusionConfig = build(DiffusionConfig, about["diffusion"], "diffusion")
        net = net.to(next(clip.parameters()).device).eval()
        denoiser = Denoiser(net, config.make(), "x0")
        return lambda captions: sample_prior(denoiser, clip, captions, steps=self.steps)


@torch.no_grad()
def sample_prior(
    denoiser: Denoiser,
    clip: ClipPair,
    captions: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 10,
    guidance: float = 1.0,
) -> Tensor:
    """Sample image embeddings from captions with a diffusion prior.

    Args:
        denoiser: The prior.
        clip: Reads the captions.
        captions: B captions.
        seed: Seed of the first sample; sample i has seed `seed` + i. Default: 0.
        steps: DDIM steps. Default: 10.
        guidance: Guidance scale; 1 is no guidance. Default: 1.

    Returns:
        Embeddings on the scale of CLIP's, (B, E).
    """
    net = denoiser.net
    assert isinstance(net, Prior)
    fn = cfg(denoiser, clip.read(captions), clip.read([""]), guidance)
    x = initial_noise(range(seed, seed + len(captions)), (net.config.embed_dim,)).to(
        next(net.parameters()).device
    )
    return net.denormalize(ddim(fn, x, TimeGrid.make(denoiser.schedule, steps, spacing="trailing")))
