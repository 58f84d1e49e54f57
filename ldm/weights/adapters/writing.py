"""Write adapters in the names of kohya's trainer, of diffusers, or of peft."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.support.config import nearest
from ldm.support.files import check_place, staged_folder, write_atomically
from ldm.support.text import shown
from ldm.weights.adapters.adapter import Adapter, Edit
from ldm.weights.adapters.files import CONFIG, PEFT_FILES, PEFT_METADATA
from ldm.weights.adapters.kinds.delta import Delta
from ldm.weights.adapters.matching import PREFIXES
from ldm.weights.formats.safetensors import write_safetensors

SPELLINGS_OUT = ("kohya", "diffusers", "peft")
PEFT_COMPONENTS = {"unet": "unet", "decoder": "unet", "text": "text_encoder", "text2": "text_encoder_2"}
PEFT_LEAVES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleChange:
    """The change of one tensor of a module, by its name in diffusers.

    Args:
        part: The network.
        path: Name of the module in diffusers or transformers.
        delta: The change.
    """

    part: str
    path: str
    delta: Delta


def module_changes(adapter: Adapter) -> list[ModuleChange]:
    """Return the changes of an adapter by the names of diffusers.

    Raises:
        ValueError: If a change is of a tensor that diffusers' networks hold in several.
    """
    return [ModuleChange(part=each.site.part, path=_path(each), delta=each.delta) for each in adapter.edits]


def _path(edit: Edit) -> str:
    site = edit.site
    if site.part in ("text", "text2"):
        return site.name.rpartition(".")[0]
    if len(site.ours) != 1:
        raise ValueError(
            f"{site.name!r} is held in {len(site.ours)} tensors elsewhere: it cannot be converted"
        )
    return site.ours[0].rpartition(".")[0]


def write_adapter(
    path: Path,
    changes: Iterable[ModuleChange],
    spelling: str,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter.

    Args:
        path: The .safetensors file; for peft, the folder, with a folder in it for each network if there are
            several.
        changes: The changes.
        spelling: "kohya" (read by kohya-style programs, ComfyUI, stable-diffusion.cpp and diffusers),
            "diffusers" or "peft".
        dtype: Floating-point type of the tensors. Default: float32.
        metadata: Further strings for the header.

    Returns:
        ``path``.

    Raises:
        ValueError: If the spelling is unknown, or has no names for a kind.
    """
    path, changes = check_target(path, spelling), list(changes)
    facts = dict(metadata or {})
    if spelling == "kohya":
        write_safetensors(path, _cast(_kohya(changes), dtype), {**facts, **_kohya_facts(changes)})
    elif spelling == "diffusers":
        tensors: dict[str, Tensor] = {}
        config: dict[str, object] = {}
        for component, own in _by_component(changes).items():
            tensors |= {f"{component}.{name}": value for name, value in _peft(own).items()}
            config |= {f"{component}.{name}": value for name, value in _peft_config(own).items()}
        text = json.dumps(config, sort_keys=True)
        write_safetensors(path, _cast(tensors, dtype), {**facts, PEFT_METADATA: text, "format": "pt"})
    else:
        components = _by_component(changes)
        places = {component: component if len(components) > 1 else "." for component in components}
        # the tensors come last: beside another configuration, or none, they are read with other factors
        keys = {str(Path(place, name)) for place in places.values() for name in PEFT_FILES}
        with staged_folder(path, keys, lambda _: ()) as stage:
            for component, own in components.items():
                folder = stage / places[component]
                tensors = {f"base_model.model.{name}": value for name, value in _peft(own).items()}
                write_safetensors(folder / "adapter_model.safetensors", _cast(tensors, dtype), facts)
                text = json.dumps({"peft_type": "LORA", "bias": "none", **_peft_config(own)}, indent=2)
                write_atomically(folder / CONFIG, text.encode())
    return path


def check_target(path: Path, spelling: str) -> Path:
    """Return the path if an adapter can be written there, which is checked before any work.

    Args:
        path: The file, or for peft the folder.
        spelling: See `write_adapter`.

    Raises:
        ValueError: If the spelling is unknown, or the name is too long.
        OSError: If it cannot be written, or is a folder where a file is expected, or a file for a folder.
    """
    if spelling not in SPELLINGS_OUT:
        raise ValueError(f"names {shown(spelling)}; {nearest(spelling, SPELLINGS_OUT)}")
    check_place(path)
    if spelling == "peft" and path.is_file():
        raise NotADirectoryError(f"{str(path)!r} is a file, expected a folder")
    if spelling != "peft" and path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, expected a file name")
    return path


def _kohya(changes: Iterable[ModuleChange]) -> dict[str, Tensor]:
    """Return the tensors in kohya's names, with diffusers' stems."""
    changes = list(changes)
    two = any(change.part == "text2" for change in changes)
    texts = ["lora_te1_" if two else "lora_te_"]
    names = {"unet": "lora_unet_", "decoder": "lora_unet_", "text": texts[0], "text2": "lora_te2_"}
    assert {each.text for each in PREFIXES} >= set(names.values())
    return {
        f"{names[change.part]}{change.path.replace('.', '_')}.{leaf}": tensor
        for change in changes
        for leaf, tensor in change.delta.leaves().items()
    }


def _kohya_facts(changes: Iterable[ModuleChange]) -> dict[str, str]:
    changes = list(changes)
    ranks, alphas = _common(changes)
    plain = all(change.delta.kind == "LoRA" for change in changes)
    module = "networks.lora" if plain else "lycoris.kohya"
    return {"ss_network_module": module, "ss_network_dim": str(ranks), "ss_network_alpha": f"{alphas:g}"}


def _common(changes: Iterable[ModuleChange]) -> tuple[int, float]:
    """Return the most frequent rank and alpha."""
    pairs = Counter((change.delta.rank or 0, change.delta.alpha or 0.0) for change in changes)
    return pairs.most_common(1)[0][0]


def _by_component(changes: Iterable[ModuleChange]) -> dict[str, list[ModuleChange]]:
    found: dict[str, list[ModuleChange]] = {}
    for change in changes:
        found.setdefault(PEFT_COMPONENTS[change.part], []).append(change)
    return found


def _peft(changes: Iterable[ModuleChange]) -> dict[str, Tensor]:
    """Return the tensors in peft's names; ValueError for kinds that it has none for."""
    found: dict[str, Tensor] = {}
    for change in changes:
        leaves = change.delta.leaves()
        leaves.pop("alpha", None)
        if not set(leaves) <= set(PEFT_LEAVES):
            kind = "a Tucker core" if "lora_mid.weight" in leaves else change.delta.kind
            raise ValueError(f"{change.path}: {kind} has no names in diffusers and peft: write kohya's")
        for leaf, tensor in leaves.items():
            if leaf == "dora_scale":
                if tensor.ndim > 1 and tensor.shape[0] == 1 != tensor.shape[1]:
                    raise ValueError(f"{change.path}: DoRA of inputs has no names in diffusers and peft")
                axes = change.delta.leaves()["lora_up.weight"].ndim
                tensor = tensor.reshape(-1) if axes == 2 else tensor.reshape(1, -1, 1, 1)
            found[f"{change.path}.{PEFT_LEAVES[leaf]}"] = tensor
    return found


def _peft_config(changes: list[ModuleChange]) -> dict[str, object]:
    """Return what peft must know besides the tensors.

    The names end those of the modules: newer versions of transformers have no "text_model" in them.
    """
    rank, alpha = _common(changes)
    named = {change.path.removeprefix("text_model."): change.delta for change in changes}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: delta.rank for name, delta in named.items() if delta.rank != rank},
        "alpha_pattern": {name: delta.alpha for name, delta in named.items() if delta.alpha != alpha},
        "target_modules": list(named),
        "use_dora": any(delta.kind == "DoRA" for delta in named.values()),
    }


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tensors in a dtype, those of numbers; alphas stay in float32."""
    return {
        name: tensor.to(torch.float32 if name.endswith(".alpha") else dtype).contiguous()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
