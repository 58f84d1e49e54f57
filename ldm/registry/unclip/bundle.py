"""A model's folder from its card and the exports of its trainings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.catalog.lookup import parse_card
from ldm.catalog.unclip_cards import StageCard, UnCLIPCard, upsampler_name
from ldm.registry.unclip.assembly import assemble_unclip
from ldm.registry.unclip.sources import folder_of, native_parts, unclip_from_native
from ldm.support.config import nearest, read_yaml, to_dict
from ldm.support.files import write_atomically
from ldm.weights.formats.native_folder import about_part


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
        assemble_unclip(card, unclip_from_native(card, folder, torch.float32))
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
    """ValueError where a part's YAML says of its training what the card says otherwise: CLIP, schedule, what
    is predicted, what it enlarges."""
    stages: dict[str, Any] = {"prior": card.prior, "decoder": card.decoder}
    sizes = [card.decoder, *card.upsamplers]
    stages |= {upsampler_name(k): stage for k, stage in enumerate(card.upsamplers)}
    for part in native_parts(card, folder):
        about = about_part(folder_of(card, folder, part), part)
        if (
            part == "vision"
            and (digest := re.search("/([0-9a-f]{12})$", card.clip))
            and not about["sha256"].startswith(digest[1])
        ):
            raise ValueError(
                f"clip: {card.clip!r} is named by its image tower's hash, and the vision part's is"
                f" {about['sha256'][:12]}"
            )
        stage, trained = stages.get(part), about.get("diffusion")
        if isinstance(stage, StageCard) and isinstance(trained, Mapping):
            said = {
                "schedule": stage.schedule.kind,
                "timesteps": stage.schedule.timesteps,
                "prediction": stage.prediction,
            }
            if wrong := [
                f"{key} {trained[key]!r}, the card says {said[key]!r}"
                for key in said
                if trained.get(key, said[key]) != said[key]
            ]:
                raise ValueError(f"{part}: it was trained with {'; '.join(wrong)}")
        if isinstance(stage, StageCard) and stage.residual != (learnt := about.get("residual")):
            raise ValueError(
                f"{part}: it was trained with residual {learnt!r}, the card says {stage.residual!r}"
            )
        if (factor := about.get("factor")) is not None and isinstance(stage, StageCard):
            before = sizes[sizes.index(stage) - 1].defaults.height
            if stage.defaults.height != factor * before:
                raise ValueError(
                    f"{part}: it was trained to enlarge {factor} times, the card says from {before} to"
                    f" {stage.defaults.height}"
                )
