"""Textual inversion (Gal et al. 2022): learned vectors that stand for a word, in all containers of the field.

| container | keys here |
|---|---|
| rinongal, A1111 (.pt; PNG and WebP, `embedding_images`) | string_to_param.TOKEN |
| diffusers learned_embeds | TOKEN, the only key |
| kohya, SD 1 and 2 | emb_params |
| SDXL | clip_l, clip_g |
| diffusers' advanced script, early | text_encoders_0, text_encoders_1 |
| a list of mappings | 0.KEY, 1.KEY, … |
| in a LoRA | bundle_emb.NAME.string_to_param.*, bundle_emb.NAME.clip_l, bundle_emb.NAME.clip_g |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.support.text import escaped
from ldm.weights.adapters.leaves import has_adapter_keys

# keys that name the text tower
TOWER_KEYS = {"clip_l": "text", "clip_g": "text2", "text_encoders_0": "text", "text_encoders_1": "text2"}
OTHER_TOWERS = ("t5xxl",)  # of towers that no model here has
BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<key>string_to_param\..+|clip_l|clip_g|t5xxl)")
PLAIN = ("emb_params", "*")  # keys that are no tokens
MAX_VECTORS = 1024  # of one embedding


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedVectors:
    """Vectors that stand for a word.

    Args:
        triggers: The texts that they stand for; the first is the name.
        vectors: The vectors of each text tower by part, shape (n, D), equally many for all.
    """

    triggers: tuple[str, ...]
    vectors: Mapping[str, Tensor]

    def __deepcopy__(self, memo: object) -> LearnedVectors:
        return self  # nothing changes it

    @property
    def count(self) -> int:
        """n, the number of vectors."""
        return len(next(iter(self.vectors.values())))


def split_embeddings(
    tensors: Mapping[str, Tensor], name: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the embeddings of a file by name, each with its tensors by key, and the other tensors.

    Args:
        tensors: The tensors of the file.
        name: Name of an embedding that is the whole file.
    """
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = BUNDLED.fullmatch(key)
        if match is None:
            rest[key] = tensor
        else:
            found.setdefault(match["name"], {})[match["key"]] = tensor
    if rest and not found and _is_embedding(rest):
        return {name: rest}, {}
    return found, rest


def _is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a file without bundled embeddings is one itself."""
    if has_adapter_keys(tensors) or not all(tensor.ndim in (1, 2) for tensor in tensors.values()):
        return False
    known = {"emb_params", *TOWER_KEYS, *OTHER_TOWERS}
    named = all(key in known or "string_to_param." in key or key[:1].isdigit() for key in tensors)
    return named or len(tensors) == 1


def learned_vectors(
    name: str, tensors: Mapping[str, Tensor], widths: Mapping[str, int], token: str | None
) -> tuple[LearnedVectors | None, list[str]]:
    """Return an embedding's vectors for the towers of a model, and the keys that are not used.

    Args:
        name: Its name, which is a trigger.
        tensors: Its tensors by key.
        widths: Width of a token in each text tower.
        token: The trigger in place of the names; None for them.

    Returns:
        None in place of the vectors if none fits a tower.

    Raises:
        ValueError: If a tower has no vector count of its own, or the values are not plausible.
    """
    found: dict[str, list[Tensor]] = {}
    unused: list[str] = []
    for key, tensor in tensors.items():
        if tensor.ndim not in (1, 2) or not tensor.numel() or not tensor.is_floating_point():
            what = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{escaped(key, 200)}: expected vectors of floating-point numbers, got {what}")
        rows = tensor.reshape(1, -1) if tensor.ndim == 1 else tensor
        part = _part(key.rpartition(".")[2], rows.shape[-1], widths)
        if part is None:
            unused.append(key)
        else:
            found.setdefault(part, []).append(rows)
    if not found:
        return None, unused
    vectors = {part: torch.cat(rows).float() for part, rows in found.items()}
    counts = {part: len(rows) for part, rows in vectors.items()}
    if len(set(counts.values())) > 1 or not 1 <= max(counts.values()) <= MAX_VECTORS:
        stated = ", ".join(f"{count} for {part}" for part, count in counts.items())
        raise ValueError(f"expected equally many vectors for each tower, 1 to {MAX_VECTORS}, got {stated}")
    triggers = (token,) if token is not None else tuple(dict.fromkeys([name, *_stored_tokens(tensors)]))
    return LearnedVectors(triggers=triggers, vectors=vectors), unused


def _part(key: str, width: int, widths: Mapping[str, int]) -> str | None:
    """Return the tower that a tensor is for: what its key says, else the one of its width; None for none."""
    if key in OTHER_TOWERS:
        return None
    named = TOWER_KEYS.get(key)
    if named is not None and named in widths:
        return named if widths[named] == width else None
    return next((part for part, size in widths.items() if size == width), None) if named is None else None


def _stored_tokens(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the token that a file of one embedding states in its only key."""
    if len(tensors) == 1:
        key = next(iter(tensors)).removeprefix("string_to_param.")
        if key not in PLAIN and key not in TOWER_KEYS and not key[:1].isdigit():
            yield key
