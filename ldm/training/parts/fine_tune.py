"""Fine-tuning of a model that `ldm.load` reads: its UNet, its text towers, or both.

With `prior`, it is DreamBooth (Ruiz et al. 2022, arXiv:2208.12242). The export is a whole model, which
`ldm.load(weights=...)` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ldm.registry.saving import save
from ldm.training.adapters.class_images import PriorPreservation
from ldm.training.config import RunConfig
from ldm.training.inputs.opening import DataSection
from ldm.training.parts.tuning import FineTuneDiffusion, Trained, TunedModel, check_base, check_trained
from ldm.training.recomputing import recompute_blocks


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The configuration of a fine-tuning.

    Args:
        run: Length, batches and optimizer.
        data: The training images.
        base: Name of the model (see `ldm.list_models`); None for that of the folder `weights`.
        weights: Its weights, as `ldm.load` takes them; None for the model's own. Default: None.
        train: The networks that are trained: "unet", "text", and SDXL's "text2". Default: the UNet.
        diffusion: Changes of the diffusion, and the weights of the loss.
        prior: Images of the model itself that it keeps drawing; None for none. Default: None.
        recompute: Whether blocks compute their activations again in the backward pass, which takes less
            memory and more time. Default: False.
    """

    run: RunConfig
    data: DataSection
    base: str | None = None
    weights: str | None = None
    train: tuple[Trained, ...] = ("unet",)
    diffusion: FineTuneDiffusion = field(default_factory=FineTuneDiffusion)
    prior: PriorPreservation | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        check_base(self.base, self.weights)
        check_trained(self.train)


class FineTunePart(TunedModel):
    """A loaded model in training."""

    def __init__(self, config: FineTuning, device: torch.device) -> None:
        super().__init__(config, device, config.train)
        self.model = nn.ModuleDict(self.trained).requires_grad_(True)
        if config.recompute:
            recompute_blocks(self.model)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the whole model, with half precision."""
        save(self.pipe, folder, dtype="float16", training=record, figures=self.validate())
