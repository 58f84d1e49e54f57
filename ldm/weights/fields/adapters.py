"""The fields of peft's configurations (adapter_config.json), by the kind of the adapter."""

from __future__ import annotations

from collections.abc import Mapping

from ldm.weights.fields.judge import Fields, by_shapes, fixed, followed, ignored
from ldm.weights.fields.networks import TRAINING_ONLY

BOOKKEEPING = "it does not change what is computed"
AT_THE_START = "it sets the values at the start of the training"

COMMON: Fields = {
    "peft_type": followed("LORA", "the kind of the adapter"),
    **dict.fromkeys(
        ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        ignored(None, BOOKKEEPING),
    ),
    "inference_mode": ignored(False, TRAINING_ONLY),
    "target_modules": by_shapes(None),
    "exclude_modules": by_shapes(None),
    "modules_to_save": fixed(None, []),
}
LAYERS: Fields = {"layers_to_transform": by_shapes(None), "layers_pattern": by_shapes(None)}
PATTERNS: Fields = {
    "r": by_shapes(8),
    "rank_pattern": followed({}, "the rank of a module, where the shapes of its tensors do not show it"),
    "alpha_pattern": followed({}, "the alpha of a module"),
}
LYCORIS: Fields = {
    **COMMON,
    **LAYERS,
    **PATTERNS,
    "alpha": followed(8, "divided by the rank, the factor of the change"),
    "rank_dropout": ignored(0.0, TRAINING_ONLY),
    "module_dropout": ignored(0.0, TRAINING_ONLY),
    "use_effective_conv2d": by_shapes(False),
    "init_weights": ignored(True, AT_THE_START),
}
LORA: Fields = {
    **COMMON,
    **LAYERS,
    **PATTERNS,
    "lora_alpha": followed(8, "divided by the rank, the factor of the change"),
    "use_rslora": followed(False, "alpha is divided by the square root of the rank"),
    "lora_dropout": ignored(0.0, TRAINING_ONLY),
    "fan_in_fan_out": fixed(False),
    "bias": fixed("none"),
    "lora_bias": by_shapes(False),
    "use_dora": by_shapes(False),
    # the other ways to begin subtract the first LoRA from the model's weights
    "init_lora_weights": fixed(True, False, "gaussian", "eva", "orthogonal", "mica"),
    "megatron_config": ignored(None, "how layers are divided among processes"),
    "megatron_core": ignored("megatron.core", "how layers are divided among processes"),
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), ignored(None, AT_THE_START)),
    "loftq_config": ignored({}, AT_THE_START),
    "velora_config": ignored(None, TRAINING_ONLY),
    "trainable_token_indices": fixed(None),
    "target_parameters": fixed(None, []),
    "alora_invocation_tokens": fixed(None, []),
    "use_qalora": fixed(False),
    "qalora_group_size": ignored(16, "only use_qalora reads it"),
    "layer_replication": fixed(None, []),
    "runtime_config": ignored(None, BOOKKEEPING),
    **dict.fromkeys(("monteclora_config", "use_bdlora", "arrow_config", "kasa_config"), fixed(None)),
    "ensure_weight_tying": ignored(False, TRAINING_ONLY),
}
OFT: Fields = {
    **COMMON,
    **LAYERS,
    "r": by_shapes(0),
    "oft_block_size": by_shapes(32),
    "module_dropout": ignored(0.0, TRAINING_ONLY),
    "fan_in_fan_out": fixed(False),
    "bias": fixed("none"),
    "init_weights": ignored(True, AT_THE_START),
    "coft": fixed(False),
    "eps": ignored(6e-5, "only coft reads it"),
    "block_share": by_shapes(False),
    "use_cayley_neumann": followed(True, "rotations are a series, or exact"),
    "num_cayley_neumann_terms": followed(5, "the number of terms of the series"),
}
IA3: Fields = {
    **COMMON,
    "feedforward_modules": by_shapes(None),
    "fan_in_fan_out": fixed(False),
    "init_ia3_weights": ignored(True, AT_THE_START),
}
PEFT_KINDS: Mapping[str, Fields] = {
    "LORA": LORA,
    "OFT": OFT,
    "IA3": IA3,
    "LOHA": LYCORIS,
    "LOKR": {
        **LYCORIS,
        "decompose_both": by_shapes(False),
        "decompose_factor": by_shapes(-1),
        "rank_dropout_scale": ignored(False, TRAINING_ONLY),
    },
}
"""The fields of each kind, by `peft_type`."""
