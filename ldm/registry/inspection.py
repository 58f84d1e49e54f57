"""Report what is in a file or folder of weights, from headers and opcodes; nothing in it is executed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.registry.candidates import Candidate, Candidates, card_candidates, fit_candidates, tensor_shapes
from ldm.registry.dalle.inspection import inspect_tokens_folder
from ldm.registry.inspection_adapters import adapter_in, inspect_adapter
from ldm.registry.inspection_controls import control_in, inspect_control
from ldm.registry.inspection_diffusers import inspect_diffusers_folder
from ldm.registry.inspection_ldm import (
    inspect_ldm_folder,
    inspect_ldm_part,
    is_ldm_folder,
    is_ldm_part,
    is_lone_ldm_part,
)
from ldm.registry.report import Report, non_finite, report_part
from ldm.weights.detection import Detection, detect
from ldm.weights.formats.diffusers_folder import is_folder
from ldm.weights.formats.markers import markers, stated_sampling
from ldm.weights.formats.pickles import examine
from ldm.weights.formats.safetensors import existing_file, sha256
from ldm.weights.formats.single_file import (
    FLAX_KIND,
    SAFETENSORS_KIND,
    ema_names,
    file_kind,
    read_tensors,
    split_parts,
)

__all__ = ["Candidate", "Candidates", "Report", "inspect"]


def inspect(
    path: str | Path,
    *,
    candidates: Candidates = card_candidates,
    nan: bool = False,
    digest: bool = True,
    model: str | None = None,
) -> Report:
    """Report what is in a file or folder of weights, without executing anything in it.

    Args:
        path: A single file, a folder in diffusers layout or one of its parts, or a folder or a file in ldm
            layout: what `ldm.save` and `ldm export` write, and the models inside the package. Or an adapter,
            or a control.
        candidates: The cards to compare with, given the detected family. Default: all known cards.
        nan: Whether to look for NaN and infinity, which reads every tensor. Default: False.
        digest: Whether to compute SHA-256, which reads every byte. Default: True.
        model: The published model with which an adapter or a control is compared. Default: that of its
            family.

    Returns:
        The report. What is wrong with a file is in `Report.problems`.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
    """
    path = Path(path)
    if path.exists() and not is_ldm_folder(path) and (adapter := adapter_in(path)) is not None:
        return inspect_adapter(adapter, model=model, nan=nan, digest=digest)
    if path.exists() and not is_ldm_folder(path) and (control := control_in(path)) is not None:
        return inspect_control(control, model=model, nan=nan, digest=digest)
    if path.is_dir():
        if is_ldm_folder(path):
            return inspect_ldm_folder(path, nan=nan, digest=digest)
        tokens = None if is_folder(path) else inspect_tokens_folder(path, nan=nan, digest=digest)
        return tokens or inspect_diffusers_folder(path, candidates, nan=nan, digest=digest)
    path = existing_file(path)
    if is_ldm_part(path):
        return inspect_ldm_part(path, nan=nan, digest=digest)
    return inspect_file(path, candidates, nan=nan, digest=digest)


def inspect_file(path: Path, candidates: Candidates, *, nan: bool, digest: bool) -> Report:
    """Report what is in a single file; see `inspect`."""
    problems: list[str] = []
    state: dict[str, Tensor] = {}
    values: Mapping[str, object] = {}
    kind = file_kind(path)
    pickled = None if kind in (SAFETENSORS_KIND, FLAX_KIND) else examine(path)
    try:
        if pickled is None or path.suffix == ".safetensors":
            state, values = read_tensors(path)
        else:
            checkpoint = pickled.checkpoint()
            state, values = checkpoint.tensors, checkpoint.values
    except ValueError as error:
        problems.append(str(error))
    if is_lone_ldm_part(values):
        part = str(values["part"])
        found, parts, left = None, {part: state}, list[str]()
        kind = f"{kind}, {part} of a model in ldm layout"
        problems.append(f"{part}.yaml, which states the network of {path.name}, is not beside it")
    else:
        found, parts, left = family_parts(state, path, problems)
    try:
        averaged = len(ema_names(state, path))
    except ValueError as error:
        averaged = 0
        problems.append(str(error))
    if left:
        names = f"{', '.join(left[:5])}{' …' if len(left) > 5 else ''}"
        problems.append(f"{len(left)} tensors belong to no part: {names}")
    return Report(
        path=path,
        kind=kind,
        size=path.stat().st_size,
        sha256={path.name: sha256(path)} if digest else {},
        found=found,
        parts=tuple(report_part(name, part) for name, part in parts.items()),
        averaged=averaged,
        values=values,
        stated=stated_by_file(state, values, problems),
        fits=fit_candidates(candidates, found, parts),
        bad=non_finite(state) if nan else None,
        globals=pickled.globals if pickled else (),
        unsafe=pickled.refused if pickled else (),
        judged=pickled is None or not pickled.problem,
        problems=tuple(problems),
    )


def stated_by_file(
    state: Mapping[str, Tensor], values: Mapping[str, object], problems: list[str]
) -> tuple[str, ...]:
    """Return what a single file states about its use, and what is done with it.

    Args:
        state: The file's tensors.
        values: What the file holds beside tensors.
        problems: List to which the reason is appended if a statement cannot be followed.
    """
    plain = {key: value for key, value in values.items() if isinstance(value, int | float | str)}
    try:
        stated_sampling(state, plain)
    except ValueError as error:
        problems.append(str(error))
    return tuple(f"{name} = {value} ({meaning})" for name, value, meaning in markers(state, plain))


def family_parts(
    state: Mapping[str, Tensor], path: Path, problems: list[str]
) -> tuple[Detection | None, dict[str, dict[str, Tensor]], list[str]]:
    """Split a file's tensors into the parts of its family.

    Args:
        state: The file's tensors.
        path: The file.
        problems: List to which the reason is appended if the family is unknown.

    Returns:
        The family or None, the tensors by part ("?" if the family is unknown, "all" if it has no parts), and
        the keys that belong to no part.
    """
    if not state:
        return None, {}, []
    try:
        found = detect(tensor_shapes(state), source=path)
    except ValueError as error:
        problems.append(str(error))
        return None, {"?": dict(state)}, []
    if not found.family.parts:
        return found, {"all": dict(state)}, []
    parts, left = split_parts(state, found)
    return found, parts, [key for key in left if key != "scale_factor"]
