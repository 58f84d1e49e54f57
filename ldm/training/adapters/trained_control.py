"""Training of a ControlNet for a model that `ldm.load` reads, from a copy of its encoder.

Zhang et al. 2023, arXiv:2302.05543, for UNets, and Chen et al. 2024, arXiv:2401.05252, for diffusion
transformers. The model's weights stay as they are. The export is a file that `pipe.controls.load` reads; of a
UNet's, diffusers, ComfyUI and others read it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from ldm.catalog.control_cards import control_card
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.prompt import escape_prompt
from ldm.diffusion.cond import Cond
from ldm.diffusion.denoiser import Denoiser
from ldm.models.control.control_net import ControlNet
from ldm.models.control.controlled import ALWAYS, Controlled, ControlNetKind, ControlPart
from ldm.models.control.dit_control import DiTControl, DiTControlKind
from ldm.models.dit import DiT
from ldm.models.unet import UNet
from ldm.pipelines.latent import LatentDiffusion
from ldm.speed.optimization import for_training
from ldm.support.files import write_atomically
from ldm.training.adapters.adapter_config import NetworkAdapterTraining
from ldm.training.adapters.adapter_files import write_network, write_record
from ldm.training.caches.canvases import CanvasFit, FittedCanvases, HintFit
from ldm.training.config import check_at_least
from ldm.training.inputs.hints import Hints, HintSource
from ldm.training.inputs.protocol import Samples
from ldm.training.recomputing import recompute_blocks
from ldm.training.tuning.tuned_model import FineTuneDiffusion, TunedModel
from ldm.weights.formats.diffusers_config import control_net_entries

HINT_WIDTHS = (16, 32, 96, 256)  # of the published hint encoders; each after the first halves the size


@dataclass(frozen=True, kw_only=True)
class ControlNetTraining(NetworkAdapterTraining):
    """The configuration of the training of a ControlNet; see `NetworkAdapterTraining` too.

    Args:
        hints: What the control reads of each image. Default: Canny's edges.
        diffusion: The weights of the loss. Half of the captions should be dropped (`drop`, the default), so
            that the control is read without them too.
        blocks: Blocks of a diffusion transformer that are copied; None for half of them. Default: None.
        layout: Of the exported file: "original" or, for a UNet, the folder of "diffusers". Default:
            "original".
    """

    hints: HintSource = field(default_factory=HintSource)
    diffusion: FineTuneDiffusion = field(default_factory=lambda: FineTuneDiffusion(drop=0.5))
    blocks: int | None = None
    layout: Literal["original", "diffusers"] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None:
            check_at_least(1, blocks=self.blocks)


class ControlNetPart(TunedModel):
    """A ControlNet in training around a loaded model."""

    def __init__(self, config: ControlNetTraining, device: torch.device) -> None:
        self.config = config
        self.card = control_card(None, config.run.name, config.hints.kind)  # as `pipe.controls` reads it
        super().__init__(config, device)
        net = self.pipe.denoiser.net
        torch.manual_seed(config.run.seed)
        self.model: ControlNet | DiTControl
        self.kind: ControlNetKind | DiTControlKind
        if isinstance(net, DiT):
            blocks = max(1, net.config.depth // 2) if config.blocks is None else config.blocks
            self.model = DiTControl.copy_of(net, blocks)
            self.kind = DiTControlKind(network=self.model)
        else:
            assert isinstance(net, UNet)  # see `check`
            self.model = ControlNet.copy_of(net, hint_widths=hint_widths(self.pipe.vae.config.factor))
            self.kind = ControlNetKind(network=self.model)
        self.model.requires_grad_(True)
        for network in (net, self.model):
            if device.type == "cpu":
                for_training(network)
        if config.recompute:
            recompute_blocks(self.model)
        own = self.pipe.denoiser
        part = ControlPart(kind=self.kind, strength=1.0, guess=False, interval=ALWAYS)
        self.controlled = Denoiser(Controlled(net, [part]), own.schedule, own.prediction)

    def check(self, pipe: LatentDiffusion) -> None:
        """Raise ValueError for a model whose network has no encoder to copy."""
        net, config = pipe.denoiser.net, self.config
        if pipe.card.concat is not None:
            raise ValueError(
                f"{pipe.name!r} reads {pipe.card.concat} itself: train a control of its base model"
            )
        if not isinstance(net, UNet | DiT):
            raise ValueError(f"{pipe.name!r} has no UNet or DiT: controls are for models with one")
        if isinstance(net, DiT):
            if config.layout == "diffusers":
                raise ValueError(f"layout 'diffusers': {pipe.name!r} has a DiT, expected 'original'")
            return
        if config.blocks is not None:
            raise ValueError(f"blocks {config.blocks}: expected none, {pipe.name!r} has a UNet")
        hint_widths(pipe.vae.config.factor)

    def _fitted_canvases(self) -> FittedCanvases | None:
        self.hints = Hints(self.config.hints, self.images)  # to which canvases are fitted
        return super()._fitted_canvases()

    def canvas_fit(self, text: ExemplarConditioner) -> CanvasFit | None:
        """Return what layouts are fitted to: hints of edges, as in a call; None for other hints."""
        return HintFit(text=text, weights=self.base_hashes, hints=self.hints) if self.card.edges else None

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser with the control around its network."""
        return self.controlled

    def cond(self, texts: Sequence[str], samples: Samples, seeds: Sequence[int] = ()) -> Cond:
        """Return the condition of texts, and what the control reads of B samples.

        A model with exemplars is shown what a call shows: exemplars in the layout that agrees with the hint,
        or where hints are no edges, those that `seeds` draw.
        """
        hint = self.hints(samples).to(self.device)  # (B, 3, H, W)
        if isinstance(self.pipe.text, ExemplarConditioner) and self.canvases is None:
            size = (hint.shape[-2] // self.pipe.text.cell, hint.shape[-1] // self.pipe.text.cell)
            prompts = [escape_prompt(text) for text in texts]
            cond = self.pipe.text(prompts, size, seeds=list(seeds) or [0] * len(prompts))
        else:
            cond = super().cond(texts, samples)
        on = torch.ones(len(hint), dtype=torch.bool, device=self.device)
        return replace(cond, hints=(on, *self.kind.prepare(hint)))

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the control, and the record of its training beside it.

        It is NAME.safetensors in the original layout, or diffusion_pytorch_model.safetensors with its
        config.json.
        """
        config = self.config
        whole = config.layout == "diffusers"
        path = folder / f"{'diffusion_pytorch_model' if whole else config.run.name}.safetensors"
        facts = {"hints": config.hints.kind, "base": self.pipe.name}
        write_network(path, self.model, config.dtype, facts, layout=config.layout)
        if whole:
            assert isinstance(self.model, ControlNet)
            entries = json.dumps(control_net_entries(self.model.control), indent=2, sort_keys=True)
            write_atomically(folder / "config.json", f"{entries}\n".encode())
        write_record(path, record, figures=self.validate())


def hint_widths(factor: int) -> tuple[int, ...]:
    """Return the channels of a hint encoder's maps, for an autoencoder's factor.

    Raises:
        ValueError: If the factor is no power of two from 1 to 8.
    """
    count = factor.bit_length()
    if factor != 2 ** (count - 1) or count > len(HINT_WIDTHS):
        raise ValueError(f"the autoencoder's factor is {factor}: expected 1, 2, 4 or 8 for a hint encoder")
    return HINT_WIDTHS[:count]
