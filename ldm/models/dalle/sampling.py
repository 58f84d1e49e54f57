"""The choice of the next image token: guidance, the tokens that are kept, and a draw that belongs to a seed.

Super-conditioning is classifier-free guidance on logits: l = l_u + a·(l_c − l_u), with the logits l_c of the
prompt and l_u of the empty text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.models.unclip.autoregressive import gumbel


def super_conditioned(uncond: Tensor, cond: Tensor, factor: float) -> Tensor:
    """Return l_u·(1 − a) + l_c·a, in float32.

    Args:
        uncond: Logits l_u of the empty text, shape (B, K).
        cond: Logits l_c of the prompts, shape (B, K).
        factor: The factor a; 1 is the conditional model, 0 the unconditional one.
    """
    return uncond.float() * (1 - factor) + cond.float() * factor


def kept_logits(logits: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return logits divided by the temperature, with −inf for the tokens that are not drawn.

    Args:
        logits: Logits, float32, shape (B, K).
        temperature: Positive.
        top_k: Number of the most probable tokens that are kept, and those that are as probable as the last of
            them; at most K.
        top_p: Of these, the most probable ones are kept whose probabilities sum to at least this number, in
            (0, 1] (nucleus sampling, Holtzman et al. 2019).

    Returns:
        Shape (B, K). Their softmax is the distribution that is drawn from.
    """
    least = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]  # (B, 1)
    kept = logits.masked_fill(logits < least, float("-inf")) / temperature  # (B, K)
    if top_p >= 1:
        return kept
    ordered, order = kept.sort(dim=1, descending=True, stable=True)  # (B, K) each
    p = ordered.softmax(dim=1)
    behind = p.cumsum(dim=1) - p >= top_p  # (B, K): the more probable ones suffice
    return kept.masked_fill(torch.zeros_like(behind).scatter(1, order, behind), float("-inf"))


def draw_tokens(
    logits: Tensor,
    seeds: Sequence[int],
    position: int,
    *,
    temperature: float = 1.0,
    top_k: int = 256,
    top_p: float = 1.0,
) -> Tensor:
    """Return the next token of each image, shape (B,), int64.

    The token of an image depends on its logits and on (seed, position) alone, by the Gumbel-max trick.

    Args:
        logits: Logits, float32, shape (B, K).
        seeds: B seeds.
        position: Position of the token in the image.
        temperature: Divisor of the logits; 0 takes the most probable token. Default: 1.
        top_k: See `kept_logits`. Default: 256.
        top_p: See `kept_logits`. Default: 1.
    """
    if temperature == 0:
        return logits.argmax(dim=1)
    kept = kept_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)  # (B, K)
    noise = torch.stack([gumbel(seed, position, logits.shape[1]) for seed in seeds])  # (B, K)
    return (kept + noise.to(kept.device)).argmax(dim=1)
