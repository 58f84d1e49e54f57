"""Block weights: factors of an adapter's strength for each block of the UNet ("LBW").

Blocks are called BASE (the text towers), IN00 …, M00 and OUT00 …, after the original layout's input_blocks,
middle_block and output_blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ldm.support.config import nearest
from ldm.support.scalars import finite_number
from ldm.support.text import shown

BlockWeights = Mapping[str, float] | Sequence[float] | str


def _range(kind: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{kind}{i:02d}" for i in numbers)


# the blocks of a list of weights, by its length: those with attention, or all, of SD 1 and 2, then of SDXL
SD_ATTENTION = ("BASE", *_range("IN", 1, 2, 4, 5, 7, 8), "M00", *_range("OUT", *range(3, 12)))
SD_ALL = ("BASE", *_range("IN", *range(12)), "M00", *_range("OUT", *range(12)))
XL_ATTENTION = ("BASE", *_range("IN", 4, 5, 7, 8), "M00", *_range("OUT", *range(6)))
XL_ALL = ("BASE", *_range("IN", *range(9)), "M00", *_range("OUT", *range(9)))
ORDERS = {len(order): order for order in (SD_ATTENTION, SD_ALL, XL_ATTENTION, XL_ALL)}
# the presets of the web UI's extension, as blocks that have the weight 1
PRESETS: dict[str, tuple[str, ...]] = {
    "NONE": (),
    "ALL": SD_ATTENTION,
    "INS": ("BASE", *_range("IN", 1, 2)),
    "IND": ("BASE", *_range("IN", 5, 7, 8)),
    "INALL": ("BASE", *_range("IN", 1, 2, 4, 5, 7, 8)),
    "MIDD": ("BASE", *_range("IN", 5, 7, 8), "M00", *_range("OUT", 3, 4, 5, 6)),
    "OUTD": ("BASE", *_range("OUT", 3, 4, 5, 6)),
    "OUTS": ("BASE", *_range("OUT", 7, 8, 9, 10, 11)),
    "OUTALL": ("BASE", *_range("OUT", *range(3, 12))),
}


def block_weights(given: BlockWeights | None) -> dict[str, float] | None:
    """Return the factor of each named block; a block that is not named has the factor 0.

    Args:
        given: Factors by block; a list of 17 or 26 (SD 1 and 2), or 12 or 20 (SDXL) in the order BASE, IN, M,
            OUT; the name of a preset; or None for a factor of 1 everywhere.

    Raises:
        ValueError: If a block or a preset is unknown, a list has another length, or a factor is not finite.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given not in PRESETS:
            raise ValueError(f"blocks: unknown preset {shown(given)}; {nearest(given, PRESETS)}")
        if given == "ALL":
            return None
        return dict.fromkeys(PRESETS[given], 1.0)
    if not isinstance(given, Mapping):
        if not hasattr(given, "__len__"):
            raise ValueError(f"blocks: expected factors or the name of a preset, got {shown(given)}")
        if len(given) not in ORDERS:
            lengths = ", ".join(map(str, sorted(ORDERS)))
            raise ValueError(f"blocks: expected {lengths} factors, got {len(given)}")
        given = dict(zip(ORDERS[len(given)], given, strict=True))
    known = {*SD_ALL, "OUT"}
    for name in given:
        if name not in known:
            raise ValueError(f"blocks: unknown block {shown(name)}; {nearest(name, known)}")
    return {name: finite_number(f"blocks: {name}", value) for name, value in given.items()}
