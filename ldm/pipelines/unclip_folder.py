"""unCLIP models in our own layout: a folder with a card and a part for each network, as training exports them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.config import build, read_yaml, to_dict
from ldm.conventions import get_convention
from ldm.files import write_atomically
from ldm.models.clip import VisionTower
from ldm.models.prior import Prior
from ldm.pipelines.clip import ClipPair
from ldm.pipelines.space import Space
from ldm.pipelines.unclip import UnCLIP
from ldm.pipelines.unclip_stages import DecoderStage, PriorStage, UpsamplerStage
from ldm.unclip_cards import UnCLIPCard
from ldm.weights.native import EMOJI_TEXT, read_network, read_text, write_part, write_text


def read_unclip_card(path: str | Path) -> UnCLIPCard:
    """The card in a YAML file; ValueError says what is wrong in it."""
    mapping = read_yaml(path)
    stages = [mapping.get("prior"), mapping.get("decoder"), *(mapping.get("upsamplers") or ())]
    for stage in stages:
        if isinstance(stage, dict) and isinstance(convention := stage.get("convention"), Mapping):
            stage["convention"] = get_convention(convention)
    try:
        return build(UnCLIPCard, mapping)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None


def read_unclip(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> UnCLIP:
    """The model in a folder: card.yaml, text, vision, decoder, and where it has them vae, prior and upsamplers.

    ValueError for a prior or decoder that was trained on another CLIP than the card names; FileNotFoundError for a part that is absent.
    """
    folder = Path(folder)
    card = read_unclip_card(folder / "card.yaml")
    origin: dict[str, str] = {}

    def part(name: str) -> tuple[nn.Module, dict[str, Any]]:
        network, about = read_network(folder, name, dtype=dtype)
        origin[name] = about["sha256"]
        if about.get("clip", card.clip) != card.clip:
            raise ValueError(f"{name} in {str(folder)!r} was trained on {about['clip']!r}, the card runs on {card.clip!r}: two CLIPs share no space")
        return network, about

    prior, _ = part("prior") if card.prior is not None else (None, None)
    length = prior.config.length if isinstance(prior, Prior) else 77
    text = read_text(folder, replace(EMOJI_TEXT, length=length), dtype=dtype)
    vision, _ = part("vision")
    assert isinstance(vision, VisionTower)
    network, _ = part("decoder")
    vae, about = part("vae") if (folder / "vae.yaml").is_file() else (None, {})
    decoder = DecoderStage(
        network, card.decoder, clip=card.clip, space=Space(vae, float(about.get("latent_scale", 1.0))),
        text=text if network.config.condition.text_dim is not None else None,
    )  # fmt: skip
    upsamplers = []
    for k, stage in enumerate(card.upsamplers):
        name = part_name(k)
        last = part(f"{name}-last")[0] if (folder / f"{name}-last.yaml").is_file() else None
        upsamplers.append(UpsamplerStage(part(name)[0], stage, index=k, last=last))
    first = None
    if card.prior is not None:
        assert isinstance(prior, Prior)
        first = PriorStage(prior, card.prior, clip=card.clip)
    clip = ClipPair(card.clip, text=text, vision=vision)
    return UnCLIP(clip=clip, prior=first, decoder=decoder, upsamplers=upsamplers, card=card, origin=origin).eval()


def write_unclip(pipe: UnCLIP, folder: str | Path, **facts: Any) -> Path:
    """Write a model so that `read_unclip` reads it back bit for bit; the facts go into every part's YAML.

    ValueError for Stable unCLIP, whose decoder has a text tower of its own, or a model without both of CLIP's towers.
    """
    import yaml

    folder, text, vision = Path(folder), pipe.clip.text, pipe.clip.vision
    if pipe.decoder.augmentation is not None or pipe.decoder.text not in (None, text) or text is None or vision is None:
        raise ValueError(f"{pipe.card.name!r}: the native layout holds models with both towers of one CLIP, whose texts the decoder reads or none")
    facts = {"clip": pipe.card.clip, **facts}
    write_text(folder, text, words=None if text.words is None else sorted(text.words), dtype=None)  # type: ignore[arg-type]
    write_part(folder, "vision", vision, vision.config, dtype=None)
    networks: dict[str, nn.Module] = {"decoder": pipe.decoder.denoiser.net}
    if pipe.prior is not None:
        networks["prior"] = pipe.prior.net
    for k, stage in enumerate(pipe.upsamplers):
        networks |= {part_name(k): stage.denoiser.net} | ({} if stage.last is None else {f"{part_name(k)}-last": stage.last.net})
    for name, network in networks.items():
        write_part(folder, name, network, network.config, dtype=None, **facts)
    if pipe.decoder.space.vae is not None:
        write_part(folder, "vae", pipe.decoder.space.vae, pipe.decoder.space.vae.config, dtype=None, latent_scale=pipe.decoder.space.scale)
    write_atomically(folder / "card.yaml", yaml.safe_dump(to_dict(pipe.card), sort_keys=False, width=140).encode())
    return folder


def part_name(k: int) -> str:
    """The name of the k-th upsampler's part."""
    return "upsampler" if k == 0 else f"upsampler{k + 1}"
