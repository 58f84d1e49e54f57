"""DALL·E Mini's transformers as plain functions of a state dict, written from their description.

Every position is computed at once, without a cache; attention is written out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def norm(x: Tensor, state: State, name: str) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * state.get(f"{name}.weight", torch.ones(())) + state[f"{name}.bias"]


def attention(x: Tensor, context: Tensor, bias: Tensor, state: State, name: str, heads: int) -> Tensor:
    q, k, v = (
        (source @ state[f"{name}.{part}_proj.weight"].T).unflatten(-1, (heads, -1))
        for part, source in (("q", x), ("k", context), ("v", context))
    )
    scores = torch.einsum("blhc,bmhc->bhlm", q * q.shape[-1] ** -0.5, k) + bias
    y = torch.einsum("bhlm,bmhc->blhc", scores.softmax(-1), v).flatten(-2)
    return y @ state[f"{name}.out_proj.weight"].T


def glu(x: Tensor, state: State, name: str) -> Tensor:
    x = norm(x, state, f"{name}.ln0")
    fc = [state[f"{name}.fc{i}.weight"].T for i in range(3)]
    return norm(F.gelu(x @ fc[0]) * (x @ fc[1]), state, f"{name}.ln1") @ fc[2]


def embedded(tokens: Tensor, state: State) -> Tensor:
    x = state["embed_tokens.weight"][tokens] + state["embed_positions.weight"][: tokens.shape[1]]
    return norm(x, state, "layernorm_embedding")


def encode(tokens: Tensor, state: State, *, layers: int, heads: int) -> Tensor:
    x, bias = embedded(tokens, state), -1e12 * (tokens == 1).float()[:, None, None]
    for i in range(layers):
        at = f"layers.{i}"
        y = norm(x, state, f"{at}.pre_self_attn_layer_norm")
        y = attention(y, y, bias, state, f"{at}.self_attn", heads)
        x = x + norm(y, state, f"{at}.self_attn_layer_norm")
        x = x + glu(x, state, f"{at}.glu")
    return norm(x, state, "final_ln")


def decode(tokens: Tensor, context: Tensor, mask: Tensor, state: State, *, layers: int, heads: int) -> Tensor:
    x, length = embedded(tokens, state), tokens.shape[1]
    causal = torch.full((length, length), -1e12).triu(1)
    text = -1e12 * (~mask).float()[:, None, None]
    for i in range(layers):
        at = f"layers.{i}"
        y = norm(x, state, f"{at}.pre_self_attn_layer_norm")
        y = attention(y, y, causal, state, f"{at}.self_attn", heads)
        x = x + norm(y, state, f"{at}.self_attn_layer_norm")
        y = norm(x, state, f"{at}.pre_encoder_attn_layer_norm")
        y = attention(y, context, text, state, f"{at}.encoder_attn", heads)
        x = x + norm(y, state, f"{at}.encoder_attn_layer_norm")
        x = x + glu(x, state, f"{at}.glu")
    return norm(x, state, "final_ln") @ state["lm_head.weight"].T
