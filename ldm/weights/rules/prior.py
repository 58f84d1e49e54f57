"""Priors: the layouts of Karlo (and Kandinsky 2.1), of diffusers, and of DALLE2-pytorch against ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ldm.models.unclip.prior import PriorConfig
from ldm.weights.keymap import IDENTITY, Change, Rule, Section, Table, rename

STATISTICS_KEYS = ("clip_mean", "clip_std")
KARLO_ROOT = rename(
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("proj_in", "clip_img_proj"),
    ("embedding_proj", "text_emb_proj"),
    ("encoder_hidden_states_proj", "text_enc_proj"),
    ("transformer.norm_out", "final_ln"),
    ("proj_to_clip_embeddings", "out_proj"),
)
DIFFUSERS_BLOCKS = (
    Rule(("transformer.blocks.{rest*}",), ("transformer_blocks.{rest*}",)),
    Rule(("transformer.norm_out.{leaf}",), ("norm_out.{leaf}",)),
    *IDENTITY,
)
DALLE2 = (
    Rule(("time_embedding.weight",), ("to_time_embeds.0.weight",)),
    Rule(("proj_to_clip_embeddings.weight",), ("causal_transformer.project_out.weight",)),
    Rule(("transformer.layers.{i}.0.freqs",), ("causal_transformer.layers.{i}.0.rotary_emb.freqs",)),
    Rule(("transformer.{rest*}",), ("causal_transformer.{rest*}",)),
    *IDENTITY,
)


def karlo_blocks(heads: int) -> tuple[Rule, ...]:
    """Karlo's blocks: one matrix holds q, k and v, interleaved by head."""
    at, there = "transformer.blocks.{i}", "transformer.resblocks.{i}"
    fused = tuple(f"{at}.attn1.to_{part}.{{leaf}}" for part in "qkv")
    pairs = (
        ("attn1.to_out.0", "attn.c_proj"),
        ("norm1", "ln_1"),
        ("norm3", "ln_2"),
        ("ff.net.0.proj", "mlp.c_fc"),
        ("ff.net.2", "mlp.c_proj"),
    )
    return (
        Rule(fused, (f"{there}.attn.c_qkv.{{leaf}}",), Change(heads=heads)),
        *rename(*((f"{at}.{ours}", f"{there}.{theirs}") for ours, theirs in pairs)),
    )


def prior_table(config: PriorConfig, layout: str = "original") -> Table:
    """The table of a prior's file: "original", below ``model.`` in Karlo's and ``net.`` in DALLE2-pytorch's,
    or "diffusers".

    The statistics are a file of their own in Karlo's layout: see `with_statistics`.
    """
    if config.blocks == "cosine":
        if layout != "original":
            raise ValueError(
                f'layout: priors with cosine blocks are published in the "original" one alone, got {layout!r}'
            )
        return Table((Section("", "", DALLE2),), ("noise_scheduler.*", "clip.*"))
    if layout == "diffusers":
        return Table((Section("", "", DIFFUSERS_BLOCKS),))
    return Table(
        (
            Section(
                "",
                "",
                (*karlo_blocks(config.heads), *KARLO_ROOT, Rule(("prd_embedding",), ("prd_emb",)), *IDENTITY),
            ),
        )
    )


def with_statistics(state: Mapping[str, Tensor], statistics: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """A prior's tensors with the mean and deviation of CLIP's image embeddings, (E,) each, from
    ViT-L-14_stats.th.

    ValueError if they are absent, are not two vectors, or the deviation is not positive.
    """
    if statistics is None:
        raise ValueError(
            "Karlo's prior runs on normalised embeddings, and its file does not hold their mean and"
            " deviation: expected ViT-L-14_stats.th beside it"
        )
    if len(statistics) != 2 or any(tensor.squeeze().ndim != 1 for tensor in statistics):
        raise ValueError(
            "statistics: expected a mean and a deviation (E,), got"
            f" {[tuple(tensor.shape) for tensor in statistics]}"
        )
    if not bool((statistics[1] > 0).all()):
        raise ValueError(
            "statistics: the deviation of an embedding's entry is not positive; are mean and deviation"
            " exchanged?"
        )
    return {
        **state,
        **{name: tensor.reshape(1, -1) for name, tensor in zip(STATISTICS_KEYS, statistics, strict=True)},
    }
