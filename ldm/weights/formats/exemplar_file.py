"""Read and write the library of exemplars: library.safetensors holds the images, library.json their names.

library-embeddings.safetensors holds CLIP's embeddings of the images, in their order.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.conditioning.exemplar_index import SceneMetric
from ldm.conditioning.exemplar_library import Exemplar, ExemplarLibrary
from ldm.conditioning.layouts import LAYOUT_STEPS
from ldm.support.config import build
from ldm.support.files import write_atomically
from ldm.support.strict_json import read_json
from ldm.support.text import escaped, shown
from ldm.weights.formats.ldm_folder import about_part
from ldm.weights.formats.safetensors import read_safetensors, write_safetensors

LIBRARY_IMAGES, LIBRARY_INDEX = "library.safetensors", "library.json"
LIBRARY_EMBEDDINGS = "library-embeddings.safetensors"


@dataclass(frozen=True, kw_only=True)
class LibraryIndex:
    """The content of library.json.

    Attributes:
        size: Side of the images in pixels.
        images: Name and style of each image, in the order of the file.
        nouns: The names that each noun phrase may mean.
    """

    size: int
    images: tuple[tuple[str, str], ...]
    nouns: dict[str, tuple[str, ...]]


def write_library(folder: Path, library: ExemplarLibrary) -> None:
    """Write a library into a folder, which is created.

    The images are the bytes of their own files, one after the other, with the position of each one's end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    exemplars = list(library)
    content = b"".join(exemplar.content for exemplar in exemplars)
    ends = torch.tensor(
        [len(exemplar.content) for exemplar in exemplars], dtype=torch.int64, device="cpu"
    ).cumsum(0)
    state = {"content": torch.frombuffer(bytearray(content), dtype=torch.uint8), "ends": ends}
    write_safetensors(folder / LIBRARY_IMAGES, state, {"format": "pt", "part": "library"})
    index = {
        "size": library.size,
        "images": [[exemplar.name, exemplar.style] for exemplar in exemplars],
        "nouns": {noun: list(names) for noun, names in library.nouns.items()},
    }
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    write_atomically(folder / LIBRARY_INDEX, (text + "\n").encode())


def layout_steps(folder: str | Path) -> int:
    """Return the number of evaluations that draw a layout with the prior in a folder."""
    steps: int | None = about_part(folder, "layout").get("layout_steps")
    return LAYOUT_STEPS if steps is None else steps


def read_library(folder: str | Path) -> ExemplarLibrary:
    """Return the library in a folder.

    Raises:
        FileNotFoundError: If a file of it is absent.
        ValueError: If the files do not fit each other.
    """
    images, about = Path(folder) / LIBRARY_IMAGES, Path(folder) / LIBRARY_INDEX
    for path in (images, about):
        if not path.is_file():
            raise FileNotFoundError(f"no library of exemplars in {str(folder)!r}: {path.name} is absent")
    index = build(LibraryIndex, read_json(about), shown(str(about)))
    state = read_safetensors(images)
    found, kinds = sorted(state), {name: (tensor.dtype, tensor.ndim) for name, tensor in state.items()}
    if kinds != {"content": (torch.uint8, 1), "ends": (torch.int64, 1)}:
        raise ValueError(f"{str(images)!r}: expected the tensors content and ends, got {shown(found)}")
    content, ends = state["content"].numpy().tobytes(), state["ends"].tolist()
    bounds = [0, *ends]
    if len(ends) != len(index.images) or bounds != sorted(bounds) or bounds[-1] != len(content):
        raise ValueError(f"{str(images)!r} does not hold {len(index.images)} images one after the other")
    exemplars = [
        Exemplar(name=name, style=style, content=content[start:end])
        for (name, style), start, end in zip(index.images, bounds[:-1], ends, strict=True)
    ]
    try:
        return ExemplarLibrary(exemplars, index.nouns, size=index.size)
    except ValueError as error:
        raise ValueError(f"{shown(str(about))}: {escaped(error)}") from None


def write_embeddings(folder: Path, vectors: Tensor, metric: SceneMetric | None) -> None:
    """Write the embeddings of a library's images, (N, E), and how they are compared, as float16."""
    state = {"embeddings": vectors} | ({} if metric is None else vars(metric))
    state = {name: tensor.to(torch.float16).cpu().contiguous() for name, tensor in state.items()}
    write_safetensors(folder / LIBRARY_EMBEDDINGS, state, {"format": "pt", "part": "library"})


def read_embeddings(folder: str | Path) -> tuple[Tensor, SceneMetric | None]:
    """Return the embeddings of a library's images, (N, E), and how they are compared, in float32.

    Raises:
        FileNotFoundError: If the file is absent.
        ValueError: If the file holds something else.
    """
    path = Path(folder) / LIBRARY_EMBEDDINGS
    if not path.is_file():
        raise FileNotFoundError(f"no embeddings of exemplars in {str(folder)!r}: {path.name} is absent")
    state = {name: tensor.float() for name, tensor in read_safetensors(path).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    vectors = state.pop("embeddings", None)
    width = 0 if vectors is None or vectors.ndim != 2 else vectors.shape[1]
    metric = {"offset": (width,), "weight": (width, width), "center": (width,)}
    if not width or {name: shapes[name] for name in state} not in ({}, metric):
        raise ValueError(
            f"{str(path)!r}: expected embeddings (N, E) and, with a metric, offset (E,), weight (E, E) and"
            f" center (E,); got {shown(shapes)}"
        )
    assert vectors is not None
    return vectors, SceneMetric(**state) if state else None
