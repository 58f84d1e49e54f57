"""The training loop of every network; interruptions change nothing in its results.

All random numbers of a sample are drawn from (seed, sample) alone (see `ldm.training.draws`). The state of a
run is therefore its step, its weights, their averages, and the optimizer's moments. Several processes that
`torchrun` has started train on the same batches as one, each on its share (see `ldm.training.distributed`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldm.speed.optimization import for_training
from ldm.support.config import filled, to_dict
from ldm.support.device import dtype_of, fast_dtype
from ldm.support.files import open_atomically, staged_folder, write_atomically
from ldm.support.progress import progress_bar
from ldm.support.scalars import whole_number
from ldm.training.checkpoint import BeginsWithModel, check_resumable, check_same_base
from ldm.training.config import RunConfig
from ldm.training.distributed.processes import ONE_PROCESS, Processes
from ldm.training.distributed.saving import load_state, save_state
from ldm.training.distributed.sharding import clip_gradient, local, whole
from ldm.training.distributed.state import TrainingTensors
from ldm.training.draws import Draws
from ldm.training.ema import EMA
from ldm.training.lock import folder_lock
from ldm.training.metrics import append_row, drop_later_rows, has_validation, thin_rows
from ldm.training.optimizers import make_optimizer
from ldm.training.power_averages import average_of_width, write_snapshot


class Trainable(Protocol):
    """What the loop trains: a module, its loss, and how to validate, show and export it."""

    @property
    def model(self) -> nn.Module:
        """The module whose parameters are trained, and whose state checkpoints hold."""

    def loss(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of samples and further figures to log, from the draws alone.

        They are means over the whole batch as `Draws.mean` takes them.
        """

    def describe_batch(self, draws: Draws) -> list[str]:
        """Return what the samples of `loss` are, for error messages."""

    def validate(self) -> dict[str, float]:
        """Return figures on fixed data, with the model's present weights."""

    def preview(self) -> np.ndarray | None:
        """Return an image (H, W, 3) uint8 of what the model generates, or None."""

    def export(self, folder: Path, record: Mapping[str, object]) -> None:
        """Write the model's present weights and everything needed to use them."""


def check_until(until: Any) -> None:  # Any: an option
    """Raise ValueError unless `until` is None or a step."""
    if until is not None:
        whole_number("until", until, least=1)


class Run:
    """A network in training, in a folder with a checkpoint, ``metrics.jsonl`` and ``samples/``.

    Args:
        part: The network in training.
        config: Length, batches, optimizer and reports.
        full_config: The configuration dataclass that the run was made from, kept in its checkpoints.
        folder: The run's folder; a checkpoint in it is resumed.
        device: Where to train.
        processes: The processes that train together. Default: this one alone.

    Raises:
        ValueError: If the checkpoint in the folder was made with another configuration, or began with
            another model; or if a batch has fewer samples than there are processes, times `accumulate`.
    """

    def __init__(
        self,
        part: Trainable,
        config: RunConfig,
        full_config: Any,
        folder: Path,
        device: torch.device,
        processes: Processes = ONE_PROCESS,
    ) -> None:
        if config.batch < processes.size * config.accumulate:
            raise ValueError(
                f"batch {config.batch}: expected at least accumulate {config.accumulate} times the number of"
                f" processes, {processes.size}"
            )
        self.part, self.config, self.folder, self.device = part, config, folder, device
        self.processes = processes
        self.full_config: dict[str, Any] = to_dict(full_config)
        self.base = dict(part.base_hashes) if isinstance(part, BeginsWithModel) else {}
        self.as_now = partial(filled, type(full_config))
        if device.type == "cpu":
            for_training(part.model)
        self.call = processes.wrap(part.model, config.distributed)
        self.parameters = [p for p in part.model.parameters() if p.requires_grad]
        self.ema = EMA(part.model, config.ema, widths=config.widths, on_cpu=config.ema_on_cpu)
        self.optimizer = make_optimizer(part.model, config.optimizer)
        self.dtype = fast_dtype(device) if config.precision == "auto" else dtype_of(config.precision)
        self.step = 0
        self.seconds = 0.0
        self._resume()

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken."""
        return self.step >= self.config.steps

    def _resume(self) -> None:
        state = load_state(self.folder, self._tensors(), self.processes, self._check_resumable)
        if state is None:
            return
        self.step, self.seconds = state["step"], state["seconds"]
        # the steps behind it are taken again
        self.processes.once(lambda: drop_later_rows(self.folder / "metrics.jsonl", self.step))

    def _check_resumable(self, state: Mapping[str, Any]) -> None:
        check_resumable(self.as_now(state["config"]), self.full_config, self.config, state["step"])
        check_same_base(state.get("base"), self.base)

    def _tensors(self) -> TrainingTensors:
        return TrainingTensors(model=self.part.model, ema=self.ema, optimizer=self.optimizer)

    def save(self) -> None:
        """Write the checkpoint; it appears when it is complete."""
        about = {
            "config": self.full_config,
            "base": self.base,
            "step": self.step,
            "seconds": self.seconds,
        }
        save_state(self.folder, self._tensors(), about, self.processes)

    def train(self, *, until: int | None = None, progress: bool = True) -> None:
        """Train from the present step to the last one, then save.

        Args:
            until: Stop at this step; None for the configuration's last one. Default: None.
            progress: Whether to show a progress bar on a terminal. Default: True.

        Raises:
            ValueError: If `until` is below 1, or another process trains in the folder.
            FloatingPointError: If the loss or a gradient is not finite. It is raised before the step changes
                anything, and names the step, the samples and the first parameter; the last checkpoint is
                kept.
        """
        check_until(until)
        last = self.config.steps if until is None else min(until, self.config.steps)
        with ExitStack() as stack:
            self.processes.once(lambda: stack.enter_context(folder_lock(self.folder)))
            self._train(last, progress and self.processes.first)

    def _train(self, last: int, progress: bool) -> None:
        config = self.config
        if self.step % config.validate_every == 0 and self.step > 0 or self.finished:
            if not self.processes.once(lambda: has_validation(self.folder / "metrics.jsonl", self.step)):
                self._validate()  # the run was interrupted between the checkpoint and its validation
        bar = progress_bar(last, progress, initial=self.step, smoothing=0.05)
        pending: list[dict[str, Tensor]] = []
        started = mark = time.perf_counter()
        before = self.seconds
        while self.step < last:
            pending.append(self._one_step())
            self.step += 1
            self.seconds = before + time.perf_counter() - started
            bar.update()
            if self.step % config.log_every == 0 or self.step == last:
                figures = self._log_losses(pending, mark)
                pace = figures["samples_per_second"]
                bar.set_postfix(loss=f"{figures['loss']:.4f}", samples=f"{pace:.0f}/s")
                pending, mark = [], time.perf_counter()
            if config.widths and (self.step % config.widths_every == 0 or self.step == config.steps):
                self._write_averages()
            if self.step % config.checkpoint_every == 0 or self.step == last:
                self.save()
            if self.step % config.validate_every == 0 or self.step == last:
                self._validate()
                mark = time.perf_counter()
        bar.close()

    def _one_step(self) -> dict[str, Tensor]:
        opt = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = opt.rate(self.step, self.config.steps)
        self.part.model.train()
        means = self._backward()
        norm = self.processes.gradient_norm(self.parameters)
        if not bool(torch.isfinite(means["loss"]) & torch.isfinite(norm)):
            raise FloatingPointError(self._describe_overflow(float(means["loss"]), float(norm)))
        if opt.clip > 0:
            clip_gradient(self.parameters, norm, opt.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        return {**means, "grad_norm": norm}

    def _backward(self) -> dict[str, Tensor]:
        """Compute the gradients of the batch, part by part; return the means of loss and figures."""
        parts, found = self._draws(self.processes).parts(self.config.accumulate), []
        for part in parts:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss, figures = self.call(self.part.loss, part)
            (loss * part.weight).backward()
            found.append(self.processes.means({"loss": loss, **figures}))
        if len(found) == 1:
            return found[0]
        means: dict[str, Tensor] = {}
        for key in found[0]:
            values = torch.stack([each[key] for each in found])
            weights = values.new_tensor([part.weight for part in parts])
            known = ~values.isnan() | (key == "loss")  # a part without such samples has NaN
            means[key] = (values * weights)[known].sum() / weights[known].sum()
        return means

    def _draws(self, processes: Processes) -> Draws:
        """Return this process's share of the present batch, or all of it for one process alone."""
        return Draws.of_step(self.config.seed, self.step, self.config.batch, processes)

    def _describe_overflow(self, loss: float, norm: float) -> str:
        """Return the message for a loss or gradient that is not finite."""
        bad = (
            name
            for name, p in self.part.model.named_parameters()
            if not bool(torch.isfinite(local(p)).all())
            or (p.grad is not None and not bool(torch.isfinite(local(p.grad)).all()))
        )
        samples = self.part.describe_batch(self._draws(ONE_PROCESS))
        shown = ", ".join(map(repr, samples[:8])) + (f" and {len(samples) - 8} more" * (len(samples) > 8))
        return (
            f"step {self.step + 1}: the loss is {loss:.4g} and the gradient norm {norm:.4g}; the first"
            f" parameter that is not finite, or has such a gradient, is {next(bad, 'none')!r}; the samples"
            f" are {shown}. The step was not taken, and the last checkpoint is kept"
        )

    def _log_losses(self, pending: list[dict[str, Tensor]], mark: float) -> dict[str, float]:
        """Log and return the means of the figures since `mark`, which are those of the steps in `pending`."""
        rate = len(pending) * self.config.batch / (time.perf_counter() - mark)
        means = {key: float(torch.stack([row[key] for row in pending]).nanmean()) for key in pending[0]}
        figures = {key: value for key, value in means.items() if not math.isnan(value)}
        figures["samples_per_second"] = round(rate, 2)
        self._log(figures)
        return figures

    @torch.no_grad()
    def _validate(self) -> None:
        shows = self.step % self.config.sample_every == 0 or self.step == self.config.steps
        self.part.model.eval()
        with self.ema.swapped():
            figures = self.call(self.part.validate)
            image = self.call(self.part.preview) if shows else None
        self._log({f"validation/{key}": value for key, value in figures.items()})
        if image is not None and self.processes.first:
            from PIL import Image

            with open_atomically(self.folder / "samples" / f"{self.step:07d}.png") as file:
                Image.fromarray(image).save(file, format="PNG")

    def _write_averages(self) -> None:
        """Write the averages of the widths, whole ones."""
        averages = {
            width: {name: whole(value) for name, value in values.items()}
            for width, values in self.ema.widths.items()
        }
        self.processes.once(lambda: write_snapshot(self.folder, self.step, averages))

    def _log(self, figures: Mapping[str, float]) -> None:
        if not self.processes.first:
            return
        counts = {"step": self.step, "samples": self.step * self.config.batch}
        append_row(self.folder / "metrics.jsonl", {**counts, "seconds": round(self.seconds, 1), **figures})

    def export(self, folder: Path, *, width: float | None = None, step: int | None = None) -> None:
        """Write the averaged weights as the part's own files, and an excerpt of the metrics beside them.

        All are written in a new folder beside, from which they are moved at the end. Other files of `folder`
        are kept.

        Args:
            folder: The folder to write.
            width: Width of the average, see `ldm.training.power_averages`; None for the exponential one.
                Default: None.
            step: The step at whose end the average of a width is taken; None for the last one.
                Default: None.

        Raises:
            FileNotFoundError: If a width is asked for, and the run has no `widths`.
            ValueError: If the width or the step is out of range, or there is a step without a width.
        """
        if width is None and step is not None:
            raise ValueError(
                f"step {step}: expected a width too, as other averages are kept at one step only"
            )
        record: dict[str, object] = {
            "config": self.full_config,
            "steps": self.step,
            "samples": self.step * self.config.batch,
            "seconds": round(self.seconds),
        }
        values = None
        if width is not None:
            values = average_of_width(self.folder, width, step=step)
            record["average"] = {"width": width, "step": self.step if step is None else step}
        self.part.model.eval()
        keys = set[str]()  # the records of the parts, without which their weights are not read
        with staged_folder(folder, keys, lambda _: ()) as stage:
            with torch.no_grad(), self.ema.swapped(values):
                self.part.export(stage, record)
            curve = thin_rows(self.folder / "metrics.jsonl")
            write_atomically(stage / f"{self.config.name}.jsonl", curve.encode())
            keys |= {path.name for path in stage.glob("*.yaml")}
