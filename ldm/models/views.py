"""Layers through which the tokens of a transformer look at exemplar images.

Cross-attention to an exemplar tells a token what the image shows. A view brings the details: the token
predicts where the thing that it draws lies in the exemplar, how large and how tilted, and samples its own
patch of the image there (Jaderberg et al. 2015, Spatial Transformer Networks; Zhu et al. 2021, Deformable
DETR).

Views follow each other, and each corrects where the view before looked. It compares the token's patch of x_t
with what the exemplar shows around there, by correlations (Teed & Deng 2020, RAFT), and lets neighbouring
tokens, which mostly draw parts of the same thing, agree on one map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.layers.modules import ModuleListOf


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


Planes = tuple[Tensor, Tensor, Tensor]


def exemplar_planes(images: Tensor) -> Planes:
    """Return exemplars (B, K, 4, S, S) in float32, at full, half and quarter size."""
    full = images.float()
    half, quarter = (F.avg_pool2d(full.flatten(0, 1), n).unflatten(0, full.shape[:2]) for n in (2, 4))
    return full, half, quarter


def sample_points(plane: Tensor, maps: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Return exemplars at points around the centres of tokens, bilinearly, transparent outside.

    Args:
        plane: The exemplars, (B, K, 4, S, S) float32.
        maps: Maps of a `Sight`, (B, L, K, 4).
        dx, dy: The points, fractions of the canvas from the centre of a token, (1, m) and (n, 1).

    Returns:
        Shape (B, L, K, 4, n, m), float32.
    """
    u, v, a, b = (part[..., None, None] for part in maps.unbind(-1))  # (B, L, K, 1, 1)
    points = torch.stack([u + a * dx - b * dy, v + b * dx + a * dy], dim=-1)  # (B, L, K, n, m, 2)
    grid = rearrange(2 * points - 1, "b l k y x n -> (b k) l (y x) n")
    found = F.grid_sample(plane.flatten(0, 1), grid, padding_mode="zeros", align_corners=False)
    return rearrange(found, "(b k) c l (y x) -> b l k c y x", b=len(maps), y=len(dy))


def sample_patches(sight: Sight, planes: Planes, h: int, w: int, pixels: int) -> Tensor:
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
    # log2 of the exemplar's pixels per pixel of the patch: 0 samples the full size, 1 the half
    step = sight.maps.detach()[..., 2:].norm(dim=-1) * (planes[0].shape[-1] / (w * pixels))  # (B, L, K)
    level = step.clamp_min(1e-6).log2().clamp(0, 1)
    full, half = (sample_points(plane, sight.maps, dx, dy) for plane in planes[:2])
    seen = torch.lerp(full, half, level[..., None, None, None])  # (B, L, K, 4, q, q)
    return (seen * sight.shown.sigmoid()[..., None, None, None]).sum(2)  # (B, L, 4, q, q)


def first_sight(batch: int, h: int, w: int, k: int, device: torch.device) -> Sight:
    """Return the sight of tokens to whom each of k exemplars fills the canvas."""
    centres = token_centres(h, w, device)[:, None]  # (L, 1, 2)
    scale = torch.tensor([1.0, 0.0], dtype=torch.float32, device=device).expand_as(centres)
    maps = torch.cat([centres, scale], dim=-1).expand(batch, h * w, k, 4)
    return Sight(maps=maps, shown=torch.zeros(maps.shape[:3], dtype=torch.float32, device=device))


class Correlation(nn.Module):
    """A layer that adds to tokens how well their patch of x_t fits an exemplar around where they look.

    The patch is compared with patches of the exemplar at (2r + 1)² places, in steps of an eighth and of a
    quarter of its side, by inner products of learned features.

    Args:
        width: Width D of a token.
        channels: Numbers of a token's patch of the input.
        slots: Largest number K of exemplars.
        heads: Number of features that are compared apart. Default: 2.
        dim: Width of such a feature. Default: 16.
        reach: r, in steps. Default: 2.
    """

    SIDES = (8, 4)  # points along a patch's side, on the half and on the quarter plane

    def __init__(
        self, width: int, *, channels: int, slots: int, heads: int = 2, dim: int = 16, reach: int = 2
    ) -> None:
        super().__init__()
        self.slots, self.heads, self.reach = slots, heads, reach
        self.embed_patch: ModuleListOf[nn.Linear] = ModuleListOf(
            nn.Linear(channels, heads * dim) for _ in self.SIDES
        )
        self.embed_area: ModuleListOf[nn.Conv2d] = ModuleListOf(
            nn.Conv2d(4, heads * dim, n) for n in self.SIDES
        )
        self.embed_fit = nn.Linear(slots * len(self.SIDES) * heads * (2 * reach + 1) ** 2, width)

    def forward(self, patches: Tensor, sight: Sight, planes: Planes, h: int, w: int) -> Tensor:
        """Return what is added to the tokens, (B, L, D).

        Args:
            patches: The tokens' patches of the input, (B, L, C).
            sight: Where the tokens look.
            planes: The exemplars; see `exemplar_planes`.
            h, w: Rows and columns of the tokens.
        """
        levels = zip(self.SIDES, planes[1:], self.embed_patch, self.embed_area, strict=True)
        fits = torch.cat([self.fit(patches, sight.maps, *level, h, w) for level in levels], dim=-1)
        fits = F.pad(fits, (0, 0, 0, self.slots - fits.shape[2]))  # (B, L, K, N)
        return self.embed_fit(fits.flatten(2).to(patches.dtype))

    def fit(
        self,
        patches: Tensor,
        maps: Tensor,
        side: int,
        plane: Tensor,
        embed_patch: nn.Linear,
        embed_area: nn.Conv2d,
        h: int,
        w: int,
    ) -> Tensor:
        """Return the inner products at all places of one level, (B, L, K, heads·(2r + 1)²)."""
        count = side + 2 * self.reach
        steps = (torch.arange(count, dtype=torch.float32, device=maps.device) - (count - 1) / 2) / side
        with torch.no_grad():
            area = sample_points(plane, maps, steps[None, :] / w, steps[:, None] / h)  # (B, L, K, 4, m, m)
        there = embed_area(area.flatten(0, 2).to(patches.dtype))  # (B·L·K, heads·d, 2r + 1, 2r + 1)
        there = rearrange(there, "(b l k) (g d) y x -> b l g (k y x) d", b=len(maps), l=h * w, g=self.heads)
        own = rearrange(embed_patch(patches), "b l (g d) -> b l g d 1", g=self.heads)
        dim = own.shape[-2]
        fits = there @ (F.rms_norm(own.mT, (dim,)).mT / dim)  # (B, L, g, K·(2r + 1)², 1)
        return rearrange(fits, "b l g (k p) 1 -> b l k (g p)", k=maps.shape[2])


class Look(nn.Module):
    """The correction of where tokens look; before training, none.

    Args:
        width: Width D of a token.
        slots: Largest number K of exemplars.
    """

    # Of the prediction. A step of Adam moves each of the D weights by about the learning rate, and thus the
    # prediction by √D times that: with a unit of 1, by 4 of 128 pixels at a rate of 0.002.
    UNIT = 1 / 32

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, 5 * slots)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, sight: Sight) -> Sight:
        """Return where tokens (B, L, D) look that have looked at `sight`, which gets no gradient."""
        k = sight.maps.shape[2]
        raw = rearrange(self.proj_out(self.norm(x)).float(), "b l (k n) -> b l k n", k=self.slots)[:, :, :k]
        moved = sight.maps.detach() + self.UNIT * raw[..., :4]
        return Sight(maps=moved, shown=sight.shown.detach() + raw[..., 4])


class Vote(nn.Module):
    """The agreement of tokens on where they look.

    The map of each token states where any other point of the canvas lies, if it belongs to the same thing. A
    token takes the weighted mean of what all tokens state of its centre. The weights are those of attention,
    times the probability that a token shows the exemplar, and fall with the distance.

    Args:
        width: Width D of a token.
        slots: Largest number K of exemplars.
        dim: Width of queries and keys. Default: 16.
    """

    def __init__(self, width: int, slots: int, dim: int = 16) -> None:
        super().__init__()
        self.slots = slots
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, slots * dim, bias=False)
        self.to_k = nn.Linear(width, slots * dim, bias=False)
        self.falls = nn.Parameter(torch.full((slots,), 2.0))  # of the logit, per token of distance

    def forward(self, x: Tensor, sight: Sight, h: int, w: int) -> Sight:
        """Return where tokens (B, h·w, D) look after the vote; whether they show exemplars stays."""
        k, x = sight.maps.shape[2], self.norm(x)
        q, key = (
            rearrange(layer(x), "b l (k d) -> b k l d", k=self.slots)[:, :k]
            for layer in (self.to_q, self.to_k)
        )
        logits = (q @ key.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # (B, K, L, L)
        centres = token_centres(h, w, x.device)  # (L, 2)
        side = centres.new_tensor([w, h])
        distance = (side * (centres[:, None] - centres)).norm(dim=-1)  # (L, L), in tokens
        shown = F.logsigmoid(sight.shown).transpose(1, 2)[:, :, None]  # (B, K, 1, L)
        weights = (logits - self.falls[:k, None, None] * distance + shown).softmax(-1)  # (B, K, L, L)
        stated = origin_form(sight.maps, centres).transpose(1, 2)  # (B, K, L, 4)
        # not as a matrix product, which automatic mixed precision would round
        mean = (weights[..., None] * stated[:, :, None]).sum(-2).transpose(1, 2)  # (B, L, K, 4)
        return Sight(maps=origin_form(mean, -centres), shown=sight.shown)


def origin_form(maps: Tensor, centres: Tensor) -> Tensor:
    """Return maps (B, L, K, 4) that tell where the point 0 of the canvas lies, not the centre of a token.

    Args:
        maps: (u, v, a, b) of the centres.
        centres: The centres (x, y), (L, 2).
    """
    (u, v, a, b), (x, y) = maps.unbind(-1), centres[:, None].unbind(-1)
    return torch.stack([u - a * x + b * y, v - b * x - a * y, a, b], dim=-1)


class View(nn.Module):
    """A layer that corrects where tokens look, and adds to each what it sees of the exemplars there.

    Args:
        width: Width D of a token.
        channels: Numbers of a token's patch of the input.
        slots: Largest number K of exemplars.
        pixels: Side q of a token's patch in pixels.
    """

    def __init__(self, width: int, *, channels: int, slots: int, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.correlation = Correlation(width, channels=channels, slots=slots)
        self.look = Look(width, slots)
        self.vote = Vote(width, slots)
        self.embed_in = nn.Linear(4 * pixels**2, width)

    def forward(
        self, x: Tensor, patches: Tensor, sight: Sight, planes: Planes, h: int, w: int
    ) -> tuple[Tensor, Sight]:
        """Return the tokens with what they see, (B, L, D), and where they look.

        Args:
            x: Tokens, shape (B, L, D), L = h·w.
            patches: Their patches of the input, (B, L, C).
            sight: Where they have looked before.
            planes: The exemplars, colors multiplied by opacity; see `exemplar_planes`.
            h, w: Rows and columns of the tokens.
        """
        x = x + self.correlation(patches, sight, planes, h, w)  # (B, L, D)
        sight = self.vote(x, self.look(x, sight), h, w)
        seen = sample_patches(sight, planes, h, w, self.pixels)  # (B, L, 4, q, q)
        return x + self.embed_in(seen.flatten(2).to(x.dtype)), sight
