"""Where a model's networks come from: a single file, a folder of diffusers, a folder of ours, or chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.catalog.cards import AutoencoderCard, Card, ModelCard
from ldm.catalog.lookup import known_cards
from ldm.models.unet import UNetConfig
from ldm.weights.detection import WrongFamily
from ldm.weights.formats.diffusers_config import conflicts, training_facts, unet_config
from ldm.weights.formats.diffusers_folder import Folder, read_component, read_folder
from ldm.weights.formats.native_folder import read_network, read_part_config
from ldm.weights.formats.safetensors import fingerprint
from ldm.weights.formats.single_file import read_single
from ldm.weights.parts import build_network, fill_network, randomise

SCHEDULER_FIELDS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "prediction_type",
    "rescale_betas_zero_snr",
)
BASE_STEP = 875_000  # the `global_step` that Stable Diffusion 2's base (eps) checkpoints hold


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's networks by part, in their final dtype; the latent scale, and what a recipe says of the
    weights' origin.

    ``folder``: where a tokenizer's files may lie. ``notes``: what the weights say that their user should
    hear.
    """

    networks: dict[str, nn.Module]
    latent_scale: float
    origin: Mapping[str, str]
    folder: Path | None = None
    notes: tuple[str, ...] = field(default=())


def configs_of(card: Card, folder: Path | None = None) -> dict[str, Any]:
    """The shapes of a card's networks by part; those of a card that states none are read from the YAMLs of
    its folder."""
    if isinstance(card, AutoencoderCard):
        return {"vae": card.config()}
    if card.networks is None and folder is not None:
        drafts = ("draft",) if (folder / "draft.yaml").is_file() else ()
        return {part: read_part_config(folder, part) for part in ("unet", "vae", "text", *drafts)}
    if card.networks is None:
        raise ValueError(
            f"the card {card.name!r} states no shapes: its weights come as a folder of ours, with a YAML for"
            " each part"
        )
    return dict(card.networks.configs())


def part_dtype(part: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a part: autoencoders overflow in float16, and compute in float32 instead."""
    return torch.float32 if part == "vae" and dtype == torch.float16 else dtype


def latent_from_random(card: Card, dtype: torch.dtype, folder: Path | None = None) -> Source:
    """Small random weights in the card's shapes, the same every time; ``folder``: an embedded model's, whose
    shapes and tokenizer count."""
    networks = {}
    for seed, (part, config) in enumerate(configs_of(card, folder).items()):
        networks[part] = randomise(build_network(config), seed, part_dtype(part, dtype))
    scale = 1.0 if isinstance(card, AutoencoderCard) else card.latent_scale or 1.0
    return Source(networks=networks, latent_scale=scale, origin={"random": "seed 0"}, folder=folder)


def latent_from_native(card: ModelCard, folder: Path, dtype: torch.dtype) -> Source:
    """A folder in our own layout."""
    wanted = tuple(configs_of(card, folder))
    networks, about = {}, {}
    for part in wanted:
        networks[part], about[part] = read_network(folder, part, dtype=part_dtype(part, dtype))
    scale = float(about["vae"]["latent_scale"])
    return Source(
        networks=networks,
        latent_scale=scale,
        origin={part: about[part]["sha256"] for part in ("vae", "unet")},
        folder=folder,
    )


def latent_from_file(card: Card, path: Path, dtype: torch.dtype, *, ema: bool | None) -> Source:
    """A single file in the original layout."""
    if card.family == "latent":
        raise ValueError(
            f"{str(path)!r}: {card.name!r} is of no published family, so its weights come as a folder of ours"
        )
    configs = configs_of(card)
    try:
        single = read_single(path, ema=ema, family=card.family)
    except WrongFamily as error:
        raise ValueError(f"{error}{other_cards(error.found.name)}") from None
    lost = [part for part in configs if part not in single.parts]
    if lost:
        raise ValueError(
            f"{str(path)!r} holds {', '.join(single.parts)}, and no {', '.join(lost)}: {card.name!r} takes"
            f" {', '.join(configs)}"
        )
    networks = {}
    for part, config in configs.items():
        source = f"{path}: {part}" if len(configs) > 1 else path
        networks[part] = fill_network(
            build_network(config),
            single.parts.pop(part),
            single.found.layout,
            source=source,
            dtype=part_dtype(part, dtype),
        )
    stated = (
        single.scale_factor
        if isinstance(card, AutoencoderCard) or single.scale_factor is not None
        else card.latent_scale
    )
    if stated is None and isinstance(card, ModelCard):
        raise ValueError(
            f"{str(path)!r} does not state the latent scale of {card.name!r}: its `scale_factor` is absent"
        )
    notes = () if isinstance(card, AutoencoderCard) else _heuristics(card, single.values)
    return Source(
        networks=networks,
        latent_scale=stated or 1.0,
        origin={path.name: fingerprint(path)},
        folder=path.parent,
        notes=notes,
    )


def _heuristics(card: ModelCard, values: Mapping[str, Any]) -> tuple[str, ...]:
    step = values.get("global_step")
    if card.family != "sd2" or step is None or (step == BASE_STEP) == (card.prediction == "eps"):
        return ()
    return (
        (
            f"its global_step {step} is that of a model which predicts {'eps' if step == BASE_STEP else 'v'},"
            f" the card says {card.prediction}"
        ),
    )


def latent_from_folder(
    card: ModelCard, path: Path, dtype: torch.dtype, *, ema: bool | None, variant: str | None
) -> Source:
    """A folder in the layout of diffusers."""
    configs = configs_of(card)
    if "class" in configs:
        raise ValueError(
            f"{str(path)!r}: {card.name!r} has no layout of diffusers; its weights come as a single file"
        )
    top = read_folder(path, parts=())
    _check_schedulers(card, top)
    folder = read_folder(
        path, variant="non_ema" if ema is False and variant is None else variant, parts=tuple(configs)
    )
    expected = configs["unet"]
    _check_family(card, folder, expected)
    networks = {}
    for part, config in configs.items():
        component = folder.parts[part]
        networks[part] = fill_network(
            build_network(config),
            component.tensors,
            "diffusers",
            source=component.path,
            dtype=part_dtype(part, dtype),
        )
    scale = folder.parts["vae"].config.get("scaling_factor") or card.latent_scale
    origin = {
        str(file.relative_to(path)): fingerprint(file)
        for part in configs
        for file in folder.parts[part].files
    }
    return Source(
        networks=networks,
        latent_scale=1.0 if scale is None else float(scale),
        origin=origin,
        folder=path / "tokenizer",
    )


def other_cards(family: str) -> str:
    """The cards of a family, as the end of a message; empty if there are none."""
    others = [card.name for card in known_cards().values() if card.family == family]
    return f"; the cards for it: {', '.join(others)}" if others else ""


def _check_family(card: ModelCard, folder: Folder, expected: UNetConfig) -> None:
    unet = folder.parts["unet"]
    try:
        found = folder.detect()
    except ValueError:
        found = None  # shapes of a card of one's own: the keys decide
    if found is not None and found.name != card.family:
        title = f"{found.name} ({found.family.title})"
        raise ValueError(
            f"{str(folder.path)!r} is a model of the family {title}, {card.name!r} is of"
            f" {card.family}{other_cards(found.name)}"
        )
    wrong = conflicts(unet.config, unet_config(expected)[1], ("attention_head_dim",))
    if wrong:
        raise ValueError(f"{str(unet.path / 'config.json')!r} does not fit {card.name!r}: {'; '.join(wrong)}")


def _check_schedulers(card: ModelCard, folder: Folder) -> None:
    stated = folder.schedulers.get("scheduler")
    if stated is None or stated.get("trained_betas") is not None:
        return
    s = card.schedule
    facts = training_facts(
        s.kind, s.timesteps, s.beta_start, s.beta_end, card.prediction, zero_snr=s.zero_terminal_snr
    )
    wrong = conflicts(stated, {**facts, "rescale_betas_zero_snr": s.zero_terminal_snr}, SCHEDULER_FIELDS)
    if wrong:
        advice = (
            "ask for the card that says so, for prediction= if that is all, or register a card of your own"
        )
        raise ValueError(
            f"{str(folder.path / 'scheduler')!r} was trained otherwise than {card.name!r}:"
            f" {'; '.join(wrong)}; {advice}"
        )


def autoencoder_folder(
    card: AutoencoderCard, path: Path, dtype: torch.dtype, *, variant: str | None
) -> Source:
    """An autoencoder alone: a folder of diffusers with its config.json and weights, or a pipeline's folder,
    of which its part is taken."""
    inner = next((path / name for name in ("vae", "vqvae") if (path / name).is_dir()), path)
    component = read_component(inner, variant=variant)
    vae = fill_network(
        build_network(card.config()),
        component.tensors,
        "diffusers",
        source=inner,
        dtype=part_dtype("vae", dtype),
    )
    origin = {file.name: fingerprint(file) for file in component.files}
    return Source(
        networks={"vae": vae},
        latent_scale=float(component.config.get("scaling_factor") or 1.0),
        origin=origin,
    )
