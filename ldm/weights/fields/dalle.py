"""The fields of DALL·E Mini's config.json."""

from __future__ import annotations

from ldm.weights.fields.judge import Fields, by_card, by_shapes, fixed, followed, ignored
from ldm.weights.fields.networks import TRAINING_ONLY
from ldm.weights.fields.texts import INITIAL, PRETRAINED

CALL = "the options of the call decide"
WHAT_IS_DRAWN = "the tokens of an image are as many as the decoder's positions"

DALLE_MINI: Fields = {
    **PRETRAINED,
    "model_type": followed("dallebart", "other models are not compared"),
    # the networks of published weights, whatever their size
    "activation_function": fixed("gelu"),
    "is_encoder_decoder": fixed(True),
    "ln_positions": fixed("normformer"),
    "ln_type": fixed("layernorm"),
    "scale_embedding": fixed(False),
    "sinkhorn_iters": fixed(1),
    "tie_word_embeddings": fixed(False),
    "use_absolute_position_embeddings": fixed(True),
    "use_alibi": fixed(False),
    "use_bias": fixed(False),
    "use_cosine_attention": fixed(False),
    "use_deepnet_scaling": fixed(False),
    "use_final_ln_decoder": fixed(True),
    "use_final_ln_encoder": fixed(True),
    "use_glu": fixed(True),
    "use_head_scale": fixed(False),
    "head_scale": fixed(False),  # its name in 2021
    "use_swin_position_embeddings": fixed(False),
    # the peer's default is False; texts are cleaned here as the card says
    "normalize_text": fixed(True),
    "d_model": by_card(1024),
    "decoder_attention_heads": by_card(16),
    "decoder_ffn_dim": by_card(4096),
    "decoder_layers": by_card(12),
    "decoder_start_token_id": by_card(16384),
    "encoder_attention_heads": by_card(16),
    "encoder_ffn_dim": by_card(4096),
    "encoder_layers": by_card(12),
    "encoder_vocab_size": by_card(50264),
    "image_length": by_card(256),
    "image_vocab_size": by_card(16384),
    "max_text_length": by_card(64),
    "use_scan": by_shapes(None),
    "force_ln_scale": by_shapes(False),
    "tau_init": ignored(0.05, "only use_cosine_attention reads it"),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), ignored(0.0, TRAINING_ONLY)),
    "gradient_checkpointing": ignored(True, TRAINING_ONLY),
    "init_std": ignored(0.02, INITIAL),
    "use_subln_init": ignored(False, INITIAL),
    "do_sample": ignored(True, CALL),
    **dict.fromkeys(("min_length", "max_length", "forced_eos_token_id"), ignored(None, WHAT_IS_DRAWN)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ignored(None, WHAT_IS_DRAWN)),
}
