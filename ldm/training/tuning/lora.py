"""Training of LoRA and its relatives (DoRA, LoKr) for a model that `ldm.load` reads.

With `prior`, it is DreamBooth (Ruiz et al. 2022, arXiv:2208.12242). The export is an adapter file, which
`pipe.adapters.load` reads, and so do diffusers and kohya-style programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ldm.speed.optimization import for_training
from ldm.training.adapters.adapter_config import NetworkAdapterTraining
from ldm.training.adapters.adapter_files import write_record
from ldm.training.adapters.class_images import PriorPreservation
from ldm.training.adapters.trained_adapter import AdapterShape, TrainedAdapter
from ldm.training.recomputing import recompute_blocks
from ldm.training.tuning.tuned_model import Trained, TunedModel, check_trained
from ldm.weights.adapters.writing import write_adapter


@dataclass(frozen=True, kw_only=True)
class LoRATraining(NetworkAdapterTraining):
    """The configuration of the training of a LoRA, or of a relative; see `NetworkAdapterTraining` too.

    Args:
        train: The networks that the adapter changes: "unet", "text", and SDXL's "text2". Default: the UNet.
        adapter: Its kind and size.
        prior: Images of the model itself that it keeps drawing; None for none. Default: None.
        names: Names of the tensors in the file: "kohya", which all programs read, or "diffusers", which has
            no names for LoKr. Default: "kohya".
    """

    train: tuple[Trained, ...] = ("unet",)
    adapter: AdapterShape = field(default_factory=AdapterShape)
    prior: PriorPreservation | None = None
    names: Literal["kohya", "diffusers"] = "kohya"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trained(self.train)
        if self.names == "diffusers" and self.adapter.kind == "lokr":
            raise ValueError("names 'diffusers': diffusers has no names for LoKr, expected 'kohya'")


class LoRAPart(TunedModel):
    """An adapter in training; only its tensors are parameters."""

    def __init__(self, config: LoRATraining, device: torch.device) -> None:
        super().__init__(config, device, config.train)
        self.config = config
        for network in self.trained.values():
            if device.type == "cpu":
                for_training(network)
            if config.recompute:
                recompute_blocks(network)
        self.model = TrainedAdapter(self.trained, config.adapter, config.run.seed)

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the adapter as NAME.safetensors, and the record of its training as NAME.yaml."""
        config, run = self.config, self.config.run
        path = folder / f"{run.name}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "ss_output_name": run.name,
            "ss_sd_model_name": self.pipe.name,
            "ss_steps": str(run.steps),
            "ss_total_batch_size": str(run.batch),
            "ss_learning_rate": str(run.optimizer.lr),
            "ss_seed": str(run.seed),
        }
        dtype = getattr(torch, config.dtype)
        write_adapter(path, self.model.changes(), config.names, dtype=dtype, metadata=facts)
        write_record(path, record, figures=self.validate())
