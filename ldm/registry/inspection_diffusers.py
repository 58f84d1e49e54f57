"""Report what is in a folder in diffusers layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ldm.registry.candidates import Candidates, fit_candidates, tensor_shapes
from ldm.registry.report import Report, non_finite_in_parts, report_part
from ldm.weights.detection import Detection, detect
from ldm.weights.fields.judge import Finding, judge_fields, named
from ldm.weights.fields.pipelines import PIPELINE_OPTIONS
from ldm.weights.formats.diffusers_check import CLASSES, component_findings
from ldm.weights.formats.diffusers_folder import (
    PARTS,
    Component,
    Folder,
    is_folder,
    list_variants,
    read_component,
    read_folder,
)
from ldm.weights.formats.diffusers_hashes import FolderCheck, folder_hashes
from ldm.weights.formats.diffusers_stated import scheduler_findings
from ldm.weights.formats.pickles import examine
from ldm.weights.formats.single_file import SAFETENSORS_KIND, file_kind

PICKLED = {".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth", ".th"}  # endings of pickled files


def inspect_diffusers_folder(path: Path, candidates: Candidates, *, nan: bool, digest: bool) -> Report:
    """Report what is in a pipeline's folder, or in the folder of one part.

    Args:
        path: The folder.
        candidates: The cards to compare with, given the detected family.
        nan: Whether to look for NaN and infinity.
        digest: Whether to compute SHA-256.
    """
    problems: list[str] = []
    values: dict[str, object] = {}
    classes: Mapping[str, str] = {}
    stated: list[str] = []
    if is_folder(path):
        try:
            top = read_folder(path, parts=())
            values, classes = {"class": top.class_name, **top.options}, top.components
            stated += stated_by_pipeline(top, problems)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    folders = (
        [path]
        if list_variants(path)
        else sorted(folder for folder in path.iterdir() if folder.is_dir() and list_variants(folder))
    )
    if not folders and not problems:
        problems.append(f"{str(path)!r} holds no weights in a known layout")
    names, unsafe, judged = examine_pickles(path)
    components: dict[str, Component] = {}
    for folder in folders:
        try:
            component = read_component(folder, class_name=classes.get(folder.name, ""))
            components[folder.name] = component
            if component.class_name in CLASSES:
                stated += stated_lines(folder.name, component_findings(component), component.config, problems)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    parts = {name: dict(component.tensors) for name, component in components.items()}
    found = folder_family(parts, path, problems)
    files = [file for component in components.values() for file in component.files]
    return Report(
        path=path,
        kind="diffusers folder" if is_folder(path) else "folder",
        size=sum(file.stat().st_size for file in files),
        found=found,
        sha256=compared_hashes(path, files, problems) if digest else {},
        values=values,
        stated=tuple(stated),
        parts=tuple(report_part(name, part) for name, part in parts.items()),
        fits=fit_candidates(candidates, found, {PARTS.get(name, name): part for name, part in parts.items()}),
        globals=names,
        bad=non_finite_in_parts(parts) if nan else None,
        unsafe=unsafe,
        judged=judged,
        problems=tuple(problems),
    )


def compared_hashes(path: Path, files: Iterable[Path], problems: list[str]) -> dict[str, str]:
    """Return the SHA-256 of files in a folder, compared with those that its index states.

    Args:
        path: The folder.
        files: The files of its weights.
        problems: List to which the reason is appended if they differ.
    """
    found = folder_hashes(path, files)
    try:
        FolderCheck(path, files).finish()
    except (ValueError, OSError) as error:
        problems.append(str(error))
    return dict(found)


def stated_by_pipeline(folder: Folder, problems: list[str]) -> list[str]:
    """Return what a pipeline's options and schedulers state, and what is done with it.

    Args:
        folder: The folder, without its parts.
        problems: List to which the reasons are appended if something cannot be followed.
    """
    lines = stated_lines(
        "model_index.json", judge_fields(folder.options, PIPELINE_OPTIONS), folder.options, problems
    )
    for name, config in folder.schedulers.items():
        lines.append(f"{name}: {named(config['_class_name'])}")
        try:
            lines += stated_lines(name, scheduler_findings(config), config, problems)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return lines


def stated_lines(
    name: str, findings: Iterable[Finding], config: Mapping[str, object], problems: list[str]
) -> list[str]:
    """Return a line for each stated field that is acted on, and one for those that change nothing.

    Args:
        name: Name of the component.
        findings: Its fields, judged without a card.
        config: Its configuration.
        problems: List to which the fields that loading refuses are appended.
    """
    lines, rest = [], list[str]()
    for each in findings:
        if each.wrong:
            problems.append(f"{name}: {each}")
        elif config.get(each.name) is None:
            continue
        elif each.action in ("shapes", "ignored", "fixed"):
            rest.append(each.name)
        else:
            done = f"{each.action}: {each.note}" if each.action in ("followed", "unknown") else each.note
            lines.append(f"{name}: {each.name} = {named(each.value)} ({done})")
    if rest:
        lines.append(f"{name}: as computed, by the shapes or ignored: {', '.join(rest)}")
    return lines


def examine_pickles(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Return the globals that the pickled files in a folder and its sub-folders name, those that are refused
    with their file, and whether all of these files could be read.

    Shards and files that are not loaded are among them: "nothing unsafe" is said of the folder.
    """
    names, unsafe, judged = dict[str, None](), dict[str, None](), True
    folders = [path, *(folder for folder in path.iterdir() if folder.is_dir())]
    files = (file for folder in folders for file in folder.iterdir() if file.suffix.lower() in PICKLED)
    for file in sorted(files):
        if file.is_file() and file_kind(file) != SAFETENSORS_KIND:
            found = examine(file)
            names |= dict.fromkeys(found.globals)
            unsafe |= dict.fromkeys(f"{file.relative_to(path)}: {each}" for each in found.refused)
            judged = judged and not found.problem
    return tuple(names), tuple(unsafe), judged


def folder_family(
    parts: Mapping[str, Mapping[str, Tensor]], path: Path, problems: list[str]
) -> Detection | None:
    """Return the family of a folder by its UNet, its prior or its only part; None if it is unknown.

    Args:
        parts: The tensors by sub-folder.
        path: The folder.
        problems: List to which the reason is appended if the family is unknown.
    """
    only = next(iter(parts.values())) if len(parts) == 1 else None
    deciding = parts.get("unet") or parts.get("prior") or only
    if deciding is None:
        return None
    try:
        return detect(tensor_shapes(deciding), source=path)
    except ValueError as error:
        problems.append(str(error))
        return None
