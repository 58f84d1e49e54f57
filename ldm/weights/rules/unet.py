"""Rules for UNets: the layout of CompVis, Stability and guided-diffusion, and our names.

The original layout has `input_blocks`, `middle_block` and `output_blocks`; our names are those of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ldm.weights.keymap import IDENTITY, Change, Rule, Section, Table, rename

UNET_FIXED = rename(
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    # of latent consistency models, which have no older name
    ("time_embedding.cond_proj", "time_embedding.cond_proj"),
    ("add_embedding.linear_1", "label_emb.0.0"),  # vector condition of SDXL
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("class_embedding.linear_1", "label_emb.0.0"),  # Stable unCLIP
    ("class_embedding.linear_2", "label_emb.0.2"),
    ("class_embedding", "label_emb"),  # table of noise levels of the x4 upscaler
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
    """Return the rules of guided-diffusion's AttentionBlock; see `unet_table` for the arguments.

    One 1×1 Conv1d holds q, k and v, interleaved by head; Karlo adds k and v of the context.
    """
    fused = Change(ones=1, heads=heads, head_dim=head_dim)
    return (
        *rename(("group_norm", "norm")),
        *rename(("to_out.0", "proj_out"), change=Change(ones=1)),
        Rule(("to_q.{leaf}", "to_k.{leaf}", "to_v.{leaf}"), ("qkv.{leaf}",), fused),
        Rule(("add_k_proj.{leaf}", "add_v_proj.{leaf}"), ("encoder_kv.{leaf}",), fused),
    )


def unet_table(names: Iterable[str], *, heads: int | None = None, head_dim: int | None = None) -> Table:
    """Return the table of the original layout for a UNet.

    Args:
        names: Names of its tensors, which determine levels, blocks and attention.
        heads: Number of heads of AttentionBlocks; None if ``head_dim`` is given or there are none.
        head_dim: Channels of each head of AttentionBlocks; None if ``heads`` is given or there are none.

    Raises:
        ValueError: If the network has AttentionBlocks and not exactly one of ``heads`` and ``head_dim`` is
            given.
    """
    names = list(names)
    modules = _block_modules(names)
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
    sections = (_module_section(ours, blocks, modules, attention) for ours in modules)
    return Table((Section("", "", UNET_FIXED), *sections))


def _block_modules(names: Iterable[str]) -> dict[str, None]:
    """Return the names of the residual, attention and resampling modules, as an ordered set."""
    pattern = re.compile(
        r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.\d+(?=\.)"
    )
    return dict.fromkeys(match[0] for name in names if (match := pattern.match(name)))


def _module_section(ours: str, blocks: int, modules: Iterable[str], attention: tuple[Rule, ...]) -> Section:
    """Return the section of one module.

    Args:
        ours: Its name.
        blocks: Number of residual blocks of each down block.
        modules: Names of all modules.
        attention: Rules of attention.
    """
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
