"""The optimizers of training: AdamW, and Muon for the hidden matrices with AdamW for the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.support.device import fast_dtype
from ldm.training.config import OptimizerConfig
from ldm.training.distributed.sharding import split_like, whole

# Layers at the ends of a network, whose rows or columns are not its features: Muon is not for them.
_END_LAYERS = re.compile(
    r"(^|\.)(\w*embed\w*|conv_in|conv_out|proj_out|lm_head|project|unproject|time_modulation)(\.|$)"
)
# The quintic iteration of Jordan et al. 2024, which moves singular values to about 1 in five steps
_QUINTIC = (3.4445, -4.7750, 2.0315)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a model's parameters that require gradients."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.kind == "adamw":
        return torch.optim.AdamW(
            alike(named.values()),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
    hidden = hidden_matrices(model)
    return Muon(
        [p for name, p in named.items() if name in hidden],
        [p for name, p in named.items() if name not in hidden],
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        dtype=fast_dtype(next(iter(named.values())).device),
    )


def alike(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Return parameters in groups that one call can update: the sharded ones, and the others."""
    groups: dict[type, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(type(p.data), []).append(p)
    return [{"params": group} for group in groups.values()]


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights of linear and convolutional layers inside a network.

    Left out are embeddings, and the layers that read the input or make the output.
    """
    return {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and not _END_LAYERS.search(name)
    }


def orthogonalized(x: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return about U·Vᵀ of a matrix U·S·Vᵀ, by Newton–Schulz iterations.

    The singular values of the result are between about 0.7 and 1.2 (Jordan et al. 2024).

    Args:
        x: A matrix, shape (m, n).
        steps: Number of iterations. Default: 5.
        dtype: Type of the iterations; bfloat16 suffices for Muon. Default: float32.

    Returns:
        Shape (m, n), of the type of x.
    """
    a, b, c = _QUINTIC
    given, tall = x.dtype, x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(given)


class Muon(torch.optim.Optimizer):
    """Muon for matrices (Jordan et al. 2024), AdamW for the other parameters, with one learning rate.

    The update of a matrix (m, n) is its orthogonalized Nesterov momentum times 0.2·√max(m, n), which has the
    RMS of a usual update of AdamW, so that both take the same learning rate (Liu et al. 2025, section 2.2).
    Filters (m, c, h, w) are matrices (m, c·h·w).

    PyTorch's own `Muon` takes matrices only and always iterates in bfloat16, which is slow on CPUs
    that emulate it.

    Args:
        matrices: Parameters with two or more dimensions.
        others: The other parameters.
        lr: Learning rate.
        betas: AdamW's decay rates of the moments.
        weight_decay: Weight decay of both, as a multiple of the learning rate.
        momentum: Decay rate of Muon's momentum. Default: 0.95.
        dtype: Type of Muon's iterations, see `orthogonalized`. Default: float32.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if flat := [tuple(p.shape) for p in matrices if p.ndim < 2]:
            raise ValueError(f"matrices: expected two or more dimensions, got {flat[0]}")
        groups = [
            {"params": params, "matrices": is_matrix}
            for params, is_matrix in ((matrices, True), (others, False))
            if params
        ]
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "momentum": momentum, "eps": 1e-8}
        super().__init__(groups, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient.

        Args:
            closure: Not supported; None.
        """
        if closure is not None:
            raise ValueError("closure: expected None, Muon evaluates the loss once per step")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    update = self._of_matrix(p, group) if group["matrices"] else self._of_adam(p, group)
                    p.add_(update, alpha=-group["lr"])

    def _of_matrix(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        state, grad = self.state[p], p.grad
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(p)
        mean = state["momentum"].lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(mean, group["momentum"])  # Nesterov
        matrix = whole(ahead).flatten(1)  # (m, n); of a sharded parameter, from all processes
        made = orthogonalized(matrix, dtype=self.dtype) * (0.2 * max(matrix.shape) ** 0.5)
        return split_like(made.reshape(p.shape), p)

    def _of_adam(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        state, grad, (beta1, beta2) = self.state[p], p.grad, group["betas"]
        assert grad is not None
        if not state:
            state.update(
                step=torch.zeros((), device="cpu", dtype=torch.float32),
                exp_avg=torch.zeros_like(p),
                exp_avg_sq=torch.zeros_like(p),
            )
        state["step"] += 1
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        count = float(state["step"])
        return (mean / (1 - beta1**count)) / ((square / (1 - beta2**count)).sqrt() + group["eps"])
