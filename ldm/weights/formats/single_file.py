"""Single files: one .ckpt or .safetensors with every part of a model below its prefix."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ldm.weights.detection import Detection, detect, expect, require
from ldm.weights.formats.pickles import read_ckpt
from ldm.weights.formats.safetensors import existing_file, map_safetensors
from ldm.weights.keymap import below
from ldm.weights.strict import mismatch

# Buffers of training programs, which follow from the card, and markers. `scale_factor` is not among them: it
# overrides the card.
UNNEEDED_KEYS = (
    "betas",
    "alphas_cumprod*",
    "sqrt_*",
    "log_one_minus_*",
    "posterior_*",
    "lvlb_weights",
    "logvar",
    "model_ema.*",
    "denoiser.sigmas",
    "*.position_ids",
    "loss.*",
    "global_step",
    "v_pred",
    "ztsnr",
)


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A file's parts, each a state dict in the file's names below its prefix, and what was said beside them.

    ``ema``: whether the UNet's tensors are the averaged ones. ``scale_factor``: the latent scale that the
    file states, None if it does not.
    """

    path: Path
    found: Detection
    parts: dict[str, dict[str, Tensor]]
    ema: bool = False
    scale_factor: float | None = None
    values: Mapping[str, int | float | str] = field(default_factory=dict)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, int | float | str]]:
    """The memory-mapped tensors of a .safetensors, .ckpt, .pt, .pth or .bin file, and the plain values beside
    them.

    The content decides, not the ending. ValueError naming the file if it is damaged or refused.
    """
    path = existing_file(path)
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        tensors, metadata = map_safetensors(path)
        return tensors, dict(metadata)
    checkpoint = read_ckpt(path)
    return checkpoint.tensors, checkpoint.values


def ema_names(keys: Iterable[str]) -> dict[str, str]:
    """Which key of a CompVis file holds the average of which: {"model.x.y": "model_ema.xy"}, built from the
    known keys.

    The averaged names have lost their dots; ValueError if two keys would share one.
    """
    known = set(keys)
    found: dict[str, str] = {}
    owner: dict[str, str] = {}
    for key in known:
        if key.startswith("model."):
            average = "model_ema." + key.removeprefix("model.").replace(".", "")
            if average in known:
                if average in owner:
                    raise ValueError(f"{average!r} may be the average of {owner[average]!r} or of {key!r}")
                owner[average], found[key] = key, average
    return found


def choose_ema(
    state: Mapping[str, Tensor], ema: bool | None, *, source: str | Path
) -> tuple[dict[str, Tensor], bool]:
    """The state with the averaged tensors in place of the trained ones, or without them, and whether they are
    averaged.

    ema None: averaged where the file has them. True, but the file has none or only some: ValueError.
    """
    names = ema_names(state)
    trained = [key for key in state if key.startswith("model.")]
    if names and len(names) != len(trained) and ema is not False:
        lost = [key for key in trained if key not in names]
        some = f"{len(names)} of {len(trained)} tensors only (not of {', '.join(lost[:3])})"
        raise ValueError(f"{str(source)!r} has averages of {some}; ask for ema=False")
    if ema and not names:
        advice = "files named '-emaonly' hold them as their own: leave ema out"
        raise ValueError(f"{str(source)!r} has no averaged (EMA) weights beside its own; {advice}")
    rest = {key: value for key, value in state.items() if not key.startswith("model_ema.")}
    if ema is False or not names:
        return rest, False
    return {key: state[names[key]] if key in names else value for key, value in rest.items()}, True


def read_single(path: str | Path, *, ema: bool | None = None, family: str | None = None) -> SingleFile:
    """A single file taken apart, memory-mapped; see `choose_ema` for ``ema``.

    ``family``: the one expected, which a file of unknown shapes is then taken for. ValueError naming the file
    if it is damaged, of another, of no known or no supported family, or holds tensors that belong to no part.
    """
    path = existing_file(path)
    state, values = read_tensors(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    found = detect(shapes, source=path) if family is None else expect(family, shapes, source=path)
    about = found.family if family is not None else require(found, source=path)
    state, averaged = choose_ema(state, ema, source=path)
    scale = state.pop("scale_factor", None)
    parts, left = split_parts(state, found)
    if left:
        raise ValueError(
            f"{str(path)!r} ({about.title}) holds tensors that belong to no part of it:"
            f" {mismatch((), left, ())}"
        )
    return SingleFile(
        path=path,
        found=found,
        parts=parts,
        ema=averaged,
        values=values,
        scale_factor=None if scale is None else float(scale),
    )


def split_parts(
    state: Mapping[str, Tensor], found: Detection
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The parts of a file by name (empty ones left out), and the keys that are in no part and not known to be
    unneeded."""
    family = found.family
    bare = not any(key.startswith(prefix) for prefix in family.parts.values() if prefix for key in state)
    prefixes = {"unet": ""} if bare and "unet" in family.parts else dict(family.parts)
    parts: dict[str, dict[str, Tensor]] = {name: below(prefix, state) for name, prefix in prefixes.items()}  # type: ignore[misc]
    unneeded = (*UNNEEDED_KEYS, *family.unneeded)
    left = [
        key
        for key in state
        if not key.startswith(tuple(prefixes.values()))
        and not any(fnmatch.fnmatchcase(key, pattern) for pattern in unneeded)
    ]
    return {name: part for name, part in parts.items() if part}, left
