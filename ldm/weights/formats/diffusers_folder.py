"""Diffusers folders: one sub-folder a part, with its configuration and its weights, whole or in shards, plain
or in a variant (fp16)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.support.config import nearest
from ldm.weights.detection import Detection, detect
from ldm.weights.formats.single_file import read_tensors
from ldm.weights.strict import mismatch

# sub-folder: our name of the part
PARTS = {
    "unet": "unet",
    "vae": "vae",
    "vqvae": "vae",
    "movq": "vae",
    "text_encoder": "text",
    "bert": "text",
    "text_encoder_2": "text2",
    "image_encoder": "image",
    "image_normalizer": "noise",
    "safety_checker": "safety",
}
STEMS, ENDINGS = ("diffusion_pytorch_model", "model", "pytorch_model"), ("safetensors", "bin")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a folder: its class and configuration as the files state them, its tensors memory-mapped,
    and the files they came from."""

    path: Path
    class_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A diffusers folder: the pipeline's class and options, the parts by our names, and the configurations of
    its schedulers by sub-folder."""

    path: Path
    class_name: str
    parts: Mapping[str, Component]
    options: Mapping[str, Any] = field(default_factory=dict)
    schedulers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def detect(self) -> Detection:
        """The family, told from the UNet's keys; ValueError if there is no UNet or it is of no known
        family."""
        if "unet" not in self.parts:
            raise ValueError(f"{str(self.path)!r} has no unet; its parts: {', '.join(self.parts)}")
        unet = self.parts["unet"]
        return detect({key: tuple(tensor.shape) for key, tensor in unet.tensors.items()}, source=unet.path)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; FileNotFoundError if absent, ValueError naming the file if it is no mapping
    or no JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {str(path)!r}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r}: expected a mapping, got {type(content).__name__}")
    return content


def is_folder(path: str | Path) -> bool:
    """Whether a path is a diffusers pipeline's folder."""
    return (Path(path) / "model_index.json").is_file()


def read_folder(
    path: str | Path, *, variant: str | None = None, parts: Iterable[str] | None = None
) -> Folder:
    """A diffusers folder with its weights memory-mapped.

    variant: None for the plain files (or the only variant there is), else a name such as "fp16" or "non_ema",
    which every part read must have. parts: which of ours to read ("unet", "vae", "text", …); None: all but
    the safety checker. FileNotFoundError names a part, file or shard that is absent; ValueError a file that
    is damaged or does not agree with the index.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {str(path)!r}")
    if not is_folder(path):
        raise FileNotFoundError(
            f"{str(path)!r} has no model_index.json: it is no folder of a diffusers pipeline"
        )
    index = read_json(path / "model_index.json")
    listed = {
        key: value[1]
        for key, value in index.items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    }
    options = {
        key: value for key, value in index.items() if not isinstance(value, list) and not key.startswith("_")
    }
    available = {PARTS.get(name, name): name for name in listed if not _is_setting(name)}
    wanted = [name for name in available if name != "safety"] if parts is None else list(parts)
    for name in wanted:
        if name not in available:
            raise ValueError(f"{str(path)!r} has no part {name!r}; {nearest(name, available)}")
    return Folder(
        path=path,
        class_name=str(index.get("_class_name", "")),
        options=options,
        parts={
            name: read_component(path / available[name], variant=variant, class_name=listed[available[name]])
            for name in wanted
        },
        schedulers={
            name: read_json(path / name / "scheduler_config.json")
            for name in listed
            if name.endswith("scheduler")
        },
    )


def _is_setting(name: str) -> bool:
    return (
        name.startswith("_")
        or name.endswith("scheduler")
        or name.startswith("tokenizer")
        or name == "feature_extractor"
    )


def read_component(path: str | Path, *, variant: str | None = None, class_name: str = "") -> Component:
    """One sub-folder (unet/, vae/, text_encoder/, …): its config.json and its tensors, memory-mapped."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is absent, though model_index.json lists it")
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    files, weight_map = find_weights(path, variant)
    tensors: dict[str, Tensor] = {}
    for file in files:
        found, _ = read_tensors(file)
        twins = tensors.keys() & found.keys()
        if twins:
            raise ValueError(f"{str(file)!r}: tensor {min(twins)!r} stands in another shard too")
        if weight_map is not None:
            _check_shard(file, found, weight_map)
        tensors |= found
    name = class_name or str(config.get("_class_name") or next(iter(config.get("architectures") or []), ""))
    return Component(path=path, class_name=name, config=config, tensors=tensors, files=tuple(files))


def _check_shard(file: Path, found: Mapping[str, Tensor], weight_map: Mapping[str, str]) -> None:
    listed = {key for key, name in weight_map.items() if name == file.name}
    wrong = mismatch(sorted(listed - found.keys()), sorted(found.keys() - listed), ())
    if wrong:
        raise ValueError(f"{str(file)!r} does not hold what its index says: {wrong}")


def find_weights(path: Path, variant: str | None = None) -> tuple[list[Path], dict[str, str] | None]:
    """The file or shards with a sub-folder's weights, and the index's map (tensor: file name) where there is
    one.

    Safetensors go before .bin. With variant None the plain files, else the only variant there is.
    """
    variants = list_variants(path)
    if not variants:
        raise FileNotFoundError(
            f"{str(path)!r} holds no weights: expected {STEMS[0]}.safetensors, model.safetensors or their"
            " like"
        )
    if variant is None:
        if "" not in variants and len(variants) > 1:
            raise ValueError(
                f"{str(path)!r} has the variants {', '.join(variants)} and no plain weights: say which"
            )
        variant = "" if "" in variants else next(iter(variants))
    if variant not in variants:
        have = ", ".join(name or "plain" for name in variants)
        raise FileNotFoundError(f"{str(path)!r} has no variant {variant!r} of its weights; there is: {have}")
    file = variants[variant]
    return read_index(file) if file.name.endswith(".json") else ([file], None)


def list_variants(path: Path) -> dict[str, Path]:
    """The variants of a sub-folder's weights ("" is the plain one) with the file, or the index of shards,
    that each is read from."""
    found: dict[str, Path] = {}
    for ending in ENDINGS:
        for stem in STEMS:
            for file in sorted(path.glob(f"{stem}*")):
                variant = _variant(file.name, stem, ending)
                if variant is not None:
                    found.setdefault(variant, file)
    return found


def _variant(name: str, stem: str, ending: str) -> str | None:
    """The variant of stem[.variant].ending, of stem[.variant].ending.index.json and of
    stem.ending.index.variant.json; None for other files."""
    if not name.startswith(f"{stem}."):
        return None
    middle = name.removeprefix(stem)
    if middle.endswith(".json"):
        middle = middle.removesuffix(".json")
        before, index, after = middle.partition(f".{ending}.index")
        return (before or after).removeprefix(".") if index else None
    if not middle.endswith(f".{ending}") or "-of-" in middle:
        return None
    return middle.removesuffix(f".{ending}").removeprefix(".")


def read_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards that an index names, all of which must be there, and its map; nothing outside the index's
    folder is looked at."""
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(f"{str(path)!r}: expected a weight_map of tensors and file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != Path(name).name or name.startswith("."):
            raise ValueError(f"{str(path)!r} names a shard outside its folder: {name!r}")
    lost = [name for name in names if not (path.parent / name).is_file()]
    if lost:
        raise FileNotFoundError(
            f"{str(path)!r} names {len(names)} shards, {len(lost)} of them absent: {', '.join(lost[:5])}"
        )
    return [path.parent / name for name in names], weight_map
