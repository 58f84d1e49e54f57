"""The fields of the text and image encoders of transformers, of tokenizers and of image processors."""

from __future__ import annotations

from ldm.models.clip.pixels import MEAN, STD
from ldm.weights.fields.judge import COMPUTED, Field, Fields, by_card, by_shapes, fixed, followed, ignored
from ldm.weights.fields.networks import TRAINING_ONLY

INITIAL = "the weights come from the file"
ABOUT_CLASSES = "it concerns the classes of transformers and no output that is used"
# Fields of every configuration of transformers, among them those of text generation that releases before 5
# write, too.
EVERYWHERE = (
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "return_dict"),
    *("output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "torchscript"),
    *("use_bfloat16", "tf_legacy_loss", "tie_word_embeddings", "tie_encoder_decoder", "tokenizer_class"),
    *("prefix", "use_cache", "bad_words_ids", "begin_suppress_tokens", "suppress_tokens", "do_sample"),
    *("cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size"),
    *("num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values"),
    *("repetition_penalty", "return_dict_in_generate", "sep_token_id", "temperature", "top_k", "top_p"),
    *("typical_p", "output_past", "gradient_checkpointing"),
)
PRETRAINED: Fields = {
    **dict.fromkeys(EVERYWHERE, ignored(None, ABOUT_CLASSES)),
    "is_decoder": fixed(False),
    "add_cross_attention": fixed(False),
    "pruned_heads": fixed(None, {}),
    "initializer_range": ignored(0.02, INITIAL),
    "initializer_factor": ignored(1.0, INITIAL),
}
CLIP_TOWER: Fields = {
    **PRETRAINED,
    "hidden_size": by_shapes(None),
    "intermediate_size": by_shapes(None),
    "num_hidden_layers": by_card(12),
    "hidden_act": by_card("quick_gelu"),
    "layer_norm_eps": fixed(1e-5),
    "attention_dropout": ignored(0.0, TRAINING_ONLY),
    "dropout": ignored(0.0, TRAINING_ONLY),
}
CLIP_TEXT: Fields = {
    **CLIP_TOWER,
    "vocab_size": by_shapes(49408),
    "projection_dim": by_shapes(512),
    "num_attention_heads": by_card(8),
    "max_position_embeddings": by_shapes(77),
    "pad_token_id": ignored(1, "the tokenizer states the padding"),
    "bos_token_id": ignored(49406, "CLIP's tokenizer begins a text with 49406"),
    # 2 stands for the highest id of a text in files of 2022, which is that of the end of text
    "eos_token_id": fixed(49407, 2),
}
CLIP_VISION: Fields = {
    **CLIP_TOWER,
    "projection_dim": by_shapes(512),
    "num_attention_heads": by_card(12),
    "num_channels": by_shapes(3),
    "image_size": by_card(224),
    "patch_size": by_shapes(32),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ignored(None, ABOUT_CLASSES)),
}
ENCODERS: dict[str, Fields] = {
    "CLIPTextModel": CLIP_TEXT,
    "CLIPTextModelWithProjection": CLIP_TEXT,
    "CLIPVisionModel": CLIP_VISION,
    "CLIPVisionModelWithProjection": CLIP_VISION,
    "MultilingualCLIP": {
        **PRETRAINED,
        "transformerDimensions": by_shapes(1024),
        "numDims": by_shapes(768),
        "transformerDimSize": by_shapes(1024),
        "imageDimSize": by_shapes(768),
        "vocab_size": by_shapes(30522),
        "hidden_size": by_shapes(768),
        "num_hidden_layers": by_shapes(12),
        "num_attention_heads": by_card(12),
        "intermediate_size": by_shapes(3072),
        "hidden_act": fixed("gelu"),
        "hidden_dropout_prob": ignored(0.1, TRAINING_ONLY),
        "attention_probs_dropout_prob": ignored(0.1, TRAINING_ONLY),
        "classifier_dropout": ignored(None, TRAINING_ONLY),
        "max_position_embeddings": by_shapes(512),
        "type_vocab_size": by_shapes(2),
        "layer_norm_eps": Field(1e-12, "fixed", COMPUTED, (1e-5,)),
        "position_embedding_type": fixed("absolute"),
        "pad_token_id": fixed(1),
        "bos_token_id": ignored(0, "the tokenizer states it"),
        "eos_token_id": ignored(2, "the tokenizer states it"),
    },
    "LDMBertModel": {
        **PRETRAINED,
        "vocab_size": by_shapes(30522),
        "max_position_embeddings": by_shapes(77),
        "encoder_layers": by_shapes(32),
        "num_hidden_layers": by_shapes(None),
        "encoder_ffn_dim": by_shapes(5120),
        "encoder_attention_heads": by_card(8),
        "head_dim": by_shapes(64),
        "encoder_layerdrop": ignored(0.0, TRAINING_ONLY),
        "activation_function": fixed("gelu"),
        "d_model": by_shapes(1280),
        "dropout": ignored(0.1, TRAINING_ONLY),
        "attention_dropout": ignored(0.0, TRAINING_ONLY),
        "activation_dropout": ignored(0.0, TRAINING_ONLY),
        "classifier_dropout": ignored(0.0, TRAINING_ONLY),
        "init_std": ignored(0.02, INITIAL),
        "scale_embedding": fixed(False),
        "pad_token_id": ignored(0, "the tokenizer states the padding"),
    },
}

# The files of CLIP's tokenizer: tokenizer_config.json and special_tokens_map.json
DECODING = "it acts in decoding, in truncation or in saving only"
CLIP_TOKENIZER: Fields = {
    "pad_token": followed("<|endoftext|>", "texts are padded with it"),
    "bos_token": fixed("<|startoftext|>"),
    "eos_token": fixed("<|endoftext|>"),
    "unk_token": ignored("<|endoftext|>", "every text has tokens, as its bytes do"),
    "model_max_length": by_card(None),
    "do_lower_case": fixed(True),
    "add_prefix_space": fixed(False),
    "padding_side": fixed("right"),
    "tokenizer_class": fixed("CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend"),
    **dict.fromkeys(
        (
            *("errors", "name_or_path", "special_tokens_map_file", "tokenizer_file", "truncation_side"),
            *("clean_up_tokenization_spaces", "added_tokens_decoder", "additional_special_tokens"),
            *("extra_special_tokens", "model_specific_special_tokens", "split_special_tokens", "use_fast"),
            *("backend", "is_local", "local_files_only", "processor_class", "model_input_names", "verbose"),
            *("vocab", "merges", "vocab_file", "merges_file", "trust_remote_code"),
        ),
        ignored(None, DECODING),
    ),
}
# preprocessor_config.json
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
CLIP_PIXELS: Fields = {
    "do_resize": fixed(True),
    "do_center_crop": fixed(True),
    "do_rescale": fixed(True),
    "do_normalize": fixed(True),
    "do_convert_rgb": ignored(True, "images are RGB"),
    "resample": fixed(BICUBIC),
    "rescale_factor": fixed(1 / 255),
    "image_mean": by_card(MEAN),
    "image_std": by_card(STD),
    "size": ignored(224, "the image tower states the size"),
    "crop_size": ignored(224, "the image tower states the size"),
    **dict.fromkeys(
        (
            *("feature_extractor_type", "image_processor_type", "processor_class", "data_format"),
            *("input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square"),
            *("do_pad", "pad_size", "image_seq_length", "size_divisor"),
        ),
        ignored(None, ABOUT_CLASSES),
    ),
}
