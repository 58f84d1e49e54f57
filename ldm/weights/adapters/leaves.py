"""The keys of adapter files: the stem that names a module, and the leaf that names a tensor of its change.

Programs spell the leaves differently. They are read into one spelling, kohya's and LyCORIS's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

# spelling of leaves: the one that is used here, then the others
LEAVES: dict[str, tuple[str, ...]] = {
    # LoRA: diffusers and peft, of three generations
    "lora_down.weight": ("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight", "down.weight"),
    "lora_up.weight": ("lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight", "up.weight"),
    "lora_mid.weight": (),
    "lora_up.bias": ("lora_B.bias",),
    "lora_embedding_A": (),
    "lora_embedding_B": (),
    "dora_scale": (),
    "lora_magnitude_vector": ("lora_magnitude_vector.weight",),
    "alpha": (),
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), ()),
    **dict.fromkeys(
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), ()
    ),
    **dict.fromkeys(("diff", "diff_b", "w_norm", "b_norm", "set_weight", "reshape_weight"), ()),
    **dict.fromkeys(("weight", "on_input"), ()),
    "ia3_l": (),  # of peft
    "oft_R.weight": (),  # of peft
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), ()),
    **dict.fromkeys(("oft_blocks", "rescale"), ()),
}
LEAF_SPELLINGS = {other: leaf for leaf, others in LEAVES.items() for other in (leaf, *others)}
# The name of an adapter inside peft's keys, "lora_A.default.weight", is dropped.
PEFT_NAME = re.compile(
    r"(lora_(?:[AB]|embedding_[AB]|magnitude_vector)|ia3_l|oft_R)\.(?!weight$|bias$)[^.]+(?=\.|$)"
)
KEY = re.compile(rf"(?P<stem>.+?)\.(?P<leaf>{'|'.join(re.escape(leaf) for leaf in LEAF_SPELLINGS)})")


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The tensors of one module in an adapter file.

    Args:
        stem: What names the module.
        leaves: The tensors by leaf.
        keys: The file's key of each leaf.
    """

    stem: str
    leaves: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def split_key(key: str) -> tuple[str, str] | None:
    """Return the stem and the leaf of a key; None if no kind of adapter has such a leaf."""
    match = KEY.fullmatch(PEFT_NAME.sub(r"\1", key))
    return None if match is None else (match["stem"], LEAF_SPELLINGS[match["leaf"]])


def grouped(tensors: Mapping[str, Tensor]) -> tuple[list[Group], list[str]]:
    """Return the groups of a file's tensors, in the file's order, and the keys that belong to none.

    Raises:
        ValueError: If two keys state the same tensor of a module.
    """
    groups: dict[str, Group] = {}
    others: list[str] = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            others.append(key)
            continue
        stem, leaf = split
        group = groups.setdefault(stem, Group(stem=stem))
        if leaf in group.leaves:
            raise ValueError(f"{key!r} and {group.keys[leaf]!r} both state the {leaf} of {stem!r}")
        group.leaves[leaf], group.keys[leaf] = tensor, key
    return list(groups.values()), others


def has_adapter_keys(keys: Iterable[str]) -> bool:
    """Return whether any of the keys can only be an adapter's."""
    plain = {"weight", "alpha", "up.weight", "down.weight", "rescale"}
    plain |= {f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm", "up", "down")}
    return any((split := split_key(key)) is not None and not _is_plain(key, split, plain) for key in keys)


def _is_plain(key: str, split: tuple[str, str], plain: set[str]) -> bool:
    """Return whether a key may also be that of a network's weight."""
    if split[1] in plain:
        return True
    return key.endswith((".down.weight", ".up.weight")) and "lora" not in key
