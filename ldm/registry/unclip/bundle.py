"""A model's folder from its card and the exports of its trainings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.catalog.lookup import parse_card
from ldm.catalog.unclip_cards import AutoregressiveCard, StageCard, UnCLIPCard, upsampler_name
from ldm.registry.unclip.assembly import assemble_unclip
from ldm.registry.unclip.sources import unclip_from_ldm
from ldm.support.config import nearest, read_yaml, to_dict
from ldm.support.files import write_atomically
from ldm.weights.formats.ldm_folder import about_part


def gather(config: str | Path, folder: str | Path) -> Path:
    """The folder of an unCLIP model, which `ldm.load` takes: the parts copied from where their trainings
    exported them, and the card.

    ``config``: a YAML file with the fields of `UnCLIPCard` and beside them ``exports``, the folder of each
    part; parts that another model's folder holds are named in the card's ``parts``, relative to ``folder``.
    Nothing is left if a part is absent (FileNotFoundError), was trained on another CLIP, by another schedule
    or for another thing than the card says, or does not fit the others (ValueError).
    """
    folder, mapping = Path(folder), dict(read_yaml(config))
    exports = mapping.pop("exports", None)
    card = parse_card(mapping, config)
    if not isinstance(card, UnCLIPCard):
        raise ValueError(
            f"{str(config)!r}: expected the card of an unCLIP model, got one of the family {card.family!r}"
        )
    if not isinstance(exports, Mapping):
        raise ValueError(f"{str(config)!r}: exports: expected a mapping of parts to folders, got {exports!r}")
    for part in exports:
        if part not in (known := [*_all_parts(card)]):
            raise ValueError(f"{str(config)!r}: exports: {part!r}; {nearest(part, known)}")
    written: list[Path] = []
    try:
        for part, source in exports.items():
            about_part(source, part)  # or it says what is absent
            names = [f"{part}.safetensors", f"{part}.yaml", *(["vocabulary.json"] if part == "text" else [])]
            for name in names:
                written.append(folder / name)
                write_atomically(folder / name, (Path(source) / name).read_bytes())
        check_parts(card, folder)
        assemble_unclip(card, unclip_from_ldm(card, folder, torch.float32))
    except (ValueError, OSError):
        for path in written:
            path.unlink(missing_ok=True)
        raise
    write_atomically(folder / "card.yaml", yaml.safe_dump(to_dict(card), sort_keys=False, width=140).encode())
    return folder


def _all_parts(card: UnCLIPCard) -> list[str]:
    names = [upsampler_name(k, last=last) for k in range(len(card.upsamplers)) for last in (False, True)]
    return ["text", "vision", "prior", "decoder", "noise", "words", "vae", *names]


def check_parts(card: UnCLIPCard, folder: Path) -> None:
    """Compare what the parts' YAMLs state of their training with the card.

    Raises:
        ValueError: If a part was trained with another CLIP, schedule, prediction, residual or enlargement
            than the card states.
    """
    stages = card.stages()
    for part, where in card.part_folders(folder).items():
        about = about_part(where, part)
        if part == "vision":
            check_clip_hash(card, about["sha256"])
        if (stage := stages.get(part)) is not None:
            check_stage(part, stage, about)
    sizes = [card.decoder, *card.upsamplers]
    for k, (small, large) in enumerate(pairwise(sizes)):
        part = upsampler_name(k)
        factor = about_part(card.part_folders(folder)[part], part).get("factor")
        before, after = small.defaults.height, large.defaults.height
        if factor is not None and after != factor * before:
            raise ValueError(
                f"{part}: it was trained to enlarge {factor} times, but the card enlarges from {before} to"
                f" {after}"
            )


def check_clip_hash(card: UnCLIPCard, sha256: str) -> None:
    """Raise ValueError if the card's CLIP is named by the hash of another image tower."""
    if (named := re.search("/([0-9a-f]{12})$", card.clip)) and not sha256.startswith(named[1]):
        raise ValueError(
            f"clip: {card.clip!r} is named by the hash of its image tower, but that of the vision part is"
            f" {sha256[:12]}"
        )


def check_stage(part: str, stage: StageCard | AutoregressiveCard, about: Mapping[str, Any]) -> None:
    """Raise ValueError if a part's YAML states another training than the card of its stage."""
    stated, trained = stage.trained_with(), about.get("diffusion")
    if isinstance(trained, Mapping):
        if wrong := [
            f"{key} {trained[key]!r}, but the card states {value!r}"
            for key, value in stated.items()
            if trained.get(key, value) != value
        ]:
            raise ValueError(f"{part}: it was trained with {'; '.join(wrong)}")
    if stage.residual != (residual := about.get("residual")):
        raise ValueError(
            f"{part}: it was trained with residual {residual!r}, but the card states {stage.residual!r}"
        )
