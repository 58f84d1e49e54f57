"""The family of models that an adapter was made for, from its keys and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm.support.text import shown
from ldm.weights.adapters.leaves import Group

UNKNOWN = "an unknown family"
# parts of the stems of a family's adapters: the first that occurs decides
MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Flux", ("double_blocks", "single_blocks", "single_transformer_blocks")),
    ("Stable Diffusion 3", ("joint_blocks", "lora_te3_", "context_block")),
    ("Stable Cascade", ("lora_prior_",)),
    ("a transformer model (PixArt, SD3 or Flux)", ("transformer_blocks_0_attn_add_", "adaln_single")),
    ("Stable Diffusion XL", ("lora_te2_", "text_encoder_2", "add_embedding", "label_emb")),
)
# width of the context that cross-attention reads
WIDTHS = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    2048: "Stable Diffusion XL",
    1280: "Stable Diffusion XL's refiner",
}
# width of the states of a text tower, where the UNet is not changed
TOWERS = {768: "CLIP ViT-L (Stable Diffusion 1 or XL)", 1024: "Stable Diffusion 2", 1280: "CLIP bigG (XL)"}
STATED = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
INPUTS = ("lora_down.weight", "hada_w1_b", "diff", "b2.weight")  # leaves of which an axis is the inputs


def family_in_words(
    groups: Iterable[Group], embeddings: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]
) -> str:
    """Return the family of models that an adapter was made for, in words.

    Args:
        groups: The tensors of modules.
        embeddings: The tensors of learned vectors.
        metadata: What the file states about itself.
    """
    groups = list(groups)
    keys = {key.rpartition(".")[2] for tensors in embeddings.values() for key in tensors}
    if "clip_g" in keys:
        return "Stable Diffusion XL"
    stems = [group.stem for group in groups]
    for family, marks in MARKS:
        if any(mark in stem for mark in marks for stem in stems):
            return family
    width = next((size for group in groups if (size := _context(group)) is not None), None)
    if width is not None:
        return WIDTHS.get(width, f"a model with a context of {width}")
    tower = next((size for group in groups if (size := _tower(group)) is not None), None)
    if tower is not None:
        return TOWERS.get(tower, f"a text tower of width {tower}")
    learned = next((x.shape[-1] for each in embeddings.values() for x in each.values() if x.ndim), None)
    if learned is not None:
        return TOWERS.get(learned, f"a text tower of width {learned}")
    stated = next((metadata[key] for key in STATED if metadata.get(key)), "")
    return f"{shown(stated)}, as it states" if stated else UNKNOWN


def _context(group: Group) -> int | None:
    """Return the inputs of a module that reads the context; None for others."""
    if not group.stem.replace(".", "_").endswith(("attn2_to_k", "attn2_to_v", "attn2_processor_to_k_lora")):
        return None
    return _inputs(group.leaves)


def _tower(group: Group) -> int | None:
    """Return the inputs of a text tower's attention; None for others."""
    if not group.stem.replace(".", "_").endswith(("self_attn_q_proj", "self_attn_to_q_lora")):
        return None
    return _inputs(group.leaves)


def _inputs(leaves: Mapping[str, Tensor]) -> int | None:
    return next((leaves[leaf].shape[1] for leaf in INPUTS if leaf in leaves and leaves[leaf].ndim >= 2), None)
