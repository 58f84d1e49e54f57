"""Two implementations of a network over one set of random weights, for comparing their outputs.

The weights are in memory once. No weight is left at 0 or 1, so that every one of them has an effect.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.models.meta import on_meta

# Largest difference, relative to the output's RMS, that float32 sums in a different order cause over tens of
# layers.
TOLERANCE = 1e-4
# Smallest difference, relative to the output's RMS, that weights in a wrong order cause.
VISIBLE = 1e-2


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Allocate a module that was built on the meta device, and fill it with random weights.

    The weights are uniform and preserve the RMS of signals; gains of norms are around 1, biases around 0.
    """
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1:
                p.uniform_(-0.2, 0.2, generator=generator)
                if name.endswith("weight"):
                    p.add_(1.0)
            else:
                bound = (
                    1.0
                    if "embed" in name and p.ndim == 2 and "linear" not in name
                    else (3.0 / p[0].numel()) ** 0.5
                )
                p.uniform_(-bound, bound, generator=generator)
    return module.eval()


@contextmanager
def twins(
    peer: Callable[[], nn.Module], ours: Callable[[], nn.Module]
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield (peer's network, ldm's network) over one set of random weights; free the memory afterwards.

    Loading is strict: both networks must have the same names and shapes.
    """
    with torch.device("meta"):
        theirs = peer()
    with on_meta():
        mine = ours()
    fill(theirs)
    buffers = {name for name, _ in theirs.named_buffers()}
    mine.load_state_dict(
        {key: value for key, value in theirs.state_dict().items() if key not in buffers}, assign=True
    )
    mine.eval()
    parameters = dict(theirs.named_parameters())
    assert all(p.data_ptr() == parameters[name].data_ptr() for name, p in mine.named_parameters())
    try:
        with torch.inference_mode():
            yield theirs, mine
    finally:
        theirs.to("meta")
        mine.to("meta")
        parameters.clear()
        gc.collect()


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference divided by the RMS of the expected output."""
    assert ours.shape == theirs.shape and theirs.isfinite().all()
    return float((ours - theirs).abs().max() / theirs.square().mean().sqrt())


def rotate_qkv(module: nn.Module, at: str) -> None:
    """Give q the weights of k, k those of v, and v those of q in the attention layer named `at`."""
    attention = module.get_submodule(at)
    names = [
        name for name in ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj") if hasattr(attention, name)
    ]
    weights = [getattr(attention, name).weight for name in names]
    assert len({tuple(weight.shape) for weight in weights}) == 1
    for name, weight in zip(names, (*weights[1:], weights[0]), strict=True):
        getattr(attention, name).weight = weight
