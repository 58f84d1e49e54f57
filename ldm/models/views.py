"""Layers through which the tokens of a transformer look at exemplar images.

Cross-attention to an exemplar tells a token what the image shows. A view brings the details: the token
predicts where the thing that it draws lies in the exemplar, how large and how tilted, and samples its own
patch of the image there (Jaderberg et al. 2015, Spatial Transformer Networks; Zhu et al. 2021, Deformable
DETR).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Sight:
    """Where the tokens of a grid look in K exemplars.

    A token at the point p of the canvas is centred on the point (u, v) of an exemplar, and a point of the
    canvas at p + (dx, dy) shows its point (u + a·dx − b·dy, v + b·dx + a·dy). Points are fractions of the
    width and the height.

    Attributes:
        maps: The numbers (u, v, a, b), shape (B, L, K, 4), float32.
        shown: Logits of the token drawing a part of the exemplar, shape (B, L, K), float32.
    """

    maps: Tensor
    shown: Tensor


def token_centres(h: int, w: int, device: torch.device | str | None = None) -> Tensor:
    """Return the centres (x, y) of the cells of a grid, fractions of its width and height.

    Args:
        h, w: Rows and columns.
        device: Device of the result. Default: the CPU.

    Returns:
        Shape (h·w, 2), float32, row by row.
    """
    device = torch.device("cpu") if device is None else device
    y, x = ((torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n for n in (h, w))  # (h,), (w,)
    return torch.stack([x[None].expand(h, w), y[:, None].expand(h, w)], dim=-1).flatten(0, 1)


def exemplar_planes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return exemplars (B, K, 4, S, S) in float32, at full size and at half size (B, K, 4, S/2, S/2)."""
    full = images.float()
    return full, F.avg_pool2d(full.flatten(0, 1), 2).unflatten(0, full.shape[:2])


def sample_patches(sight: Sight, planes: tuple[Tensor, Tensor], h: int, w: int, pixels: int) -> Tensor:
    """Return the patches of the exemplars that the tokens see.

    The images are sampled bilinearly, between full and half size as the map shrinks them, and are transparent
    outside. What a token sees of several exemplars is summed, each times its probability of being shown.

    Args:
        sight: Where the tokens look.
        planes: The exemplars, colors multiplied by opacity, at full and at half size.
        h, w: Rows and columns of the tokens.
        pixels: Side q of a patch.

    Returns:
        Red, green, blue and opacity of each token's patch, shape (B, h·w, 4, q, q), float32.
    """
    steps = (torch.arange(pixels, dtype=torch.float32, device=sight.maps.device) + 0.5) / pixels - 0.5
    dx, dy = steps[None, :] / w, steps[:, None] / h  # (1, q), (q, 1)
    u, v, a, b = (n[..., None, None] for n in sight.maps.unbind(-1))  # (B, L, K, 1, 1)
    points = torch.stack([u + a * dx - b * dy, v + b * dx + a * dy], dim=-1)  # (B, L, K, q, q, 2)
    grid = rearrange(2 * points - 1, "b l k y x n -> (b k) l (y x) n")
    # log2 of the exemplar's pixels per pixel of the patch: 0 samples the full size, 1 the half
    step = sight.maps.detach()[..., 2:].norm(dim=-1) * (planes[0].shape[-1] / (w * pixels))  # (B, L, K)
    level = step.clamp_min(1e-6).log2().clamp(0, 1)
    full, half = (
        rearrange(
            F.grid_sample(plane.flatten(0, 1), grid, padding_mode="zeros", align_corners=False),
            "(b k) c l n -> b l k c n",
            b=len(u),
        )
        for plane in planes
    )
    seen = torch.lerp(full, half, level[..., None, None])  # (B, L, K, 4, q²)
    seen = (seen * sight.shown.sigmoid()[..., None, None]).sum(2)  # (B, L, 4, q²)
    return seen.unflatten(-1, (pixels, pixels))


class Look(nn.Module):
    """The prediction of where tokens look; before training, as if the exemplar filled the canvas.

    Args:
        width: Width D of a token.
        slots: Largest number K of exemplars.
    """

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, 5 * slots)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, h: int, w: int, k: int) -> Sight:
        """Return where tokens (B, h·w, D) look in k exemplars."""
        raw = rearrange(self.proj_out(self.norm(x)).float(), "b l (k n) -> b l k n", k=self.slots)[:, :, :k]
        centres = token_centres(h, w, x.device)[:, None]  # (L, 1, 2)
        scale = torch.tensor([1.0, 0.0], dtype=torch.float32, device=x.device).expand_as(centres)
        return Sight(maps=raw[..., :4] + torch.cat([centres, scale], dim=-1), shown=raw[..., 4])


class View(nn.Module):
    """A layer that adds to each token what it sees of the exemplars.

    Args:
        width: Width D of a token.
        slots: Largest number K of exemplars.
        pixels: Side q of a token's patch in pixels.
    """

    def __init__(self, width: int, *, slots: int, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.look = Look(width, slots)
        self.embed_in = nn.Linear(4 * pixels**2, width)

    def forward(self, x: Tensor, planes: tuple[Tensor, Tensor], h: int, w: int) -> Tensor:
        """Return the tokens with what they see, (B, L, D).

        Args:
            x: Tokens, shape (B, L, D), L = h·w.
            planes: The exemplars, colors multiplied by opacity, (B, K, 4, S, S) and at half size.
            h, w: Rows and columns of the tokens.
        """
        sight = self.look(x, h, w, planes[0].shape[1])
        seen = sample_patches(sight, planes, h, w, self.pixels)  # (B, L, 4, q, q)
        return x + self.embed_in(seen.flatten(2).to(x.dtype))
