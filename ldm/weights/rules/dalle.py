"""Rules for DALL·E Mini: min-dalle's files, whose names are ours, whole checkpoints, detokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from ldm.models.dalle.layers import UNIT_SCALES
from ldm.weights.keymap import IDENTITY, Rule, Section, Table
from ldm.weights.rules.vae import vae_table

# norms without a scale in the flax files, and in files that were converted from them
DALLE_TABLE = Table(
    (Section("", "", IDENTITY),),
    ones=tuple(pattern for name in UNIT_SCALES for pattern in (f"{name}.weight", f"*.{name}.weight")),
)
HEAD_KEY, DECODER_PREFIXES = "lm_head.weight", ("model.decoder.", "decoder.")
CODEBOOK = Section(
    "quantize",
    "",
    (Rule(("embedding.{leaf}",), ("embedding.{leaf}",), also=(("quantize.embedding.{leaf}",),)),),
)


def detokenizer_table(names: Iterable[str]) -> Table:
    """Return the table of min-dalle's detoker.pt, or of a whole VQGAN's file, for tensors of these names."""
    table = vae_table(names)
    ignore = (*table.ignore, "encoder.*", "quant_conv.*")
    return replace(table, sections=(*table.sections, CODEBOOK), ignore=ignore)


def with_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a whole checkpoint of DALL·E Mini with the last layer inside the decoder, not beside it."""
    if HEAD_KEY not in state:
        return state
    prefix = next((each for each in DECODER_PREFIXES if f"{each}layers.0.glu.fc0.weight" in state), None)
    return (
        state
        if prefix is None
        else {(prefix + HEAD_KEY if k == HEAD_KEY else k): v for k, v in state.items()}
    )
