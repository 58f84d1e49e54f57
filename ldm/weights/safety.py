"""The safety checker from its published files."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.models.meta import on_meta
from ldm.models.safety import SafetyChecker, SafetyConfig
from ldm.weights.formats.diffusers_folder import read_component
from ldm.weights.formats.single_file import read_tensors
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
    """The safety checker in a file, in a folder with its config.json, or in a pipeline's folder (below
    safety_checker); "random" for random weights.

    FileNotFoundError if there is none; ValueError naming the file if it does not fit.
    """
    with on_meta():
        checker = SafetyChecker(config or SafetyConfig(), black=black)
    if path == "random":
        return randomise(checker, dtype=dtype)  # type: ignore[return-value]
    path = Path(path)
    if path.is_dir():
        inner = path / "safety_checker" if (path / "safety_checker").is_dir() else path
        tensors = dict(read_component(inner, variant=variant).tensors)
    else:
        tensors, _ = read_tensors(path)
    lost = [name for name in OWN if name not in tensors]
    if lost:
        raise ValueError(f"{str(path)!r} is no safety checker: it has no {', '.join(lost)}")
    # on the disk the tower stands below vision_model.vision_model; newer versions of its program drop one
    # level in memory
    tower = {key.removeprefix("vision_model."): value for key, value in tensors.items() if key not in OWN}
    state = {f"vision.{key}": value for key, value in to_clip(checker.vision, tower, source=path).items()}
    load_strict(checker, {**state, **{name: tensors[name] for name in OWN}}, source=path, dtype=dtype)
    return checker.eval().requires_grad_(False)
