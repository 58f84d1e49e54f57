"""Training of views: where the tokens of a transformer should look in the exemplars of a scene.

The placements of a scene tell for each token which point of which exemplar it draws; see `ldm.models.views`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data import Placement, Scene
from ldm.models.dit import DiT
from ldm.models.views import Sight, token_centres
from ldm.training.config import check_at_least
from ldm.training.draws import Draws


@dataclass(frozen=True, kw_only=True)
class SightLoss:
    """Weights of the losses of views beside the diffusion loss.

    Args:
        where: Weight of the error of where tokens look, at least 0. Default: 0.3.
        shown: Weight of the error of whether they draw a part of the exemplar, at least 0. Default: 0.1.
    """

    where: float = 0.3
    shown: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(0, where=self.where, shown=self.shown)


@contextmanager
def record_sights(net: DiT) -> Iterator[list[Sight]]:
    """Collect the sights of a network's views, before and after each vote, while the context lasts."""
    found: list[Sight] = []
    with ExitStack() as stack:
        for layer in (layer for view in net.views for layer in (view.look, view.vote)):
            hook = layer.register_forward_hook(lambda module, inputs, sight: found.append(sight))
            stack.callback(hook.remove)
        yield found


def wanted_sights(
    scenes: Sequence[Scene | None], orders: Sequence[Sequence[int]], side: int, slots: int
) -> tuple[Tensor, Tensor]:
    """Return where the tokens of scenes should look.

    Args:
        scenes: B scenes; None for one without exemplars.
        orders: For each scene the thing of each slot.
        side: Rows and columns of the tokens.
        slots: Number K of slots.

    Returns:
        The maps of a `Sight`, (B, side², K, 4), and whether each token touches the square of the exemplar,
        bool, (B, side², K). Of a thing that is there several times, a token draws the nearest.
    """
    centres = token_centres(side, side).numpy()  # (L, 2)
    maps = np.zeros((len(scenes), side**2, slots, 4), dtype=np.float32)
    gaps = np.full((len(scenes), side**2, slots), np.inf, dtype=np.float32)
    for i, (scene, order) in enumerate(zip(scenes, orders, strict=True)):
        for slot, thing in enumerate(order):
            assert scene is not None
            for placement in (p for p in scene.placements if p.thing == thing):
                own, gap = placed_map(placement, centres)
                nearer = gap < gaps[i, :, slot]
                maps[i, nearer, slot] = own[nearer]
                gaps[i, nearer, slot] = gap[nearer]
    return torch.from_numpy(maps), torch.from_numpy(gaps < 0.5 / side)


def placed_map(placement: Placement, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the maps of points under a placement (L, 4), and their distances from its square (L,).

    Distances are fractions of the canvas, along the axes of the square, and negative inside it.
    """
    angle = np.radians(placement.tilt)
    a, b = np.cos(angle) / placement.side, np.sin(angle) / placement.side
    dx, dy = centres[:, 0] - placement.x, centres[:, 1] - placement.y
    u, v = 0.5 + a * dx - b * dy, 0.5 + b * dx + a * dy  # (L,)
    gap = (np.maximum(np.abs(u - 0.5), np.abs(v - 0.5)) - 0.5) * placement.side
    return np.stack([u, v, np.full_like(u, a), np.full_like(u, b)], axis=-1), gap


def sight_losses(
    sights: Sequence[Sight], maps: Tensor, touched: Tensor, side: int, draws: Draws
) -> dict[str, Tensor]:
    """Return the mean losses of views, "where" and "shown".

    "where" is the smooth L1 distance of the maps of tokens that touch an exemplar's square, with points in
    units of `side`-ths of the exemplar; "shown" is the binary cross-entropy of touching it.

    Args:
        sights: What the views predict, at least one.
        maps: What they should, (B, L, K, 4).
        touched: Whether tokens touch the squares, (B, L, K).
        side: Rows and columns of the tokens.
        draws: The samples, over whose whole batch the means are taken.
    """
    units = torch.tensor([side, side, 1, 1], dtype=torch.float32, device=maps.device)
    where, shown = [], []
    for sight in sights:
        errors = F.smooth_l1_loss(sight.maps * units, maps * units, reduction="none", beta=0.1).mean(-1)
        where.append(draws.mean_of_some(errors * touched, touched.sum()).nan_to_num())
        shown.append(
            draws.mean(F.binary_cross_entropy_with_logits(sight.shown, touched.float(), reduction="none"))
        )
    return {"where": torch.stack(where).mean(), "shown": torch.stack(shown).mean()}
