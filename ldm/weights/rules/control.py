"""Rules for ControlNets and T2I-Adapters: the layouts of the original files, and our names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ldm.models.control.t2i_adapter import T2IAdapterConfig
from ldm.weights.keymap import IDENTITY, Section, Table, rename
from ldm.weights.rules.unet import unet_table

HINT = "controlnet_cond_embedding"
ZERO, MIDDLE = "controlnet_down_blocks", "controlnet_mid_block"


def control_net_table(names: Iterable[str]) -> Table:
    """Return the table of the original layout for a ControlNet.

    Args:
        names: Names of its tensors.
    """
    names = list(names)
    own = [name for name in names if name.startswith(("controlnet_", f"{ZERO}."))]
    encoder = unet_table([name for name in names if name not in set(own)])
    hint_blocks = (match[1] for name in own if (match := re.match(rf"{HINT}\.blocks\.(\d+)\.", name)))
    blocks = 1 + max(map(int, hint_blocks), default=-1)
    zeros = sorted({int(match[1]) for name in own if (match := re.match(rf"{ZERO}\.(\d+)\.", name))})
    hint = rename(
        ("conv_in", "0"),
        *((f"blocks.{i}", str(2 * i + 2)) for i in range(blocks)),
        ("conv_out", str(2 * blocks + 2)),
    )
    return Table(
        (
            *encoder.sections,
            Section(HINT, "input_hint_block", hint),
            *(Section(f"{ZERO}.{i}", f"zero_convs.{i}.0", IDENTITY) for i in zeros),
            Section(MIDDLE, "middle_block_out.0", IDENTITY),
        )
    )


def t2i_adapter_table(config: T2IAdapterConfig) -> Table:
    """Return the table of the original layout of a T2I-Adapter.

    Full adapters number the blocks of all levels; the first of a level changes the channels.
    """
    convolutions = rename(("in_conv", "in_conv"), ("out_conv", "out_conv"))
    sections: list[Section] = [Section("", "", IDENTITY)]
    for level in range(len(config.channels)):
        first = level if config.light else level * config.blocks
        sections.append(Section(f"body.{level}", f"body.{first}", convolutions))
        for i in range(config.blocks):
            file = f"body.{level}.body.{i}" if config.light else f"body.{first + i}"
            sections.append(Section(f"body.{level}.resnets.{i}", file, IDENTITY))
    return Table(tuple(sections))
