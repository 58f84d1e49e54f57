"""Rules for CLIP: the layouts of open_clip, OpenAI and Hugging Face, and our names, which are open_clip's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ldm.weights.keymap import IDENTITY, SAME, Change, Rule, Section, Table, from_file

TRANSPOSED = Change(transpose=True)
CLIP_BLOCK = (
    (
        ("attn.in_proj_{leaf}",),
        ("self_attn.q_proj.{leaf}", "self_attn.k_proj.{leaf}", "self_attn.v_proj.{leaf}"),
    ),
    (("attn.out_proj.{leaf}",), ("self_attn.out_proj.{leaf}",)),
    (("ln_1.{leaf}",), ("layer_norm1.{leaf}",)),
    (("ln_2.{leaf}",), ("layer_norm2.{leaf}",)),
    (("mlp.c_fc.{leaf}",), ("mlp.fc1.{leaf}",)),
    (("mlp.c_proj.{leaf}",), ("mlp.fc2.{leaf}",)),
)
TEXT_RULES = (
    (("token_embedding.weight",), ("embeddings.token_embedding.weight",)),
    (("positional_embedding",), ("embeddings.position_embedding.weight",)),
    (("ln_final.{leaf}",), ("final_layer_norm.{leaf}",)),
)
VISION_RULES = (
    (("class_embedding",), ("embeddings.class_embedding",)),
    (("conv1.weight",), ("embeddings.patch_embedding.weight",)),
    (("positional_embedding",), ("embeddings.position_embedding.weight",)),
    (("ln_pre.{leaf}",), ("pre_layrnorm.{leaf}",)),  # misspelled in the file
    (("ln_post.{leaf}",), ("post_layernorm.{leaf}",)),
)
# Configuration and buffers.
NUMBERS = ("input_resolution", "context_length", "vocab_size", "*attn_mask", "*position_ids")
# What a single tower does not need of a file with both.
BESIDE_TEXT = ("visual.*", "vision_model.*", "visual_projection.weight", "text_projection*", "logit_scale")
BESIDE_VISION = (
    "text_model.*",
    "text.*",
    "transformer.*",
    "token_embedding.weight",
    "positional_embedding",
    "ln_final.*",
    "text_projection*",
    "logit_scale",
    "visual_projection.weight",
    "visual.proj",
)


def clip_table(names: Iterable[str], keys: Iterable[str]) -> Table:
    """Return the table between CLIP or one of its towers and a file.

    The layouts are open_clip's, with the text tower at the top (as in OpenAI's) or below ``text.``, and
    Hugging Face's, with or without the prefixes ``text_model.`` and ``vision_model.``.

    Args:
        names: Names of a `CLIP`, a `TextTower` or a `VisionTower`, which determine the network.
        keys: Names in the file, which determine the layout.
    """
    names, keys = set(names), set(keys)
    has_text, whole = "token_embedding.weight" in names, "visual.conv1.weight" in names
    ignore = NUMBERS + (() if whole else BESIDE_TEXT if has_text else BESIDE_VISION)
    if any(
        key.startswith(("text_model.", "vision_model.", "embeddings.", "encoder.layers.")) for key in keys
    ):
        return Table(tuple(_hugging_face_sections(has_text, whole)), ignore)
    text = Section("", "text" if "text.token_embedding.weight" in keys else "", IDENTITY)
    if whole:
        top = Section("logit_scale", "logit_scale", (Rule(("",), ("",)),))
        return Table((text, top, Section("visual", "visual", IDENTITY)), ignore)
    if has_text:
        return Table((text,), ignore)
    return Table((Section("", "visual" if "visual.conv1.weight" in keys else "", IDENTITY),), ignore)


def _hugging_face_sections(has_text: bool, whole: bool) -> Iterable[Section]:
    """Yield the sections of Hugging Face's layout; ``whole``: the network has both towers."""
    if has_text:
        scale = rename_one("logit_scale", "logit_scale")
        projection = rename_one("text_projection", "text_projection.weight", TRANSPOSED)
        yield Section(
            "",
            "",
            (scale, projection, *_tower_rules(TEXT_RULES, "text_model.", "transformer.", spare=not whole)),
        )
    if whole or not has_text:
        projection = rename_one("proj", "visual_projection.weight", TRANSPOSED)
        yield Section(
            "visual" if whole else "",
            "",
            (projection, *_tower_rules(VISION_RULES, "vision_model.", "transformer.", spare=not whole)),
        )


def rename_one(ours: str, file: str, change: Change = SAME) -> Rule:
    """Return a rule for one tensor."""
    return Rule((ours,), (file,), change)


def _tower_rules(
    rules: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...], prefix: str, blocks: str, *, spare: bool
) -> Iterable[Rule]:
    """Yield the rules of one tower.

    Args:
        rules: Patterns of our names and the file's, outside the transformer blocks.
        prefix: Prefix of the tower in the file.
        blocks: Prefix of our transformer blocks.
        spare: Whether the prefix may be absent from the file.
    """
    inner = [
        ((f"{blocks}resblocks.{{i}}.{ours[0]}",), tuple(f"encoder.layers.{{i}}.{name}" for name in file))
        for ours, file in CLIP_BLOCK
    ]
    for ours, file in (*rules, *inner):
        yield Rule(ours, tuple(prefix + name for name in file), also=(file,) if spare else ())


def to_clip(module: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> dict[str, Tensor]:
    """Return a file's tensors under the names of a network.

    Args:
        module: A `CLIP`, a `TextTower` or a `VisionTower`.
        state: The file's tensors, in any layout; see `clip_table`.
        source: The file, for messages.

    Raises:
        ValueError: If names are missing, unexpected or misshapen; one message lists all.
    """
    if state and all(key.startswith("module.") for key in state):  # saved by data-parallel training
        state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {
        key: value.reshape(()) if key == "logit_scale" and value.numel() == 1 else value
        for key, value in state.items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return from_file(clip_table(shapes, state), state, shapes, source=source)
