"""What the config.json of DALL·E Mini's flax files states, compared with a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.catalog.dalle_cards import DalleCard
from ldm.models.dalle.decoder import DalleDecoderConfig
from ldm.models.dalle.encoder import DalleEncoderConfig
from ldm.support.strict_json import read_json
from ldm.support.text import shown

MODEL_TYPE = "dallebart"
# what the networks of published weights are, whatever their size
FIXED: dict[str, Any] = {
    "activation_function": "gelu",
    "ln_positions": "normformer",
    "ln_type": "layernorm",
    "scale_embedding": False,
    "sinkhorn_iters": 1,
    "tie_word_embeddings": False,
    "use_absolute_position_embeddings": True,
    "use_alibi": False,
    "use_bias": False,
    "use_cosine_attention": False,
    "use_deepnet_scaling": False,
    "use_final_ln_decoder": True,
    "use_final_ln_encoder": True,
    "use_glu": True,
    "use_head_scale": False,
    "use_swin_position_embeddings": False,
}


def check_model_config(card: DalleCard, folder: Path) -> None:
    """Compare the config.json in a folder, if it is one of these models, with a card.

    Fields that do not change what the networks compute, such as those of the training, are not looked at.

    Args:
        card: The model's card.
        folder: The folder.

    Raises:
        ValueError: If it states another model; the message names the fields.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    stated = read_json(path)
    if stated.get("model_type") != MODEL_TYPE:
        return
    expected = {**FIXED, **sizes_of(card)}
    if wrong := [
        f"{name} {shown(stated[name])}, expected {value!r}"
        for name, value in expected.items()
        if name in stated and (type(stated[name]) is not type(value) or stated[name] != value)
    ]:
        raise ValueError(f"{str(path)!r} does not fit {card.name!r}: {'; '.join(wrong)}")


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
