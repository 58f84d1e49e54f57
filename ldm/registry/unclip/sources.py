"""Where an unCLIP model's networks come from: a folder of ours, folders of diffusers, or chance
(`unclip_originals`: their authors' files)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.unclip_cards import UnCLIPCard, upsampler_name
from ldm.registry.latent.sources import part_dtype
from ldm.registry.unclip.layouts import PipelineComponent, check_component, components
from ldm.weights.formats.diffusers_folder import read_component
from ldm.weights.formats.native_folder import about_part, read_network, read_part_config
from ldm.weights.formats.safetensors import fingerprint
from ldm.weights.parts import build_network, fill_network, randomise
from ldm.weights.rules.prior import with_statistics

OPTIONAL = ("text", "vision", "prior")  # a model without one of these has fewer tasks


@dataclass(frozen=True, kw_only=True)
class UnCLIPSource:
    """A model's networks by part, in their final dtype; the latent scale, and what a recipe says of the
    weights' origin.

    ``vocabulary``: the folder whose vocabulary.json the text tower's tokenizer has, None for the full one;
    ``pieces``: XLM-R's tokenizer.json.
    """

    networks: Mapping[str, nn.Module]
    latent_scale: float
    origin: Mapping[str, str]
    vocabulary: Path | None = None
    pieces: Path | None = None


def folder_of(card: UnCLIPCard, folder: Path, part: str) -> Path:
    """Where a part of a folder of ours lies: there, or where the card says."""
    return folder / card.parts[part] if part in card.parts else folder


def native_parts(card: UnCLIPCard, folder: Path) -> list[str]:
    """The parts of a folder of ours: those that the card's stages need, and of the others those that are
    there."""
    upsamplers = [upsampler_name(k) for k in range(len(card.upsamplers))]
    needed = ["decoder", *(["prior"] if card.prior is not None else []), *upsamplers, *card.parts]
    others = ["text", "vision", "noise", "words", "vae", *(f"{name}-last" for name in upsamplers)]
    return list(dict.fromkeys([*needed, *(name for name in others if (folder / f"{name}.yaml").is_file())]))


def unclip_from_random(card: UnCLIPCard, dtype: torch.dtype, folder: Path | None = None) -> UnCLIPSource:
    """Small random weights in the card's shapes, the same every time; ``folder``: an embedded model's, whose
    shapes and tokenizer count."""
    if folder is not None:
        configs = {
            part: read_part_config(folder_of(card, folder, part), part) for part in native_parts(card, folder)
        }
    elif card.networks is not None:
        configs = card.networks.configs()
    else:
        raise ValueError(
            f"the card {card.name!r} states no shapes: its weights come as a folder of ours, with a YAML for"
            " each part"
        )
    networks = {
        part: randomise(build_network(config), seed, part_dtype(part, dtype))
        for seed, (part, config) in enumerate(configs.items())
    }
    vocabulary = None if folder is None else folder_of(card, folder, "text")
    return UnCLIPSource(
        networks=networks,
        latent_scale=card.latent_scale or 1.0,
        origin={"random": "seed 0"},
        vocabulary=vocabulary,
    )


def unclip_from_native(card: UnCLIPCard, folder: Path, dtype: torch.dtype) -> UnCLIPSource:
    """A folder in our own layout: a part that was trained on another CLIP than the card names raises
    ValueError, an absent one FileNotFoundError."""
    networks, origin, scale = {}, {}, card.latent_scale or 1.0
    for part in native_parts(card, folder):
        where = folder_of(card, folder, part)
        if (clip := about_part(where, part).get("clip", card.clip)) != card.clip:
            raise ValueError(
                f"{part} in {str(where)!r} was trained on {clip!r}, the card runs on {card.clip!r}: two CLIPs"
                " share no space"
            )
        networks[part], about = read_network(where, part, dtype=part_dtype(part, dtype))
        origin[part] = about["sha256"]
        if part == "vae":
            scale = float(about.get("latent_scale", scale))
    vocabulary = folder_of(card, folder, "text") if "text" in networks else None
    return UnCLIPSource(
        networks=networks,
        latent_scale=scale,
        origin=origin,
        vocabulary=vocabulary,
        pieces=folder / "words-tokenizer.json",
    )


def unclip_from_diffusers(
    card: UnCLIPCard, path: Path, dtype: torch.dtype, *, variant: str | None
) -> UnCLIPSource:
    """A folder of diffusers, or one that holds such folders (Kandinsky's prior and decoder), all of pipelines
    of the card's family."""
    if card.networks is None:
        raise ValueError(
            f"{str(path)!r}: {card.name!r} is of no published family, so its weights come as a folder of ours"
        )
    found = components(card, path)
    networks, origin, scale = {}, {}, card.latent_scale or 1.0
    for part, config in card.networks.configs().items():
        if part not in found:
            if part in OPTIONAL:
                continue
            raise FileNotFoundError(
                f"{str(path)!r} has no {part} of {card.name!r}; it has {', '.join(found)}"
            )
        state, about = _read(part, found[part], config, variant, path, origin)
        if part == "prior":
            state = with_statistics(
                state,
                tuple(state[name] for name in ("clip_mean", "clip_std")) if "clip_mean" in state else None,
            )
        if part == "noise":
            _check_noise(state, found[part][0].path)
        if part == "vae":
            # MoVQ's is not used
            scale = float(about.get("scaling_factor") or scale) if card.latent_scale != 1.0 else 1.0
        networks[part] = fill_network(
            build_network(config),
            state,
            "diffusers",
            source=found[part][0].path,
            dtype=part_dtype(part, dtype),
        )
    pieces = next((c.path.parent / "tokenizer" for c in found.get("words", ())), None)
    return UnCLIPSource(networks=networks, latent_scale=scale, origin=origin, pieces=pieces)


def _read(
    part: str,
    sources: tuple[PipelineComponent, ...],
    config: Any,
    variant: str | None,
    path: Path,
    origin: dict[str, str],
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors of a part, of several components below their names, and the configuration of the first."""
    state: dict[str, Tensor] = {}
    first: Mapping[str, Any] = {}
    for source in sources:
        component = read_component(source.path, variant=variant)
        check_component(part, config, component)
        prefix = f"{source.name}." if len(sources) > 1 else ""
        state |= {prefix + key: tensor for key, tensor in component.tensors.items()}
        origin |= {str(file.relative_to(path)): fingerprint(file) for file in component.files}
        first = first or component.config
    return state, first


def _check_noise(state: Mapping[str, Tensor], path: Path) -> None:
    if lost := [name for name in ("mean", "std") if name not in state]:
        raise ValueError(f"{str(path)!r} lacks the statistics of CLIP's image embeddings: {', '.join(lost)}")
