"""Write a model in one of three layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.pipelines.dalle.pipeline import DalleMini
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.dalle.reading import write_tokens
from ldm.registry.latent.writing import LAYOUTS, write_diffusers, write_ldm, write_original
from ldm.registry.unclip.writing import write_unclip
from ldm.support.config import nearest
from ldm.support.device import dtype_of
from ldm.support.files import staged_folder
from ldm.support.strict_json import read_json
from ldm.weights.formats.diffusers_hashes import PIPELINE_INDEX
from ldm.weights.formats.ldm_model import CARD_FILE, model_files

INDEX_FILES = (CARD_FILE, PIPELINE_INDEX)  # without one of which a folder is not read
COMPONENT_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")


def save(
    pipe: LatentDiffusion | UnCLIP | DalleMini,
    path: str | Path,
    *,
    layout: str = "native",
    dtype: str | torch.dtype | None = None,
    **facts: Any,
) -> Path:
    """Write a model in a layout that `ldm.load(name, weights=path)` reads.

    The weights are preserved exactly unless ``dtype`` is given. A model is written completely or not at all:
    in a new folder beside ``path``, from which its files are moved at the end. Files of ``path`` that belong
    to no model are kept.

    Args:
        pipe: The model.
        path: The folder to write, or the .safetensors file for the layout "original".
        layout: "native", the ldm layout: a folder with a card, and weights and a YAML for each part.
            "original": a single .safetensors file in the layout of the model's authors. "diffusers": a folder
            in diffusers layout. The latter two are for `LatentDiffusion` models of published families.
        dtype: Floating-point type of the weights. None: that of each network.
        **facts: Entries that the layout "native" adds to every part's YAML.

    Returns:
        ``path``.

    Raises:
        ValueError: If the layout is unknown or cannot hold the model, a number leaves the range of
            ``dtype``, or adapters are merged into the weights.
    """
    pipe.adapters.check_saved()
    weights_dtype = None if dtype is None else dtype_of(dtype)
    path = Path(path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}; {nearest(layout, LAYOUTS)}")
    if layout == "native":
        with staged_folder(path, INDEX_FILES, files_of_models) as stage:
            write_native(pipe, stage, weights_dtype, facts)
        return path
    if not isinstance(pipe, LatentDiffusion):
        raise ValueError(f"layout {layout!r}: expected 'native', the only one for {type(pipe).__name__}")
    if facts:
        raise ValueError(f"the layout {layout!r} has no place for facts: {', '.join(facts)}")
    if pipe.card.family == "latent":
        raise ValueError(
            f"layout {layout!r} is for models of published families, {pipe.card.name!r} is of none: expected"
            " 'native'"
        )
    if layout == "original":
        return write_original(pipe, path, weights_dtype)
    with staged_folder(path, INDEX_FILES, files_of_models) as stage:
        write_diffusers(pipe, stage, weights_dtype)
    return path


def write_native(
    pipe: LatentDiffusion | UnCLIP | DalleMini, folder: Path, dtype: torch.dtype | None, facts: dict[str, Any]
) -> None:
    """Write a model in ldm layout.

    Args:
        pipe: The model.
        folder: The folder to write.
        dtype: Floating-point type of the weights; None keeps each network's own.
        facts: Entries that are added to every part's YAML.
    """
    if isinstance(pipe, LatentDiffusion):
        write_ldm(pipe, folder, dtype, facts)
    elif isinstance(pipe, UnCLIP):
        write_unclip(pipe, folder, dtype=dtype, **facts)
    else:
        write_tokens(pipe, folder, dtype=dtype, **facts)


def files_of_models(folder: Path) -> list[Path]:
    """Return the files of the models that a folder holds, in either layout."""
    return [*model_files(folder), *component_files(folder)]


def component_files(folder: Path) -> list[Path]:
    """Return the weights and configurations of the components that the model_index.json of a folder names.

    Without that file, or if it is damaged, there are none. A name that leads out of the folder is no
    component.
    """
    try:
        index = read_json(folder / PIPELINE_INDEX)
    except (FileNotFoundError, ValueError):
        return []
    names = [name for name in index if name[:1] not in ("_", ".")]
    inside = [folder / name for name in names if Path(name).name == name and not (folder / name).is_symlink()]
    files = [path for component in inside for path in component.rglob("*") if path.is_file()]
    return [path for path in files if path.suffix in COMPONENT_SUFFIXES]
