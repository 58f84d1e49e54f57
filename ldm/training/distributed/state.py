"""The tensors of a training by name, whichever process holds which part of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.training.distributed.sharding import local, split_like
from ldm.training.ema import EMA

TensorShapes = Mapping[str, tuple[torch.Size, torch.dtype]]


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingTensors:
    """The tensors of a training: ``model.NAME``, ``ema.NAME``, and ``optimizer.NAME.KEY`` of its moments.

    Args:
        model: The network.
        ema: The average of its weights.
        optimizer: The optimizer of its weights.
    """

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the optimizer by name, in the order of its state."""
        names = {p: name for name, p in self.model.named_parameters()}
        return {names[p]: p for group in self.optimizer.param_groups for p in group["params"]}

    def weights(self) -> dict[str, Tensor]:
        """Return weights, buffers and averages, which share memory with those of the training."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        return {**state, **{f"ema.{name}": value for name, value in self.ema.state_dict().items()}}

    def named(self) -> dict[str, Tensor]:
        """Return all tensors, which share memory with those of the training."""
        moments = {
            f"optimizer.{name}.{key}": value
            for name, p in self.trained().items()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        return {**self.weights(), **moments}

    def places_for(self, shapes: TensorShapes) -> dict[str, Tensor]:
        """Return tensors that a checkpoint of these shapes can be read into.

        Raises:
            ValueError: If it has other weights than the training.
        """
        places, trained = self.weights(), self.trained()
        for name, (shape, dtype) in shapes.items():
            kind, _, rest = name.partition(".")
            p = trained.get(rest.rpartition(".")[0]) if kind == "optimizer" else None
            if p is not None:
                whole = p.shape == shape
                places[name] = (
                    torch.zeros_like(p.detach()) if whole else torch.zeros(shape, dtype=dtype, device="cpu")
                )
        _check_names(places, shapes)
        return places

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Load tensors that `named` has returned, whole ones or those of `places_for`.

        Raises:
            ValueError: If names or shapes differ from those of the training.
        """
        own, trained = self.weights(), self.trained()
        _check_names({**own, **{name: value for name, value in values.items() if name not in own}}, values)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in values.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                of, _, key = rest.rpartition(".")
                if of not in trained:
                    raise ValueError(f"the checkpoint has moments of {of!r}, which is not trained")
                p = trained[of]
                kept = split_like(value, p.data) if value.shape == p.shape else value
                moments.setdefault(list(trained).index(of), {})[key] = kept
            else:
                if own[name].shape != value.shape:
                    raise ValueError(
                        f"{name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}"
                    )
                with torch.no_grad():
                    local(own[name]).copy_(local(split_like(value, own[name])))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _check_names(own: Mapping[str, object], read: Mapping[str, object]) -> None:
    if own.keys() != read.keys():
        differing = sorted(own.keys() ^ read.keys())
        raise ValueError(f"the checkpoint is of another network: they differ in {', '.join(differing[:5])}")


def packed_tensors(state: Mapping[str, dict], trained: list[str]) -> dict[str, Tensor]:
    """Return the tensors by name in the state of a single process.

    Args:
        state: Its "model", "ema" and "optimizer" as their `state_dict` returns them.
        trained: Names of the optimizer's parameters, in its order.
    """
    moments = state["optimizer"]["state"]
    return {
        **{f"model.{name}": value for name, value in state["model"].items()},
        **{f"ema.{name}": value for name, value in state["ema"].items()},
        **{
            f"optimizer.{trained[index]}.{key}": value
            for index, values in moments.items()
            for key, value in values.items()
        },
    }
