"""Training of an IP-Adapter for a model that `ldm.load` reads (Ye et al. 2023, arXiv:2308.06721).

The image that the adapter reads is the training image itself. The weights of the model and of CLIP's image
tower stay as they are. The export is a file in the published layout, which `pipe.controls.load`, diffusers
and others read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.models.control.controlled import ALWAYS, Controlled, ControlPart
from ldm.models.control.ip_adapter import (
    HEAD,
    IPAdapter,
    IPAdapterConfig,
    IPAdapterKind,
    TokenKind,
    read_width,
)
from ldm.models.unet import UNet
from ldm.pipelines.latent import LatentDiffusion
from ldm.speed.optimization import for_training
from ldm.training.adapters.adapter_config import NetworkAdapterTraining
from ldm.training.adapters.adapter_files import write_network, write_record
from ldm.training.config import check_at_least
from ldm.training.draws import Draws
from ldm.training.inputs.protocol import Samples
from ldm.training.recomputing import recompute_blocks
from ldm.training.tuning.base_model import content_key
from ldm.training.tuning.tuned_model import TunedModel
from ldm.weights.controls.ip_adapter import attention_widths, attentions_of, load_vision

TOKEN_COUNTS = {"base": 4, "plus": 16, "full": 1}  # of the published files; that of "full" is not read
RESAMPLER_WIDTH, RESAMPLER_DEPTH = 1280, 4  # of the published files; the width is at most the context's


@dataclass(frozen=True, kw_only=True)
class IPAdapterTraining(NetworkAdapterTraining):
    """The configuration of the training of an IP-Adapter; see `NetworkAdapterTraining` too.

    `diffusion.drop` is the share of samples without their text. The published adapters were trained with the
    defaults: 5 % of the samples without their text alone, 5 % without their image alone, 5 % without both.

    Args:
        vision: CLIP's image tower that the adapter reads: a folder in Hugging Face layout, or a file.
        kind: What it reads of the tower: "base" its embedding; "plus" its hidden states, by a resampler;
            "full" its hidden states, each one a token. Default: "base".
        tokens: Number of tokens of "base" and "plus"; None for 4 and 16. Default: None.
        drop_image: Share of samples without their image alone. Default: 0.05.
        drop_both: Share of samples without both, at most `diffusion.drop`. Default: 0.05.
    """

    vision: str
    kind: TokenKind = "base"
    tokens: int | None = None
    drop_image: float = 0.05
    drop_both: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        text = self.diffusion.drop
        for name, most in (("drop_both", text), ("drop_image", 1 - text)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: expected 0 to {most}, got {getattr(self, name)}")
        if self.tokens is not None:
            check_at_least(1, tokens=self.tokens)
            if self.kind == "full":
                raise ValueError(f"tokens {self.tokens}: expected none for the kind 'full'")

    def shape(self, image_dim: int, context_dim: int, widths: tuple[int, ...]) -> IPAdapterConfig:
        """Return the shape of the adapter.

        Args:
            image_dim: Width of what it reads of the tower.
            context_dim: Width of the UNet's context.
            widths: Widths of the UNet's cross-attentions.
        """
        width = min(context_dim, RESAMPLER_WIDTH)
        return IPAdapterConfig(
            kind=self.kind,
            image_dim=image_dim,
            context_dim=context_dim,
            tokens=self.tokens or TOKEN_COUNTS[self.kind],
            widths=widths,
            resampler=(width, RESAMPLER_DEPTH, max(1, width // HEAD)),
        )


class IPAdapterPart(TunedModel):
    """An IP-Adapter in training around a loaded model."""

    def __init__(self, config: IPAdapterTraining, device: torch.device) -> None:
        self.config = config
        super().__init__(config, device)
        net = self.pipe.denoiser.net
        assert isinstance(net, UNet) and net.config.context_dim is not None  # see `check`
        vision = load_vision(config.vision, torch.float32).to(device)
        self.base_hashes["vision"] = content_key(vision)
        names, widths = attention_widths(attentions_of(net))
        read = read_width(config.kind, vision.config)
        if read is None:
            raise ValueError(f"vision {config.vision!r} has no embedding, which the kind 'base' reads")
        torch.manual_seed(config.run.seed)
        self.model = IPAdapter.of_unet(net, config.shape(read, net.config.context_dim, widths)).to(device)
        self.kind = IPAdapterKind(network=self.model, vision=vision, attentions=names)
        if device.type == "cpu":
            for_training(net)
        if config.recompute:
            recompute_blocks(net)
        own = self.pipe.denoiser
        part = ControlPart(kind=self.kind, strength=1.0, guess=False, interval=ALWAYS)
        self.controlled = Denoiser(Controlled(net, [part]), own.schedule, own.prediction)

    def check(self, pipe: LatentDiffusion) -> None:
        """Raise ValueError for a model that has no attentions to a text."""
        net = pipe.denoiser.net
        if not isinstance(net, UNet) or net.config.context_dim is None or net.config.attention == "block":
            raise ValueError(f"{pipe.name!r} has no UNet with cross-attentions, in which IP-Adapters act")

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser with the adapter around its network."""
        return self.controlled

    def cond(self, texts: Sequence[str], samples: Samples, seeds: Sequence[int] = ()) -> Cond:
        """Return the condition of texts and of the images of B samples."""
        return self.shown(texts, samples, np.ones(len(samples), dtype=bool))

    def uncond(self, samples: Samples, seeds: Sequence[int] = ()) -> Cond:
        """Return the condition of the unconditional branch, which has neither text nor image."""
        return self.shown([""] * len(samples), samples, np.zeros(len(samples), dtype=bool))

    def drawn_cond(self, texts: Sequence[str], samples: Samples, draws: Draws) -> Cond:
        """Return the condition of a batch, of which images are left out at random.

        The share is `drop_both` / `drop` of the samples without text, `drop_image` / (1 − `drop`) of others.
        """
        config, text = self.config, self.diffusion.drop
        without = config.drop_both / text if text else 0.0
        beside = config.drop_image / (1 - text) if text < 1 else 0.0
        shares = np.array([beside if each else without for each in texts])
        return self.shown(texts, samples, draws.random() >= shares)

    def shown(self, texts: Sequence[str], samples: Samples, on: np.ndarray) -> Cond:
        """Return the condition of texts and of the images of B samples, of those that are `on`, (B,) bool."""
        images = (self.images.tensor(samples) / 2 + 0.5).to(self.device)  # (B, 3, H, W)
        (tokens,) = self.kind.prepare(images)  # (B, N, D)
        (nothing,) = self.kind.prepare_without(images, (tokens,))  # (1, N, D)
        kept = torch.from_numpy(on).to(self.device)
        hints: tuple[Tensor, ...] = (
            torch.ones_like(kept),
            torch.where(kept[:, None, None], tokens, nothing),
        )
        return replace(super().cond(texts, samples), hints=hints)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the adapter as NAME.safetensors, and the record of its training as NAME.yaml."""
        path = folder / f"{self.config.run.name}.safetensors"
        write_network(path, self.model, self.config.dtype, {"base": self.pipe.name, "kind": self.config.kind})
        write_record(path, record, figures=self.validate())
