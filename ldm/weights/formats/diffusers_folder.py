"""Read folders in diffusers layout: a sub-folder for each part, with its configuration and its weights.

Weights are one file or several shards, and may exist in variants such as fp16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.support.config import nearest
from ldm.support.files import file_exists
from ldm.support.strict_json import read_json
from ldm.support.text import escaped, shown
from ldm.weights.detection import Detection, detect
from ldm.weights.formats.single_file import read_tensors
from ldm.weights.strict import mismatch

# sub-folder -> name of the part
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
LONGEST_COMPONENT = 100  # characters of the name of a sub-folder
STEMS, ENDINGS = ("diffusion_pytorch_model", "model", "pytorch_model"), ("safetensors", "bin")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a folder.

    Args:
        path: Its sub-folder.
        class_name: Its class, as model_index.json or config.json states it; empty if unknown.
        config: The content of config.json; empty if absent.
        tensors: The memory-mapped tensors by name.
        files: The files that they are read from.
    """

    path: Path
    class_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A pipeline's folder.

    Args:
        path: The folder.
        class_name: Class of the pipeline.
        parts: The parts by name.
        options: Options of the pipeline.
        schedulers: Configurations of the schedulers by sub-folder, with the class that the pipeline names.
        components: Names of all components that are present, and their classes.
    """

    path: Path
    class_name: str
    parts: Mapping[str, Component]
    options: Mapping[str, Any] = field(default_factory=dict)
    schedulers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)

    def detect(self) -> Detection:
        """Return the family by the keys of the UNet; ValueError if there is no UNet or it is unknown."""
        if "unet" not in self.parts:
            raise ValueError(f"{str(self.path)!r} has no unet; its parts: {escaped(', '.join(self.parts))}")
        unet = self.parts["unet"]
        return detect({key: tuple(tensor.shape) for key, tensor in unet.tensors.items()}, source=unet.path)


def read_scheduler(path: Path) -> dict[str, Any]:
    """Return the configuration in a scheduler's sub-folder, in which diffusers writes infinite numbers."""
    return read_json(path / "scheduler_config.json", infinite=True)


def is_folder(path: str | Path) -> bool:
    """Return whether a path is the folder of a pipeline in diffusers layout."""
    return (Path(path) / "model_index.json").is_file()


def read_folder(
    path: str | Path, *, variant: str | None = None, parts: Iterable[str] | None = None
) -> Folder:
    """Return a pipeline's folder with its weights memory-mapped.

    Args:
        path: The folder.
        variant: Variant of the files, such as "fp16" or "non_ema", which every part must have. None: the
            plain files, or the only variant.
        parts: Names of the parts to read, such as "unet", "vae", "text". None: all but the safety checker.

    Raises:
        FileNotFoundError: If the folder, a part, a file or a shard is absent.
        ValueError: If a part is unknown, or a file is damaged or contradicts the index.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {str(path)!r}")
    if not is_folder(path):
        raise FileNotFoundError(
            f"{str(path)!r} has no model_index.json: it is not the folder of a diffusers pipeline"
        )
    index = read_json(path / "model_index.json")
    listed = {
        key: value[1]
        for key, value in index.items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    }
    for name in listed:
        if name in ("", "..") or name != Path(name).name or len(name) > LONGEST_COMPONENT:
            raise ValueError(
                f"{shown(str(path / 'model_index.json'))}: expected names of sub-folders, got {shown(name)}"
            )
    options = {
        key: value for key, value in index.items() if not isinstance(value, list) and not key.startswith("_")
    }
    available = {PARTS.get(name, name): name for name in listed if not _is_setting(name)}
    wanted = [name for name in available if name != "safety"] if parts is None else list(parts)
    for name in wanted:
        if name not in available:
            raise ValueError(f"{str(path)!r} has no part {shown(name)}; {nearest(name, available)}")
    return Folder(
        path=path,
        class_name=str(index.get("_class_name", "")),
        options=options,
        parts={
            name: read_component(path / available[name], variant=variant, class_name=listed[available[name]])
            for name in wanted
        },
        schedulers={
            name: {**read_scheduler(path / name), "_class_name": listed[name]}
            for name in listed
            if name.endswith("scheduler")
        },
        components=listed,
    )


def _is_setting(name: str) -> bool:
    return (
        name.startswith("_")
        or name.endswith("scheduler")
        or name.startswith("tokenizer")
        or name == "feature_extractor"
    )


def read_component(path: str | Path, *, variant: str | None = None, class_name: str = "") -> Component:
    """Return one sub-folder (unet/, vae/, text_encoder/, …): its config.json and its memory-mapped tensors.

    Args:
        path: The sub-folder.
        variant: Variant of the files; None for the plain ones, or the only variant.
        class_name: Its class, as model_index.json states it; empty to take it from config.json.

    Raises:
        FileNotFoundError: If the sub-folder, its weights or a shard is absent.
        ValueError: If a file is damaged or contradicts the index.
    """
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
            raise ValueError(f"{str(file)!r}: tensor {min(twins)!r} is in another shard too")
        if weight_map is not None:
            _check_shard(file, found, weight_map)
        tensors |= found
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    name = class_name or str(config.get("_class_name") or first)
    return Component(path=path, class_name=name, config=config, tensors=tensors, files=tuple(files))


def _check_shard(file: Path, found: Mapping[str, Tensor], weight_map: Mapping[str, str]) -> None:
    listed = {key for key, name in weight_map.items() if name == file.name}
    wrong = mismatch(sorted(listed - found.keys()), sorted(found.keys() - listed), ())
    if wrong:
        raise ValueError(f"{str(file)!r} does not hold what its index states: {wrong}")


def find_weights(path: Path, variant: str | None = None) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files with a sub-folder's weights, and the index's map of tensors to file names or None.

    Safetensors take precedence over .bin.

    Args:
        path: The sub-folder.
        variant: Variant of the files; None for the plain ones, or the only variant.

    Raises:
        FileNotFoundError: If there are no weights, or not in this variant.
        ValueError: If there are several variants and no plain files, and ``variant`` is None.
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
                f"{str(path)!r} has the variants {', '.join(variants)} and no plain weights: pass variant="
            )
        variant = "" if "" in variants else next(iter(variants))
    if variant not in variants:
        have = ", ".join(name or "plain" for name in variants)
        raise FileNotFoundError(f"{str(path)!r} has no variant {variant!r} of its weights; there is: {have}")
    file = variants[variant]
    return read_index(file) if file.name.endswith(".json") else ([file], None)


def list_variants(path: Path) -> dict[str, Path]:
    """Return the file or index of shards of each variant of a sub-folder's weights; "" is the plain one."""
    found: dict[str, Path] = {}
    for ending in ENDINGS:
        for stem in STEMS:
            for file in sorted(path.glob(f"{stem}*")):
                variant = _variant_name(file.name, stem, ending)
                if variant is not None:
                    found.setdefault(variant, file)
    return found


def _variant_name(name: str, stem: str, ending: str) -> str | None:
    """Return the variant in the name of a file of weights or of an index ("" if plain); None for others.

    The forms are stem[.variant].ending, stem[.variant].ending.index.json and stem.ending.index.variant.json.
    """
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
    """Return the shards that an index names, and its map of tensors to file names.

    Raises:
        FileNotFoundError: If a shard is absent.
        ValueError: If the index is damaged, or names a file outside its folder.
    """
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
            raise ValueError(f"{str(path)!r} names a shard outside its folder: {shown(name)}")
    lost = [name for name in names if not file_exists(path.parent / name)]
    if lost:
        raise FileNotFoundError(
            f"{str(path)!r} names {len(names)} shards, {len(lost)} of them absent:"
            f" {escaped(', '.join(lost[:5]), 500)}"
        )
    return [path.parent / name for name in names], weight_map
