"""UNets: the layout of CompVis, Stability and guided-diffusion (`input_blocks`, `middle_block`,
`output_blocks`) against ours."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ldm.weights.keymap import IDENTITY, Change, Rule, Section, Table, rename

UNET_FIXED = rename(
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    (
        "time_embedding.cond_proj",
        "time_embedding.cond_proj",
    ),  # latent consistency models; there is no older name
    ("add_embedding.linear_1", "label_emb.0.0"),  # SDXL's vector condition
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("class_embedding.linear_1", "label_emb.0.0"),  # Stable unCLIP's
    ("class_embedding.linear_2", "label_emb.0.2"),
    ("class_embedding", "label_emb"),  # the x4 upscaler's table of noise levels
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
UNET_RESBLOCK = rename(
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
DOWNSAMPLE = (*rename(("conv", "op")), *UNET_RESBLOCK)
UNET_UPSAMPLE = (*rename(("conv", "conv")), *UNET_RESBLOCK)


def attention_block(heads: int | None, head_dim: int | None) -> tuple[Rule, ...]:
    """Guided-diffusion's AttentionBlock: one 1×1 Conv1d holds q, k and v, interleaved by head; Karlo's adds k
    and v of the context."""
    fused = Change(ones=1, heads=heads, head_dim=head_dim)
    return (
        *rename(("group_norm", "norm")),
        *rename(("to_out.0", "proj_out"), change=Change(ones=1)),
        Rule(("to_q.{leaf}", "to_k.{leaf}", "to_v.{leaf}"), ("qkv.{leaf}",), fused),
        Rule(("add_k_proj.{leaf}", "add_v_proj.{leaf}"), ("encoder_kv.{leaf}",), fused),
    )


def unet_table(names: Iterable[str], *, heads: int | None = None, head_dim: int | None = None) -> Table:
    """The original layout for a UNet with these parameter names, which tell its levels, blocks and attention.

    heads or head_dim: how AttentionBlocks (not transformers) are split; ValueError if the network has them
    and neither is given.
    """
    names = list(names)
    modules = _modules(names)
    blocks = 1 + max(
        int(match[1]) for name in names if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))
    )
    old = any(re.search(r"\.attentions\.\d+\.to_q\.", name) for name in names)
    if old and (heads is None) == (head_dim is None):
        raise ValueError(
            f"this UNet has AttentionBlocks: expected one of heads and head_dim, got heads={heads},"
            f" head_dim={head_dim}"
        )
    attention = attention_block(heads, head_dim) if old else IDENTITY
    sections = [Section("", "", UNET_FIXED)]
    for ours in modules:
        sections.append(_section(ours, blocks, modules, attention))
    return Table(tuple(sections))


def _modules(names: Iterable[str]) -> dict[str, None]:
    pattern = re.compile(
        r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.\d+(?=\.)"
    )
    return dict.fromkeys(match[0] for name in names if (match := pattern.match(name)))


def _section(ours: str, blocks: int, modules: Iterable[str], attention: tuple[Rule, ...]) -> Section:
    place, kind, j = ours.rsplit(".", 2)
    b, index, attends = place.partition(".")[2], int(j), f"{place}.attentions.0" in modules
    if place == "mid_block":
        slot = {"resnets": index * (2 if attends else 1), "attentions": 1}[kind]
        return Section(ours, f"middle_block.{slot}", UNET_RESBLOCK if kind == "resnets" else attention)
    if place.startswith("down"):
        i = 1 + int(b) * (blocks + 1) + (blocks if kind == "downsamplers" else index)
        slot, rules = {
            "resnets": (0, UNET_RESBLOCK),
            "attentions": (1, attention),
            "downsamplers": (0, DOWNSAMPLE),
        }[kind]
        return Section(ours, f"input_blocks.{i}.{slot}", rules)
    i = int(b) * (blocks + 1) + (blocks if kind == "upsamplers" else index)
    slot, rules = {
        "resnets": (0, UNET_RESBLOCK),
        "attentions": (1, attention),
        "upsamplers": (2 if attends else 1, UNET_UPSAMPLE),
    }[kind]
    return Section(ours, f"output_blocks.{i}.{slot}", rules)
