"""Rules for priors: the layouts of Karlo, Kandinsky 2.1, diffusers and DALLE2-pytorch, and our names."""

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
    """Return the rules of Karlo's blocks, where one matrix holds q, k and v, interleaved by head."""
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
    """Return the table of a prior's file.

    In Karlo's layout the statistics of image embeddings are a separate file; see `with_statistics`.

    Args:
        config: Configuration of the prior.
        layout: "original" (in the file below ``model.`` for Karlo, ``net.`` for DALLE2-pytorch) or
            "diffusers".

    Raises:
        ValueError: If the prior is not published in this layout.
    """
    if config.blocks == "cosine":
        if layout != "original":
            raise ValueError(
                f'layout: expected "original", the only layout of priors with cosine blocks, got {layout!r}'
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
    """Return a prior's tensors with the statistics of CLIP's image embeddings.

    Args:
        state: The prior's tensors.
        statistics: Mean and standard deviation, (E,) each, from ViT-L-14_stats.th; None if absent.

    Raises:
        ValueError: If they are absent, not two vectors, or a standard deviation is not positive.
    """
    if statistics is None:
        raise ValueError(
            "Karlo's prior predicts normalised embeddings, and its file does not hold their mean and"
            " standard deviation: expected ViT-L-14_stats.th beside it"
        )
    if len(statistics) != 2 or any(tensor.squeeze().ndim != 1 for tensor in statistics):
        raise ValueError(
            "statistics: expected a mean and a standard deviation (E,), got"
            f" {[tuple(tensor.shape) for tensor in statistics]}"
        )
    if not bool((statistics[1] > 0).all()):
        raise ValueError(
            "statistics: expected positive standard deviations; are mean and standard deviation exchanged?"
        )
    return {
        **state,
        **{name: tensor.reshape(1, -1) for name, tensor in zip(STATISTICS_KEYS, statistics, strict=True)},
    }
