"""The training loop: one for every part, exact to the bit across interruptions.

Everything random in step k is drawn from (seed, k) alone, so a run's state is its step, its weights, their
averages and the optimiser's moments.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldm.speed.optimization import for_training
from ldm.support.config import to_dict
from ldm.support.device import dtype_of, fast_dtype
from ldm.support.files import write_atomically
from ldm.training.checkpoint import load_checkpoint, save_checkpoint
from ldm.training.config import RunConfig
from ldm.training.ema import EMA


class Draws:
    """The random numbers of one step of one run: a numpy and a torch generator keyed by (seed, step,
    stream)."""

    def __init__(self, seed: int, step: int, stream: int = 0) -> None:
        self.rng = np.random.Generator(
            np.random.Philox(key=np.array([seed, (stream << 48) + step], dtype=np.uint64))
        )
        self.torch = torch.Generator().manual_seed(int(self.rng.integers(2**63)))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32."""
        return torch.randn(*shape, generator=self.torch)


class Trainable(Protocol):
    """What can be trained: a module, its loss, and how to judge and show it."""

    model: nn.Module

    def loss(self, draws: Draws, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step and what else to log, from the draws alone."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out data, with the weights the model holds at the moment."""

    def preview(self) -> np.ndarray | None:
        """A picture (H, W, 3) uint8 of what the model makes at the moment."""

    def export(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Write the weights the model holds, and what is needed to use them."""


class Run:
    """A part in training, in a folder of its own: ``checkpoint.pt``, ``metrics.jsonl``, ``samples/``."""

    def __init__(
        self, part: Trainable, config: RunConfig, full_config: Any, folder: Path, device: torch.device
    ) -> None:
        self.part, self.config, self.folder, self.device = part, config, folder, device
        self.full_config = to_dict(full_config)
        if device.type == "cpu":
            for_training(part.model)
        self.parameters = [p for p in part.model.parameters() if p.requires_grad]
        self.ema = EMA(part.model, config.ema)
        opt = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=opt.lr, betas=opt.betas, weight_decay=opt.weight_decay, fused=True
        )
        self.dtype = fast_dtype(device) if config.precision == "auto" else dtype_of(config.precision)
        self.step = 0
        self.seconds = 0.0
        if (folder / "checkpoint.pt").exists():
            self._resume()

    def _resume(self) -> None:
        state = load_checkpoint(self.folder / "checkpoint.pt")
        refuse_other_config(state["config"], self.full_config, self.config, state["step"])
        self.part.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        lie_as_weights(self.optimizer)
        self.step, self.seconds = state["step"], state["seconds"]
        metrics = self.folder / "metrics.jsonl"  # lines behind the checkpoint will be written again
        if metrics.exists():
            kept = [line for line in metrics.read_text().splitlines() if _step_of(line) <= self.step]
            write_atomically(metrics, "".join(line + "\n" for line in kept).encode())

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "config": self.full_config,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.part.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.folder / "checkpoint.pt", state)

    def train(self, *, until: int | None = None, progress: bool = True) -> None:
        """Train from where the run stands to its last step (or to step ``until``), then save."""
        from tqdm import tqdm

        config, last = self.config, min(until or self.config.steps, self.config.steps)
        self.folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(
            total=last, initial=self.step, unit="step", disable=None if progress else True, smoothing=0.05
        )
        shown: list[dict[str, Tensor]] = []
        started = mark = time.perf_counter()
        before = self.seconds
        while self.step < last:
            shown.append(self._one_step())
            self.step += 1
            self.seconds = before + time.perf_counter() - started
            bar.update()
            if self.step % config.log_every == 0 or self.step == last:
                now = time.perf_counter()
                rate = len(shown) * config.batch / (now - mark)
                means = {key: float(torch.stack([row[key] for row in shown]).mean()) for key in shown[0]}
                self._log({**means, "samples_per_second": round(rate, 2)})
                bar.set_postfix(loss=f"{means['loss']:.4f}", samples=f"{rate:.0f}/s")
                if not np.isfinite(means["loss"]):
                    raise FloatingPointError(
                        f"step {self.step}: the loss is {means['loss']}; the last checkpoint is kept"
                    )
                shown, mark = [], now
            if self.step % config.checkpoint_every == 0 or self.step == last:
                self.save()
            if self.step % config.validate_every == 0 or self.step == last:
                self._look()
                mark = time.perf_counter()
        bar.close()

    def _one_step(self) -> dict[str, Tensor]:
        opt = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = opt.rate(self.step, self.config.steps)
        self.part.model.train()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, extra = self.part.loss(Draws(self.config.seed, self.step), self.config.batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, opt.clip if opt.clip > 0 else float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        return {
            "loss": loss.detach(),
            **{key: value.detach() for key, value in extra.items()},
            "grad_norm": norm,
        }

    @torch.no_grad()
    def _look(self) -> None:
        self.part.model.eval()
        with self.ema.swapped():
            figures = self.part.validate()
            picture = (
                self.part.preview()
                if self.step % self.config.sample_every == 0 or self.step == self.config.steps
                else None
            )
        self._log({f"validation/{key}": value for key, value in figures.items()})
        if picture is not None:
            from PIL import Image

            (self.folder / "samples").mkdir(exist_ok=True)
            Image.fromarray(picture).save(self.folder / "samples" / f"{self.step:07d}.png")

    def _log(self, figures: Mapping[str, float]) -> None:
        row = {
            "step": self.step,
            "samples": self.step * self.config.batch,
            "seconds": round(self.seconds, 1),
            **figures,
        }
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def export(self, folder: Path) -> None:
        """Write the averaged weights as the part's own files, and beside them a hundred lines of the run's
        metrics and every validation."""
        record = {
            "config": self.full_config,
            "steps": self.step,
            "samples": self.step * self.config.batch,
            "seconds": round(self.seconds),
        }
        self.part.model.eval()
        with torch.no_grad(), self.ema.swapped():
            self.part.export(folder, record)
        write_atomically(
            folder / f"{self.config.name}.jsonl", thinned(self.folder / "metrics.jsonl").encode()
        )


def lie_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Lay an optimiser's state out in memory as its weights are: the fused AdamW reads both in the order of
    memory, whatever their strides, and what was saved from a network with other strides would be taken for
    another weight's, in silence."""
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def thinned(metrics: Path, n: int = 100) -> str:
    """At most n of a file's lines of losses, evenly spaced with the last among them, and all its lines of
    validations."""
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    losses = [i for i, row in enumerate(rows) if "validation/" not in row]
    n = min(n, len(losses))
    kept = {losses[-1 - round(k * (len(losses) - 1) / max(n - 1, 1))] for k in range(n)}
    return "".join(row + "\n" for i, row in enumerate(rows) if i in kept or "validation/" in row)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 2**63  # a line cut short by a kill


def refuse_other_config(old: Any, new: Any, run: RunConfig, step: int) -> None:
    """Refuse to go on with another configuration: ValueError names each difference.

    Its name, and how often it reports, are its own affair; and it may be made longer or shorter so long as
    its learning rate has not begun to fall.
    """
    free = {"name", "log_every", "validate_every", "sample_every", "checkpoint_every"}
    decay = run.optimizer.decay
    if step <= min(old["run"]["steps"] - old["run"]["optimizer"]["decay"], run.steps - decay):
        free |= {"steps", "decay"}
    differences = [key for key in _differences(old, new) if key.rpartition(".")[2] not in free]
    if differences:
        raise ValueError(
            f"the run stands at step {step} with another configuration; it differs in"
            f" {', '.join(differences)}: give it a new name"
        )


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            d
            for key in keys
            for d in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [where]
