"""Rules for autoencoders (KL, VQ, MoVQ): CompVis' layout, older names in diffusers layout, our names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ldm.weights.keymap import IDENTITY, Change, Rule, Section, Table, rename

POINTWISE = Change(ones=2)  # 1×1 convolutions in the file, linear layers in our network
VAE_RESBLOCK = (*rename(("conv_shortcut", "nin_shortcut")), *IDENTITY)
ATTENTION = (
    *rename(("group_norm", "norm"), ("spatial_norm", "norm")),
    *rename(("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), change=POINTWISE),
)
ROOT = (
    *rename(("encoder.conv_norm_out", "encoder.norm_out"), ("decoder.conv_norm_out", "decoder.norm_out")),
    *IDENTITY,  # conv_in, conv_out, quant_conv, post_quant_conv, quantize.embedding
)
VAE_UNNEEDED = ("loss.*", "model_ema.*")  # LPIPS, discriminator and averages


def vae_table(names: Iterable[str]) -> Table:
    """Return the table of the original layout for an autoencoder with tensors of these names."""
    names = list(names)
    levels = 1 + max(
        int(match[1]) for name in names if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name))
    )
    pattern = re.compile(
        r"(?:encoder|decoder)\.(?:(?:down_blocks|up_blocks)\.\d+|mid_block)\.[a-z]+\.\d+(?=\.)"
    )
    modules = dict.fromkeys(match[0] for name in names if (match := pattern.match(name)))
    return Table((Section("", "", ROOT), *(_module_section(ours, levels) for ours in modules)), VAE_UNNEEDED)


def _module_section(ours: str, levels: int) -> Section:
    """Return the section of one module of an autoencoder with a number of levels."""
    half, place, *level, kind, j = ours.split(".")
    rules = ATTENTION if kind == "attentions" else VAE_RESBLOCK
    if place == "mid_block":
        return Section(
            ours, f"{half}.mid.attn_1" if kind == "attentions" else f"{half}.mid.block_{int(j) + 1}", rules
        )
    i = int(level[0])
    prefix = f"{half}.down.{i}" if place == "down_blocks" else f"{half}.up.{levels - 1 - i}"
    inner = {
        "resnets": f"block.{j}",
        "attentions": f"attn.{j}",
        "downsamplers": "downsample",
        "upsamplers": "upsample",
    }[kind]
    return Section(ours, f"{prefix}.{inner}", rules)


# UNets and autoencoders in diffusers layout have our names; files of 2022 and early 2023 have other names in
# attention blocks.
OLDER = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
SPELLINGS = tuple(
    Rule((f"{{at*}}.{new}.{{leaf}}",), (f"{{at*}}.{new}.{{leaf}}",), also=((f"{{at*}}.{old}.{{leaf}}",),))
    for new, old in OLDER
)
DIFFUSERS = Table((Section("", "", (*SPELLINGS, *IDENTITY)),))
