"""Files of weights as JSON descriptions, so that names, shapes, dtypes and values can be damaged.

A description has "tensors", which is name -> [shape, dtype, value], and may have "metadata" (of a header),
"config" (the mapping in a configuration beside) and "container": "safetensors", "pickle", or "peft" and
"diffusers", which are folders.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mutations import changed_tree, odd_value
from torch import Tensor

from ldm.weights.formats.safetensors import NAMES, write_safetensors

MOST_ENTRIES = 2**18  # of a tensor that is written
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool", "complex64", "float8_e4m3fn")
VALUES = (0.0, 1.0, -1.0, 0.5, 1e30, -1e38, 1e-30, float("nan"), float("inf"))
SIZES = (0, 1, 2, 3, 4, 8, 16, 32, 64, 1000)
NUMBERS = ("0", "1", "2", "7", "63", "64", "1000000", "999999999999", "x", "-1", "٣", "")
FOLDERS = {  # the files of the tensors and of the configuration
    "peft": ("adapter_model.safetensors", "adapter_config.json"),
    "diffusers": ("diffusion_pytorch_model.safetensors", "config.json"),
}


def described(
    tensors: Mapping[str, Tensor | Sequence[int]],
    container: str = "safetensors",
    *,
    metadata: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the description of a file of tensors with these shapes, or the shapes of these tensors."""
    entries = {
        name: [list(each.shape if isinstance(each, Tensor) else each), "float32", 0.1]
        for name, each in tensors.items()
    }
    rest = {"metadata": dict(metadata or {}), "config": dict(config or {}), "container": container}
    return json.dumps({"tensors": entries, **rest}).encode()


def place_described(description: bytes, folder: Path) -> Path:
    """Write the file or folder "mutant" of a description; what cannot be written is left out."""
    content = json.loads(description)
    tensors = {
        name: made for name, entry in content["tensors"].items() if (made := _tensor(entry)) is not None
    }
    tensors = {name.encode(errors="replace").decode(): tensor for name, tensor in tensors.items()}
    path = folder / "mutant"
    if content["container"] == "pickle":
        torch.save({**tensors, **content["config"]}, path)
        return path
    metadata = {
        key.encode(errors="replace").decode(): value.encode(errors="replace").decode()
        for key, value in content["metadata"].items()
        if isinstance(value, str)
    }
    if content["container"] not in FOLDERS:
        write_safetensors(path, tensors, metadata)
        return path
    weights, config = FOLDERS[content["container"]]
    path.mkdir()
    write_safetensors(path / weights, tensors, metadata)
    (path / config).write_text(json.dumps(content["config"]), encoding="utf-8")
    return path


def _tensor(entry: Any) -> Tensor | None:
    """Return the tensor of an entry, of waves around its value; None if it is none."""
    if not isinstance(entry, list) or len(entry) != 3:
        return None
    shape, dtype, value = entry
    plain = isinstance(shape, list) and all(type(n) is int and 0 <= n <= MOST_ENTRIES for n in shape)
    if not plain or len(shape) > 8 or math.prod(shape) > MOST_ENTRIES or dtype not in DTYPES:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    waves = value * (1 + 0.5 * torch.arange(math.prod(shape), dtype=torch.float64).sin())
    made = waves.to(getattr(torch, dtype)).reshape(shape)
    return made if made.dtype in NAMES else None


def mutated_description(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """Return one of the descriptions with one to four of its tensors, names or other values changed."""
    content = json.loads(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4))):
        tensors: dict[str, Any] = content["tensors"]
        name = rng.choice(list(tensors) or [""])
        kind = rng.randrange(12)
        entry = tensors.get(name)
        if kind == 0 and entry is not None:
            del tensors[name]
        elif kind == 1:
            tensors |= json.loads(rng.choice(seeds))["tensors"]
        elif kind == 2 and entry is not None:
            tensors[_renamed(name, rng, seeds)] = tensors.pop(name)
        elif kind == 3 and entry is not None:
            tensors[_renamed(name, rng, seeds)] = json.loads(json.dumps(entry))
        elif kind == 4 and entry is not None:
            entry[1] = rng.choice(DTYPES)
        elif kind == 5 and entry is not None:
            entry[2] = rng.choice(VALUES)
        elif kind == 6:
            content["metadata"][str(odd_value(rng))[:2000]] = str(odd_value(rng))
        elif kind == 7 and content["config"]:
            changed_tree(content["config"], rng)
        elif kind == 8:
            tensors[str(odd_value(rng))[:900]] = [[2], "float32", 1.0]
        elif entry is not None:
            entry[0] = _other_shape(entry[0], rng)
    return json.dumps(content).encode()


def _renamed(name: str, rng: random.Random, seeds: Sequence[bytes]) -> str:
    """Return a name with one of its pieces replaced: by a number, or by a piece of another name."""
    pieces = name.split(".")
    other = rng.choice(list(json.loads(rng.choice(seeds))["tensors"]) or ["a"]).split(".")
    numbers = [i for i, piece in enumerate(pieces) if piece.isdecimal()]
    if numbers and rng.random() < 0.5:
        pieces[rng.choice(numbers)] = rng.choice(NUMBERS)
    else:
        pieces[rng.randrange(len(pieces))] = rng.choice((*other, *NUMBERS))
    return ".".join(pieces)


def _other_shape(shape: list[int], rng: random.Random) -> list[int]:
    """Return another shape: an axis more or less, or another size."""
    shape, kind = list(shape), rng.randrange(4)
    if kind == 0 and shape:
        del shape[rng.randrange(len(shape))]
    elif kind == 1:
        shape.insert(rng.randint(0, len(shape)), rng.choice(SIZES))
    elif kind == 2 and shape:
        at = rng.randrange(len(shape))
        shape[at] = max(0, shape[at] + rng.choice((-1, 1)))
    elif shape:
        shape[rng.randrange(len(shape))] = rng.choice(SIZES)
    return shape
