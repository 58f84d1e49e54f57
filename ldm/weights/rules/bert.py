"""Rules for LDM's text encoder: CompVis' x-transformer and our names, which are diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ldm.weights.keymap import Section, Table, rename

BERT_FIXED = rename(
    ("model.embed_tokens", "token_emb"),
    ("model.embed_positions", "pos_emb.emb"),
    ("model.layer_norm", "norm"),
    ("to_logits", "to_logits"),
)


def layer(i: int) -> Section:
    """Return the rules of layer ``i``, which is two in the file: attention at 2i, feed-forward at 2i + 1."""
    attention, feed_forward = 2 * i, 2 * i + 1
    rules = rename(
        ("self_attn_layer_norm", f"{attention}.0"),
        ("self_attn.q_proj", f"{attention}.1.to_q"),
        ("self_attn.k_proj", f"{attention}.1.to_k"),
        ("self_attn.v_proj", f"{attention}.1.to_v"),
        ("self_attn.out_proj", f"{attention}.1.to_out"),
        ("final_layer_norm", f"{feed_forward}.0"),
        ("fc1", f"{feed_forward}.1.net.0.0"),
        ("fc2", f"{feed_forward}.1.net.2"),
    )
    return Section(f"model.layers.{i}", "attn_layers.layers", rules)


def bert_table(names: Iterable[str]) -> Table:
    """Return the table of the original layout, below `cond_stage_model.transformer.`.

    The projection to the vocabulary, `to_logits`, is not used and may be absent.

    Args:
        names: Names of the encoder's tensors.
    """
    numbers = {int(match[1]) for name in names if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    return Table((Section("", "", BERT_FIXED), *(layer(i) for i in sorted(numbers))), ("to_logits.*",))
