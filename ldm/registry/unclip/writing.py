"""Write unCLIP models in ldm layout: a folder with a card, and weights and a YAML file for each part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.conditioning.xlmr import XLMRConditioner
from ldm.pipelines.unclip import UnCLIP
from ldm.support.files import write_atomically
from ldm.weights.formats.exemplar_file import write_embeddings, write_library
from ldm.weights.formats.ldm_folder import WORDS_VOCABULARY, write_part, write_vocabulary
from ldm.weights.formats.ldm_model import write_card


def write_unclip(pipe: UnCLIP, folder: str | Path, *, dtype: torch.dtype | None = None, **facts: Any) -> Path:
    """Write all parts of a model, also those that it shares with others.

    Args:
        pipe: The model.
        folder: The folder to write.
        dtype: Floating-point type of the weights; None keeps each network's own.
        **facts: Entries that are added to every part's YAML.

    Returns:
        The folder.
    """
    folder = Path(folder)
    for part, network in pipe.networks().items():
        own: dict[str, Any] = {}
        if part == "vae":
            own = {"latent_scale": pipe.decoder.space.scale}
        elif part in ("prior", "decoder"):
            own = {"clip": pipe.card.clip}
        elif part == "layout":
            own = {"layout_steps": pipe.decoder.text.layout_steps}
        write_part(folder, part, network, network.config, dtype=dtype, **own, **facts)
    if isinstance(text := pipe.clip.text, TextConditioner):
        write_vocabulary(folder, text.tokenizer, text.known_words)
    words = pipe.decoder.text
    if isinstance(words, ExemplarConditioner):
        write_library(folder, words.library)
        write_vocabulary(folder, words.text.tokenizer, words.text.known_words, name=WORDS_VOCABULARY)
        if words.index is not None:
            write_embeddings(folder, words.index.vectors(), words.index.metric)
    if isinstance(words, XLMRConditioner):
        content = json.dumps(words.tokenizer.to_json(), ensure_ascii=False)
        write_atomically(folder / "words-tokenizer.json", content.encode())
    write_card(
        folder, replace(pipe.card, parts={}, prior=pipe.card.prior if pipe.prior is not None else None)
    )
    return folder
