"""Load Stable Diffusion's safety checker from its published files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.models.clip.config import VisionConfig
from ldm.models.meta import on_meta
from ldm.models.safety import SafetyChecker, SafetyConfig
from ldm.support.warn import warn_user
from ldm.weights.fields.judge import conflicts, judge_fields, warnings_of
from ldm.weights.fields.texts import CLIP_VISION
from ldm.weights.formats.diffusers_check import expected_fields
from ldm.weights.formats.diffusers_folder import read_component
from ldm.weights.formats.single_file import read_tensors
from ldm.weights.hashing import FileHashes
from ldm.weights.hugging_face_clip import tower_config
from ldm.weights.parts import randomise
from ldm.weights.rules.clip import to_clip
from ldm.weights.strict import load_strict

OWN = ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights")


def load_safety(
    path: str | Path,
    *,
    black: bool = False,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    config: SafetyConfig | None = None,
) -> SafetyChecker:
    """Return the safety checker in evaluation mode.

    Args:
        path: A file, its folder in diffusers layout, the folder of a pipeline that contains it, or "random"
            for random weights.
        black: Whether flagged images are replaced by black ones. Default: False.
        variant: Variant of the files in a folder, such as "fp16".
        dtype: Floating-point type of the weights. Default: float32.
        config: Configuration of the network. Default: that of the published one.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is not a safety checker, or does not fit; the message names the file.
    """
    with on_meta():
        checker = SafetyChecker(config or SafetyConfig(), black=black)
    if path == "random":
        randomise(checker, dtype=dtype)
        checker.origin = {"random": "seed 0"}
        return checker
    path = Path(path)
    if path.is_dir():
        inner = path / "safety_checker" if (path / "safety_checker").is_dir() else path
        component = read_component(inner, variant=variant)
        tensors, files = dict(component.tensors), component.files
        check_tower(component.config, checker.config.vision, inner / "config.json")
    else:
        tensors, files = read_tensors(path)[0], (path,)
    checker.origin = FileHashes({file.name: file for file in files})
    missing = [name for name in OWN if name not in tensors]
    if missing:
        raise ValueError(f"{str(path)!r} is no safety checker: it has no {', '.join(missing)}")
    # files have the image tower below vision_model.vision_model, or below vision_model
    tower = {key.removeprefix("vision_model."): value for key, value in tensors.items() if key not in OWN}
    state = {f"vision.{key}": value for key, value in to_clip(checker.vision, tower, source=path).items()}
    load_strict(checker, {**state, **{name: tensors[name] for name in OWN}}, source=path, dtype=dtype)
    return checker.eval().requires_grad_(False)


def check_tower(stated: Mapping[str, Any], config: VisionConfig, path: Path) -> None:
    """Compare the image tower that a config.json states with that of a checker; warn of unknown fields.

    Args:
        stated: The content of the file. Without a tower nothing is compared.
        config: Configuration of the tower.
        path: The file, for messages.

    Raises:
        ValueError: If it states another tower.
    """
    tower = tower_config(stated, "vision_config")
    if not tower:
        return
    findings = judge_fields(tower, CLIP_VISION, expected_fields(config))
    if wrong := conflicts(findings):
        raise ValueError(f"{str(path)!r} does not fit the safety checker: {'; '.join(wrong)}")
    for note in warnings_of(findings, f"{str(path)!r}"):
        warn_user(note)
