"""unCLIP models in our own layout: a folder with a card and a part for each network, as training exports
them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.catalog.lookup import read_card
from ldm.catalog.unclip_cards import UnCLIPCard
from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.xlmr import XLMRConditioner
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.unclip.assembly import assemble_unclip
from ldm.registry.unclip.sources import unclip_from_ldm
from ldm.support.config import to_dict
from ldm.support.files import write_atomically
from ldm.weights.formats.ldm_folder import write_part, write_vocabulary


def read_unclip(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> UnCLIP:
    """The model in a folder of ours; ValueError if its card is of another kind of model, FileNotFoundError
    for a part that is absent."""
    card = read_card(Path(folder) / "card.yaml")
    if not isinstance(card, UnCLIPCard):
        raise ValueError(f"{str(folder)!r} holds {card.name!r}, which is no unCLIP model")
    return assemble_unclip(card, unclip_from_ldm(card, Path(folder), dtype))


def write_unclip(pipe: UnCLIP, folder: str | Path, *, dtype: torch.dtype | None = None, **facts: Any) -> Path:
    """Write a model so that `read_unclip` reads it back: bit for bit, unless another dtype is asked for; the
    facts go into every part's YAML.

    The folder holds every part, shared ones too.
    """
    import yaml

    folder = Path(folder)
    for part, network in pipe.networks().items():
        own = (
            {"latent_scale": pipe.decoder.space.scale}
            if part == "vae"
            else {"clip": pipe.card.clip}
            if part in ("prior", "decoder")
            else {}
        )
        write_part(folder, part, network, network.config, dtype=dtype, **own, **facts)
    if isinstance(text := pipe.clip.text, TextConditioner):
        write_vocabulary(folder, text.tokenizer, text.known_words)
    if isinstance(words := pipe.decoder.text, XLMRConditioner):
        content = json.dumps(words.tokenizer.to_json(), ensure_ascii=False)
        write_atomically(folder / "words-tokenizer.json", content.encode())
    card = replace(pipe.card, parts={}, prior=pipe.card.prior if pipe.prior is not None else None)
    write_atomically(folder / "card.yaml", yaml.safe_dump(to_dict(card), sort_keys=False, width=140).encode())
    return folder
