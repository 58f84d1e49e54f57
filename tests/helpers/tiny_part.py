"""A part whose training takes no time, in float64: every kind of mean, weight and random number at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.training.config import OptimizerConfig, RunConfig
from ldm.training.draws import Draws


@dataclass(frozen=True, kw_only=True)
class TinyTraining:
    """The configuration of the training."""

    run: RunConfig


class Residual(nn.Module):
    """A layer of a list of modules; its first weight has fewer rows than there may be processes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(width, 3), nn.Linear(3, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.wide(torch.tanh(self.narrow(x)))


class TinyPart:
    """A network of random vectors, with a shared weight, a scalar, a frozen weight and a contrastive loss."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = nn.ModuleList(Residual(8) for _ in range(2))
        layers[1].wide.weight = layers[0].wide.weight  # shared by two blocks
        net = nn.ModuleDict(
            {
                "layers": layers,
                "conv": nn.Conv2d(2, 6, 3, padding=1),
                "head": nn.Linear(8, 8),
                "never": nn.Linear(2, 2),
                "frozen": nn.Linear(8, 8).requires_grad_(False),
            }
        )
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.model = nn.ModuleDict({"net": net, "scale": nn.ParameterList([self.scale])}).double()
        self.scale = self.model["scale"][0]
        self.seen: list[int] = []

    def features(self, x: Tensor) -> Tensor:
        net = self.model["net"]
        for layer in net["layers"]:
            x = layer(x)
        return net["frozen"](net["head"](x))

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a loss of a mean of all samples, of some, and of all pairs."""
        self.seen += draws.samples
        x = draws.normal(len(draws), 8).double()
        maps = self.model["net"]["conv"](draws.normal(len(draws), 2, 4, 4).double())
        y = self.features(x)
        picked = torch.from_numpy(draws.random() < 0.4)
        all_y = F.normalize(draws.gather(y), dim=-1)
        all_x = F.normalize(draws.gather(x), dim=-1)
        pairs = F.cross_entropy(self.scale.exp() * all_y @ all_x.T, torch.arange(len(all_x)))
        figures = {
            "mean": draws.mean((y - x.roll(1, -1)).square()),
            "some": draws.mean_of_some(y[picked].square()).nan_to_num(),
            "maps": draws.mean((maps - 1).square()),
        }
        return sum(figures.values(), pairs), {**figures, "pairs": pairs}

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return the numbers of the samples."""
        return [f"sample {sample}" for sample in draws.samples]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return a figure of a fixed sample."""
        return {"figure": float(self.features(torch.ones(1, 8, dtype=torch.float64)).sum())}

    def preview(self) -> np.ndarray | None:
        """Return None."""
        return None

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), folder / "weights.pt")


def tiny_config(**changes: object) -> TinyTraining:
    """Return a configuration with changes of its run."""
    optimizer = {"lr": 1e-2, "warmup": 5, "decay": 10, "clip": 0.5, **changes.pop("optimizer", {})}
    run = {
        "name": "tiny",
        "steps": 50,
        "batch": 8,
        "ema": 0.9,
        "precision": "float32",
        "log_every": 1,
        "validate_every": 20,
        "sample_every": 100,
        "checkpoint_every": 10,
        **changes,
    }
    return TinyTraining(run=RunConfig(optimizer=OptimizerConfig(**optimizer), **run))
