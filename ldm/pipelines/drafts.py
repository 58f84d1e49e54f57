"""Drafts: a first estimate of the latent, joined to x_t, corrected by what is known of the latent."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.cond import Cond
from ldm.images.canvas import fill_hole
from ldm.models.draft import Draft
from ldm.pipelines.conditions import Pair


def with_known_draft(pair: Pair, known: Tensor, hole: Tensor, draft: Draft | None = None) -> Pair:
    """Return both conditions with the known part of a latent in place of the text's draft.

    A draft is the mean of the latent given the text. Given a part of the latent too, that part is its own
    mean, and the rest is drafted again to agree with it (`Draft.agreeing`). A draft smaller than the latent
    is laid over the known part once, and continued smoothly around it. Conditions without a draft are
    returned as they are.

    Args:
        pair: The conditional and the unconditional condition; `concat` is the draft (B, C, h', w').
        known: Latent (B or 1, C, h, w).
        hole: Mask (B or 1, 1, h, w): 1 where the latent is not known.
        draft: The network that drafts, where the condition holds the text's embedding.
    """

    def corrected(cond: Cond, redraft: bool) -> Cond:
        if cond.concat is None:
            return cond
        drawn, unknown = cond.concat, hole.to(cond.concat)
        th, tw = drawn.shape[-2:]
        h, w = unknown.shape[-2:]
        top = window_start((unknown == 0).any(dim=-1).flatten(0, 1).any(dim=0), th)
        left = window_start((unknown == 0).any(dim=-2).flatten(0, 1).any(dim=0), tw)
        room = (left, w - tw - left, top, h - th - top)
        part = (..., slice(top, top + th), slice(left, left + tw))
        partly = 0 < float(unknown[part].mean()) < 1
        if (
            redraft
            and partly
            and draft is not None
            and cond.pooled is not None
            and (th, tw) == (draft.config.size,) * 2
        ):
            n = len(cond.pooled)
            own, open_ = (value[part].expand(n, -1, -1, -1) for value in (known, unknown))
            drawn = draft.agreeing(cond.pooled, own, open_).to(drawn)
        # 1 where neither the draft nor the known part says anything, (B, 1, h, w)
        bare = F.pad(torch.zeros_like(drawn[:, :1]), room, value=1.0) * unknown
        whole = torch.where(unknown > 0, F.pad(drawn, room), known.to(drawn))
        return replace(cond, concat=fill_hole(whole, bare))

    return corrected(pair[0], True), corrected(pair[1], False)


def window_start(known: Tensor, tile: int) -> int:
    """Return where a window of side `tile` begins along a side of which some is known.

    The window holds all of the known part, or lies in it, as near to the middle as possible.

    Args:
        known: Whether each position of the side is known, (n,) bool.
        tile: Side of the window.
    """
    side, where = len(known), known.nonzero().flatten().tolist()
    low, high = (where[-1] + 1 - tile, where[0]) if where else (0, side - tile)
    middle = (side - tile) // 2
    return min(max(min(max(middle, min(low, high)), max(low, high)), 0), side - tile)
