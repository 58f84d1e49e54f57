"""Read single files: one .ckpt or .safetensors file with every part of a model below its prefix."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ldm.catalog.families import FAMILIES
from ldm.weights.detection import Detection, detect, expect, require
from ldm.weights.formats.flax_file import read_flax
from ldm.weights.formats.markers import family_notes, number_of, stated_sampling
from ldm.weights.formats.pickles import read_ckpt
from ldm.weights.formats.safetensors import existing_file, map_safetensors
from ldm.weights.keymap import below
from ldm.weights.rules.dalle import with_head
from ldm.weights.rules.flax import torch_names
from ldm.weights.stated import Stated
from ldm.weights.strict import mismatch

# Markers and buffers of training programs, which follow from the card. `scale_factor` is not one of them: it
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
    "denoiser.log_sigmas",
    "*.position_ids",
    "loss.*",
    "global_step",
    "v_pred",
    "ztsnr",
    "edm_mean",
    "edm_std",
    "edm_vpred.sigma_m*",
    "sigmas",
    "log_sigmas",
    "model_sampling.*",
    "logit_scale",
    "epoch",
    "iteration",
    "step",
    "num_updates",
    "decay",
    # of a tower that is read without it; those of others stand below their prefix
    "cond_stage_model.text_projection*",
    "conditioner.embedders.?.text_projection*",
)
SAFETENSORS_KIND, FLAX_KIND = "safetensors", "flax (MessagePack)"  # kinds of files
FLAX_STARTS = (*(bytes([code]) for code in range(0x81, 0x90)), b"\xde", b"\xdf")  # of a map that is not empty
# Prefixes below which programs store an autoencoder that is alone in a file.
AUTOENCODER_PREFIXES = ("first_stage_model.", "vae.")
# Buffers that state the schedule; see `ldm.weights.formats.markers`.
SCHEDULE_TABLES = ("alphas_cumprod", "betas")


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """The content of a single file.

    Args:
        path: The file.
        found: Its family and layout.
        parts: State dicts by part, with the file's names below the part's prefix.
        ema: Whether the UNet's tensors are the averaged ones.
        scale_factor: The latent scale that the file states; None if it states none.
        values: Numbers and strings beside the tensors.
        stated: What the file states about its use.
        tables: The buffers that state the schedule, by name.
        notes: Warnings about what the file states.
    """

    path: Path
    found: Detection
    parts: dict[str, dict[str, Tensor]]
    ema: bool = False
    scale_factor: float | None = None
    values: Mapping[str, int | float | str] = field(default_factory=dict)
    stated: Stated = Stated()
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, int | float | str]]:
    """Return the memory-mapped tensors of a file, and its values: .safetensors, .ckpt, .pt, .bin, .msgpack.

    The content of the file decides how it is read, not its ending. Those of flax get PyTorch's names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or refused; the message names it.
    """
    path = existing_file(path)
    if path.suffix == ".safetensors" or file_kind(path) == SAFETENSORS_KIND:
        tensors, metadata = map_safetensors(path)
        return with_head(tensors), dict(metadata)
    if file_kind(path) == FLAX_KIND:
        try:
            return with_head(torch_names(read_flax(path))), {}
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(repr(str(path))) else f"{str(path)!r}: {text}") from None
    checkpoint = read_ckpt(path)
    return with_head(checkpoint.tensors), checkpoint.values


def file_kind(path: Path) -> str:
    """Return the kind of a file in words, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        return SAFETENSORS_KIND
    if head.startswith(FLAX_STARTS):
        return FLAX_KIND
    kinds = {b"PK": "zip archive (PyTorch since 1.6)", b"\x80": "pickle (PyTorch before 1.6, or plain)"}
    return next((kind for magic, kind in kinds.items() if head.startswith(magic)), "unknown format")


def ema_names(keys: Iterable[str], source: str | Path = "") -> dict[str, str]:
    """Return the key of the averaged copy of each trained tensor of a CompVis file that has one.

    The names of averages have no dots: "model_ema.xy" is the average of "model.x.y". The file, `source`, is
    for messages.

    Raises:
        ValueError: If an average may be that of two tensors.
    """
    known = set(keys)
    found: dict[str, str] = {}
    owner: dict[str, str] = {}
    for key in known:
        if key.startswith("model."):
            average = "model_ema." + key.removeprefix("model.").replace(".", "")
            if average in known:
                if average in owner:
                    raise ValueError(
                        f"{str(source)!r}: {average!r} may be the average of {owner[average]!r} or of {key!r}"
                    )
                owner[average], found[key] = key, average
    return found


def choose_ema(
    state: Mapping[str, Tensor], ema: bool | None, *, source: str | Path
) -> tuple[dict[str, Tensor], bool]:
    """Return the state dict without averaged copies, and whether they took the place of the trained tensors.

    Args:
        state: The state dict of a file.
        ema: True for the averaged tensors, False for the trained ones, None for the averaged ones if the file
            has them.
        source: The file, for messages.

    Raises:
        ValueError: If averages are asked for and the file has none, or if it has those of some tensors only
            and ``ema`` is not False.
    """
    names = ema_names(state, source)
    trained = [key for key in state if key.startswith("model.")]
    if names and len(names) != len(trained) and ema is not False:
        lost = [key for key in trained if key not in names]
        some = f"{len(names)} of {len(trained)} tensors only (not of {', '.join(lost[:3])})"
        raise ValueError(f"{str(source)!r} has averages of {some}: pass ema=False")
    if ema and not names:
        advice = "the plain tensors of a file named '-emaonly' are averaged: leave ema out"
        raise ValueError(f"{str(source)!r} has no averaged (EMA) copies; {advice}")
    rest = {key: value for key, value in state.items() if not key.startswith("model_ema.")}
    if ema is False or not names:
        return rest, False
    return {key: state[names[key]] if key in names else value for key, value in rest.items()}, True


def read_single(
    path: str | Path, *, ema: bool | None = None, family: str | None = None, asked: bool = False
) -> SingleFile:
    """Return the parts of a single file, memory-mapped.

    Args:
        path: The file.
        ema: Which weights to take; see `choose_ema`.
        family: The expected family; files whose shapes no published model has are taken for it. None: any
            supported family.
        asked: Whether the user states the prediction, so that the file's counts no more. Default: False.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, belongs to another, an unknown or an unsupported family, holds
            tensors that belong to no part, or states what cannot be followed; the message names it.
    """
    path = existing_file(path)
    state, values = read_tensors(path)
    state = without_wrapper(state)
    if family is not None and FAMILIES[family].parts == {"vae": ""}:
        state = autoencoder_alone(state)
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
    try:
        stated = stated_sampling(state, values, asked=asked)
        factor = None if scale is None else number_of({"scale_factor": scale}, "scale_factor")
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None
    return SingleFile(
        path=path,
        found=found,
        parts=parts,
        ema=averaged,
        values=values,
        stated=stated,
        scale_factor=factor,
        tables={name: state[name] for name in SCHEDULE_TABLES if name in state},
        notes=family_notes(found.name, values),
    )


def without_wrapper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefix "module.", which data-parallel training adds to every key."""
    if state and all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def autoencoder_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the autoencoder's tensors of a file that stores them below a prefix, such as a whole
    checkpoint."""
    for prefix in AUTOENCODER_PREFIXES:
        if part := below(prefix, state):
            scale = {key: value for key, value in state.items() if key == "scale_factor"}
            return {**part, **scale}
    return state


def split_parts(
    state: Mapping[str, Tensor], found: Detection
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the state dicts of a file's parts, without empty ones, and the keys that belong to no part.

    Keys that are known to be unneeded are left out.
    """
    family = found.family
    bare = not any(key.startswith(prefix) for prefix in family.parts.values() if prefix for key in state)
    prefixes = {"unet": ""} if bare and "unet" in family.parts else family.prefixes(state)
    state = {key: value for key, value in state.items() if not key.endswith(".logit_scale")}
    parts = {name: below(prefix, state) for name, prefix in prefixes.items()}
    unneeded = (*UNNEEDED_KEYS, *family.unneeded)
    left = [
        key
        for key in state
        if not key.startswith(tuple(prefixes.values()))
        and not any(fnmatch.fnmatchcase(key, pattern) for pattern in unneeded)
    ]
    return {name: part for name, part in parts.items() if part}, left
