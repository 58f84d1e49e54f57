"""Report what is in the file of a control: kind, layout, family, counts, and how it fits a model's UNet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ldm.catalog.control_cards import control_card
from ldm.catalog.lookup import find_card
from ldm.models.dit import DiTConfig
from ldm.models.unet_config import UNetConfig
from ldm.registry.inspection_adapters import CARD_OF
from ldm.registry.report import Report, non_finite, report_part
from ldm.weights.controls.building import (
    Target,
    config_of,
    control_kind,
    control_words,
    family_of,
    layout_of,
)
from ldm.weights.controls.control_lora import is_change
from ldm.weights.controls.files import ControlFile, control_digest, read_control
from ldm.weights.controls.lllite import is_lllite
from ldm.weights.controls.shapes import shapes_in
from ldm.weights.formats.pickles import examine
from ldm.weights.formats.single_file import SAFETENSORS_KIND, file_kind
from ldm.weights.keymap import fit_table
from ldm.weights.parts import build_network, part_table, shapes_of


def control_in(path: Path) -> ControlFile | None:
    """Return the content of a file or folder if it is a control; None if it is not, or cannot be read."""
    if path.is_dir() and not (path / "config.json").is_file():
        return None
    try:
        file = read_control(path, digest=False)
    except (ValueError, OSError):
        return None
    return file if control_kind(file) is not None else None


def inspect_control(file: ControlFile, *, model: str | None, nan: bool, digest: bool) -> Report:
    """Report what is in a control.

    Args:
        file: Its content.
        model: The card to compare it with. None: that of the family that it was made for.
        nan: Whether to look for NaN and infinity.
        digest: Whether to compute SHA-256.

    Raises:
        ValueError: If there is no such card.
    """
    folder = file.path.is_dir()
    kind = "a folder in diffusers layout" if folder else file_kind(file.path)
    pickled = None if folder or kind == SAFETENSORS_KIND else examine(file.path)
    family = family_of(file)
    name = model or CARD_OF.get(family)
    files = [path for path in sorted(file.path.iterdir()) if path.is_file()] if folder else [file.path]
    what = f"a {control_words(file)} in {layout_of(file)} layout"
    return Report(
        path=file.path,
        kind=f"{kind}, {what}, which controls a model's UNet by an image",
        size=sum(path.stat().st_size for path in files),
        sha256={file.path.name: control_digest(file.path)} if digest else {},
        parts=(report_part("control", file.tensors),),
        values=file.metadata,
        stated=tuple(_stated(file, name)),
        bad=non_finite(file.tensors) if nan else None,
        globals=pickled.globals if pickled else (),
        unsafe=pickled.refused if pickled else (),
        judged=pickled is None or not pickled.problem,
        made_for=family or "an unknown family",
        problems=tuple(_problems(file, name)) if name else (),
    )


def _stated(file: ControlFile, name: str | None) -> Iterator[str]:
    """Yield what keys and names show."""
    zeros = [
        key
        for key in file.tensors
        if key.startswith(("controlnet_down_blocks.", "zero_convs.")) and key.endswith(".weight")
    ]
    if zeros:
        yield f"{len(zeros)} zero convolutions"
    if is_lllite(shapes_in(file.tensors)):
        yield f"{len({key.partition('.')[0] for key in file.tensors})} networks before projections"
    yield f"by its name, the card {control_card(None, file.path.name)}"
    if name is not None:
        yield f"compared with {name}"
    if file.beside:
        yield f"{file.beside} tensors of the model that it was trained with, which are not read"


def _problems(file: ControlFile, name: str) -> Iterator[str]:
    """Yield how its keys do not fit a published model's UNet."""
    own = find_card(name)[0].shapes().get("unet")
    if not isinstance(own, UNetConfig | DiTConfig):
        yield f"the card of {name!r} states no UNet or DiT, on which controls act"
        return
    if is_change(file.tensors):  # the UNet has what it lacks
        return
    target = Target(model=name, network=own, factor=8, dtype=torch.float32)
    shapes, layout = shapes_in(file.tensors), layout_of(file)
    try:
        network = build_network(config_of(file, target))
        fit = fit_table(part_table(network, layout, shapes), shapes, shapes_of(network))
    except ValueError as error:
        yield f"it does not fit {name}: {error}"
        return
    if not fit:
        yield f"it does not fit {name}: {fit}"
