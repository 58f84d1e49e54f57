"""Write a model: `save`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.latent.writing import LAYOUTS, write_diffusers, write_ldm, write_original
from ldm.registry.unclip.writing import write_unclip
from ldm.support.config import nearest
from ldm.support.device import dtype_of


def save(
    pipe: LatentDiffusion | UnCLIP,
    path: str | Path,
    *,
    layout: str = "native",
    dtype: str | torch.dtype | None = None,
    **facts: Any,
) -> Path:
    """Write a model so that `load(name, weights=path)` reads it back: bit for bit, unless another ``dtype``
    is asked for.

    ``layout``: "native", a folder of ours with a YAML for each part (the facts go into it); "original", a
    single .safetensors file as the model's authors published theirs; "diffusers", a folder of diffusers. The
    last two are for models of published families; ValueError for others, or for a network that the layout
    cannot hold. Writing is whole or not at all, file by file.
    """
    kind = None if dtype is None else dtype_of(dtype)
    path = Path(path)
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}; {nearest(layout, LAYOUTS)}")
    if isinstance(pipe, UnCLIP):
        if layout != "native":
            raise ValueError(f"layout {layout!r}: an UnCLIP is written in the native layout alone")
        return write_unclip(pipe, path, dtype=kind, **facts)
    if layout == "native":
        return write_ldm(pipe, path, kind, facts)
    if facts:
        raise ValueError(f"the layout {layout!r} has no place for facts: {', '.join(facts)}")
    if pipe.card.family == "latent":
        raise ValueError(
            f"layout {layout!r} is for models of published families, {pipe.card.name!r} is of none: use"
            " 'native'"
        )
    return write_original(pipe, path, kind) if layout == "original" else write_diffusers(pipe, path, kind)
