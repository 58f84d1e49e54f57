"""What the config.json of DALL·E Mini's flax files states, compared with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.catalog.dalle_cards import DalleCard
from ldm.models.dalle.decoder import DalleDecoderConfig
from ldm.models.dalle.encoder import DalleEncoderConfig
from ldm.support.strict_json import read_json
from ldm.support.warn import warn_user
from ldm.weights.fields.dalle import DALLE_MINI
from ldm.weights.fields.judge import ANY, Config, Finding, conflicts, judge_fields, warnings_of

MODEL_TYPE = "dallebart"


def check_model_config(card: DalleCard, folder: Path) -> None:
    """Compare the config.json in a folder, if it is one of these models, with a card.

    Sizes that it does not state are not compared. A warning names the fields that are not known.

    Args:
        card: The model's card.
        folder: The folder.

    Raises:
        ValueError: If it states another model; the message names the fields.
    """
    path = folder / "config.json"
    _, findings = judged_config(card, folder)
    if wrong := conflicts(findings):
        raise ValueError(f"{str(path)!r} does not fit {card.name!r}: {'; '.join(wrong)}")
    for note in warnings_of(findings, f"{str(path)!r}"):
        warn_user(note)


def judged_config(card: DalleCard, folder: Path) -> tuple[Config, list[Finding]]:
    """Return the config.json in a folder and what is done with its fields; nothing if it is of another model.

    Args:
        card: The card that it is compared with.
        folder: The folder.
    """
    path = folder / "config.json"
    stated: Config = read_json(path) if path.is_file() else {}
    if stated.get("model_type") != MODEL_TYPE:
        return {}, []
    expected = {name: value if name in stated else ANY for name, value in sizes_of(card).items()}
    return stated, list(judge_fields(stated, DALLE_MINI, expected))


def sizes_of(card: DalleCard) -> dict[str, Any]:
    """Return the sizes of a card's networks under the names of the config.json."""
    shapes = card.shapes()
    encoder, decoder = shapes["encoder"], shapes["decoder"]
    assert isinstance(encoder, DalleEncoderConfig) and isinstance(decoder, DalleDecoderConfig)
    return {
        "d_model": encoder.width,
        "decoder_attention_heads": decoder.heads,
        "decoder_ffn_dim": decoder.inner,
        "decoder_layers": decoder.layers,
        "decoder_start_token_id": card.start,
        "encoder_attention_heads": encoder.heads,
        "encoder_ffn_dim": encoder.inner,
        "encoder_layers": encoder.layers,
        "encoder_vocab_size": encoder.vocabulary,
        "image_length": decoder.length,
        "image_vocab_size": decoder.vocabulary,
        "max_text_length": encoder.length,
    }
