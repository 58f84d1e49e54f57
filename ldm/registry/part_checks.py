"""Checks that the parts of a bundled model fit its card and each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ldm.catalog.cards import ModelCard
from ldm.catalog.unclip_cards import StageCard, UnCLIPCard, upsampler_name
from ldm.support.text import shown
from ldm.weights.formats.ldm_folder import about_part, read_part_config


def check_latent_parts(card: ModelCard, folder: Path) -> None:
    """Compare what the YAMLs of a latent diffusion model's parts state with the card and with each other.

    Raises:
        ValueError: If the UNet was trained with another schedule or prediction than the card states, or does
            not read the channels of the latent and the text tower's draft.
    """
    check_trained_with("unet", card.trained_with(), about_part(folder, "unet"))
    latent = read_part_config(folder, "vae").latent_channels
    draft = read_part_config(folder, "draft").channels if "draft" in card.part_folders(folder) else 0
    channels = read_part_config(folder, "unet").in_channels
    if channels != latent + draft:
        raise ValueError(
            f"unet: it reads {channels} channels, but the latent has {latent} and the draft {draft}"
        )


def check_unclip_parts(card: UnCLIPCard, folder: Path) -> None:
    """Compare what the YAMLs of an unCLIP model's parts state with the card.

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
            check_trained_with(part, stage.trained_with(), about)
            stated = stage.residual if isinstance(stage, StageCard) else None
            if stated != (residual := about.get("residual")):
                raise ValueError(
                    f"{part}: it was trained with residual {shown(residual)}, but the card states {stated!r}"
                )
    for k, (small, large) in enumerate(pairwise([card.decoder, *card.upsamplers])):
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


def check_trained_with(part: str, stated: Mapping[str, object], about: Mapping[str, Any]) -> None:
    """Raise ValueError if a part's YAML states another diffusion than its card.

    Args:
        part: Name of the part.
        stated: What the card states; see `DiffusionCard.trained_with`.
        about: The part's YAML.
    """
    trained = about.get("diffusion")
    if not isinstance(trained, Mapping):
        return
    if wrong := [
        f"{key} {shown(trained[key])}, but the card states {value!r}"
        for key, value in stated.items()
        if trained.get(key, value) != value
    ]:
        raise ValueError(f"{part}: it was trained with {'; '.join(wrong)}")
