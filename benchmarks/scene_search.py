"""Where a template lies in an image: by correlation, then by least squares over place, size and tilt.

An image is given as its difference from the background, which is 0 where nothing is drawn. The gain of a
template at a pose is by how much it reduces the sum of squares when it is subtracted, per area of the canvas:
`2⟨image, template⟩ − |template|²`. It is the energy of what is drawn if the template fits exactly, and not
above 0 if it does not fit at all.

A pose is (x, y, side, tilt): centre and side as fractions of the canvas, and radians counterclockwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GRID, PERIOD = 32, 54  # pixels of the canvas for correlations, and their period: no template reaches round it
STEP_LIMITS = (0.08, 0.08, 0.08, 0.08)  # of a step of least squares: shift and growth per side, tilt


def pyramid(image: Tensor, levels: int = 4) -> list[Tensor]:
    """Return an image (3, H, W) and its averages over 2, 4, ... pixels."""
    found = [image]
    for _ in range(levels - 1):
        found.append(F.avg_pool2d(found[-1], 2))
    return found


def sample(levels: list[Tensor], poses: Tensor, side: int) -> Tensor:
    """Return what an image shows in the frames of poses.

    Args:
        levels: The pyramid of the image.
        poses: (n, 4).
        side: Pixels of each frame.

    Returns:
        (n, 3, side, side); 0 outside the canvas. Read where a pixel of the frame is about one of the image.
    """
    step = float(poses[:, 2].mean()) * levels[0].shape[-1] / side
    level = max(0, min(len(levels) - 1, round(math.log2(step))))
    image = levels[level]
    grid = _grid(_affine(poses), side)
    return F.grid_sample(image.expand(len(poses), -1, -1, -1), grid, align_corners=False)


def _affine(poses: Tensor) -> Tensor:
    """Return the maps from a frame to the canvas, both in [−1, 1], (n, 2, 3)."""
    x, y, side, tilt = poses.unbind(1)
    cos, sin = side * tilt.cos(), side * tilt.sin()
    rows = [torch.stack([cos, sin, 2 * x - 1], 1), torch.stack([-sin, cos, 2 * y - 1], 1)]
    return torch.stack(rows, 1)


def _grid(maps: Tensor, side: int) -> Tensor:
    """Return where maps (n, 2, 3) send the pixels of a frame, (n, side, side, 2)."""
    ticks = (2 * torch.arange(side) + 1) / side - 1
    points = torch.stack([ticks.expand(side, side), ticks[:, None].expand(side, side)], -1).view(-1, 2)
    return (points @ maps[:, :, :2].mT + maps[:, None, :, 2]).view(-1, side, side, 2)


def gains(seen: Tensor, templates: Tensor, poses: Tensor) -> Tensor:
    """Return the gains of templates (n, 3, S, S) where frames show `seen`, (n,)."""
    pixels = templates[0, 0].numel()
    fits = (2 * seen - templates).mul(templates).flatten(1).sum(1) / pixels
    return fits * poses[:, 2].square()


def correlate(
    image: Tensor, templates: Tensor, sides: Sequence[float], tilts: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return the gain of every template, side and tilt with its centre in every pixel of the canvas.

    Args:
        image: (3, 32, 32).
        templates: (n, 3, P, P).
        sides: Sides to try.
        tilts: Tilts to try, in radians.

    Returns:
        The gains (K, 32, 32), and the template, side and tilt of each of the K = n · sides · tilts, (K, 3).
    """
    kinds = torch.tensor([[i, s, t] for i in range(len(templates)) for s in sides for t in tilts])
    x, side, tilt = torch.zeros(len(kinds)), kinds[:, 1], kinds[:, 2]
    # the frame of the whole period as the template sees it: the inverse of its pose
    wide = torch.stack([x, x, PERIOD / GRID / side, -tilt], 1)
    theta = _affine(wide)
    # the centre of the template in the middle of pixel PERIOD/2
    theta[:, :, 2] = -(theta[:, :, :2] @ torch.full((2, 1), 1 / PERIOD))[..., 0]
    levels = pyramid(templates.flatten(0, 1), 2)
    drawn = torch.empty(len(kinds), 3, PERIOD, PERIOD)
    for level, chosen in zip(levels, (side > 0.6, side <= 0.6), strict=True):
        if chosen.any():
            grid = _grid(theta[chosen], PERIOD)
            sources = level.unflatten(0, (-1, 3))[kinds[chosen, 0].long()]
            drawn[chosen] = F.grid_sample(sources, grid, align_corners=False)
    energy = drawn.square().flatten(1).sum(1)
    canvas = F.pad(image, (0, PERIOD - GRID, 0, PERIOD - GRID))
    spectra = torch.fft.rfft2(drawn.roll((-(PERIOD // 2),) * 2, (2, 3))).conj() * torch.fft.rfft2(canvas)
    products = torch.fft.irfft2(spectra.sum(1), s=(PERIOD, PERIOD))[:, :GRID, :GRID]
    return (2 * products - energy.view(-1, 1, 1)) / GRID**2, kinds


def peaks(found: Tensor, kinds: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the highest maxima of the gains and kinds of `correlate`: poses (m, 4) and templates (m,)."""
    best, which = found.max(0)
    is_peak = (F.max_pool2d(best[None], 3, 1, 1)[0] == best) & (best > 0)
    y, x = is_peak.nonzero(as_tuple=True)
    order = best[y, x].argsort(descending=True)[:most]
    y, x = y[order], x[order]
    chosen = kinds[which[y, x]]
    poses = torch.stack([(x + 0.5) / GRID, (y + 0.5) / GRID, chosen[:, 1], chosen[:, 2]], 1)
    return poses, chosen[:, 0].long()


def refine(levels: list[Tensor], templates: Tensor, poses: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Improve poses by Gauss–Newton steps (inverse compositional, Baker and Matthews 2004).

    Args:
        levels: The pyramid of the image.
        templates: (n, 3, S, S).
        poses: (n, 4), the start of each template.
        steps: Number of steps.

    Returns:
        The poses of the largest gains met, (n, 4), and these gains, (n,).
    """
    if not len(poses):
        return poses, torch.empty(0)
    side = templates.shape[-1]
    jacobian = _jacobian(templates)  # (n, 4, 3·S·S)
    hessian = jacobian @ jacobian.mT
    hessian = hessian + torch.diag_embed(hessian.diagonal(dim1=1, dim2=2) * 1e-3 + 1e-6)
    best = torch.full((len(poses),), -torch.inf)
    kept, limits = poses.clone(), torch.tensor(STEP_LIMITS)
    for step in range(steps + 1):
        seen = sample(levels, poses, side)
        gain = gains(seen, templates, poses)
        better = gain > best
        best, kept = torch.where(better, gain, best), torch.where(better[:, None], poses, kept)
        if step == steps:
            break
        slope = jacobian @ (seen - templates).flatten(1)[:, :, None]
        move = torch.linalg.solve(hessian, slope)[..., 0].clamp(-limits, limits)
        x, y, size, tilt = poses.unbind(1)
        cos, sin = size * tilt.cos(), size * tilt.sin()
        poses = torch.stack(
            [
                x - cos * move[:, 0] - sin * move[:, 1],
                y + sin * move[:, 0] - cos * move[:, 1],
                size / (1 + move[:, 2]),
                tilt - move[:, 3],
            ],
            1,
        )
    return kept, best


def _jacobian(templates: Tensor) -> Tensor:
    """Return the derivatives of templates by shift (2), growth and tilt, per side, (n, 4, 3·S·S)."""
    side = templates.shape[-1]
    padded = F.pad(templates, (1, 1, 1, 1))
    dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) * (side / 2)
    dy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) * (side / 2)
    ticks = (torch.arange(side) + 0.5) / side - 0.5
    u, v = ticks.view(1, 1, 1, -1), ticks.view(1, 1, -1, 1)
    return torch.stack([dx, dy, u * dx + v * dy, v * dx - u * dy], 1).flatten(2)


def around(pose: Tensor, shifts: Sequence[float], scales: Sequence[float]) -> Tensor:
    """Return poses (n, 4) near one (4,): shifted by shares of its side in both directions, and scaled."""
    x, y, side, tilt = pose.tolist()
    choices = itertools.product(shifts, shifts, scales)
    return torch.tensor([[x + i * side, y + j * side, side * k, tilt] for i, j, k in choices])
