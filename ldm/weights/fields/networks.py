"""The fields of the networks of diffusers, by class."""

from __future__ import annotations

from ldm.weights.fields.judge import Fields, by_card, by_shapes, fixed, followed, ignored

OTHER_SIZE = "the size of an image is that of the call, or the card's default"
TRAINING_ONLY = "it acts in training only"
PRECISION = "attention is accumulated in float32 in every dtype"

# The residual blocks, norms and time embedding that both UNets share.
UNET_COMMON: Fields = {
    "sample_size": ignored(None, OTHER_SIZE),
    "in_channels": by_shapes(4),
    "out_channels": by_shapes(4),
    "center_input_sample": fixed(False),
    "flip_sin_to_cos": fixed(True),
    "freq_shift": fixed(0),
    "time_embedding_type": fixed("positional"),
    "time_embedding_dim": by_shapes(None),
    "down_block_types": by_shapes(None),
    "mid_block_type": by_shapes(None),
    "up_block_types": by_shapes(None),
    "block_out_channels": by_shapes(None),
    "layers_per_block": by_shapes(2),
    "mid_block_scale_factor": fixed(1),
    "downsample_padding": fixed(1),
    "dropout": ignored(0.0, TRAINING_ONLY),
    "act_fn": fixed("silu", "swish"),
    "attention_head_dim": by_card(8),
    "norm_num_groups": fixed(32),
    "norm_eps": fixed(1e-5),
    "resnet_time_scale_shift": by_card("default"),
    "class_embed_type": by_card(None),
    "num_class_embeds": by_shapes(None),
    **dict.fromkeys(
        (
            *("decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step"),
            *("use_ema_warmup", "collected_params"),
        ),
        ignored(None, "the averaging of the training that wrote the weights"),
    ),
}
UNCONDITIONAL: Fields = {
    **UNET_COMMON,
    "in_channels": by_shapes(3),
    "out_channels": by_shapes(3),
    "downsample_type": by_shapes("conv"),
    "upsample_type": by_shapes("conv"),
    "attn_norm_num_groups": fixed(None, 32),
    "add_attention": by_shapes(True),
    "num_train_timesteps": fixed(None),
}
CONDITIONAL: Fields = {
    **UNET_COMMON,
    "only_cross_attention": by_card(False),
    "mid_block_only_cross_attention": fixed(None, False),
    "cross_attention_dim": by_shapes(1280),
    "transformer_layers_per_block": by_shapes(1),
    "reverse_transformer_layers_per_block": by_shapes(None),
    "encoder_hid_dim": by_shapes(None),
    "encoder_hid_dim_type": by_card(None),
    "num_attention_heads": fixed(None),
    "dual_cross_attention": fixed(False),
    "use_linear_projection": by_shapes(False),
    "addition_embed_type": by_card(None),
    "addition_time_embed_dim": by_card(None),
    "addition_embed_type_num_heads": ignored(64, "only the additional embedding of type text reads it"),
    "upcast_attention": ignored(False, PRECISION),
    "resnet_skip_time_act": fixed(False),
    "resnet_out_scale_factor": fixed(1.0),
    "time_embedding_act_fn": fixed(None),
    "timestep_post_act": fixed(None),
    "time_cond_proj_dim": by_shapes(None),
    "conv_in_kernel": by_shapes(3),
    "conv_out_kernel": by_shapes(3),
    "projection_class_embeddings_input_dim": by_shapes(None),
    "attention_type": fixed("default"),
    "class_embeddings_concat": fixed(False),
    "cross_attention_norm": fixed(None),
}
AUTOENCODER_COMMON: Fields = {
    "in_channels": by_shapes(3),
    "out_channels": by_shapes(3),
    "down_block_types": by_shapes(None),
    "up_block_types": by_shapes(None),
    "block_out_channels": by_shapes(None),
    "layers_per_block": by_shapes(1),
    "act_fn": fixed("silu", "swish"),
    "latent_channels": by_shapes(4),
    "norm_num_groups": fixed(32),
    "sample_size": ignored(32, OTHER_SIZE),
    "scaling_factor": followed(
        None, "the scale of the latents; the card's if it is absent. Kandinsky does not scale"
    ),
    "force_upcast": ignored(True, "an autoencoder computes in float32 where float16 is asked for"),
    "mid_block_add_attention": by_shapes(True),
}
PRIOR_FIELDS: Fields = {
    "num_attention_heads": by_card(32),
    "attention_head_dim": by_card(64),
    "num_layers": by_shapes(20),
    "embedding_dim": by_shapes(768),
    "num_embeddings": by_shapes(77),
    "additional_embeddings": by_shapes(4),
    "dropout": ignored(0.0, TRAINING_ONLY),
    "time_embed_act_fn": fixed("silu", "swish"),
    "norm_in_type": fixed(None),
    "embedding_proj_norm_type": fixed(None),
    "encoder_hid_proj_type": fixed("linear"),
    "added_emb_type": fixed("prd"),
    "time_embed_dim": by_shapes(None),
    "embedding_proj_dim": by_shapes(None),
    "clip_embed_dim": by_shapes(None),
}
CONTROL_NET: Fields = {
    **CONDITIONAL,
    "conditioning_channels": by_shapes(3),
    "conditioning_embedding_out_channels": by_shapes((16, 32, 96, 256)),
    "controlnet_conditioning_channel_order": followed("rgb", "the order in which hints are read"),
    "global_pool_conditions": followed(False, "residuals are averaged over positions"),
}
CONTROL_NET_UNION: Fields = {
    **CONTROL_NET,
    "num_control_type": by_shapes(6),
    "num_trans_channel": by_shapes(320),
    "num_trans_head": fixed(8),
    "num_trans_layer": by_shapes(1),
    "num_proj_channel": by_shapes(320),
}
T2I_ADAPTER: Fields = {
    "in_channels": by_shapes(3),
    "channels": by_shapes((320, 640, 1280, 1280)),
    "num_res_blocks": by_shapes(2),
    "downscale_factor": by_shapes(8),
    "adapter_type": by_card("full_adapter"),
}
NETWORK_CLASSES: dict[str, Fields] = {
    "UNet2DModel": UNCONDITIONAL,
    "UNet2DConditionModel": CONDITIONAL,
    "ControlNetModel": CONTROL_NET,
    "ControlNetUnionModel": CONTROL_NET_UNION,
    "T2IAdapter": T2I_ADAPTER,
    "AutoencoderKL": {
        **AUTOENCODER_COMMON,
        "shift_factor": followed(None, "subtracted from the latents before they are scaled"),
        "latents_mean": followed(None, "the mean of each channel, which is subtracted"),
        "latents_std": followed(None, "the standard deviation of each channel, which is divided out"),
        "use_quant_conv": fixed(True),
        "use_post_quant_conv": fixed(True),
    },
    "VQModel": {
        **AUTOENCODER_COMMON,
        "latent_channels": by_shapes(3),
        "num_vq_embeddings": by_shapes(256),
        "vq_embed_dim": by_shapes(None),
        "norm_type": by_shapes("group"),
        "lookup_from_codebook": fixed(False),
        "force_upcast": ignored(False, "an autoencoder computes in float32 where float16 is asked for"),
    },
    "AutoencoderTiny": {
        "in_channels": by_shapes(3),
        "out_channels": by_shapes(3),
        "encoder_block_out_channels": by_shapes(None),
        "decoder_block_out_channels": by_shapes(None),
        "act_fn": fixed("relu"),
        "upsample_fn": fixed("nearest"),
        "latent_channels": by_shapes(4),
        "upsampling_scaling_factor": fixed(2),
        "num_encoder_blocks": by_shapes(None),
        "num_decoder_blocks": by_shapes(None),
        "latent_magnitude": ignored(3, "it acts where latents are stored as 8-bit images only"),
        "latent_shift": ignored(0.5, "it acts where latents are stored as 8-bit images only"),
        "force_upcast": ignored(False, "an autoencoder computes in float32 where float16 is asked for"),
        "scaling_factor": followed(1.0, "the scale of the latents"),
        "shift_factor": followed(0.0, "subtracted from the latents before they are scaled"),
    },
    "PriorTransformer": PRIOR_FIELDS,
    "UnCLIPTextProjModel": dict.fromkeys(
        ("clip_extra_context_tokens", "clip_embeddings_dim", "time_embed_dim", "cross_attention_dim"),
        by_shapes(None),
    ),
    "StableUnCLIPImageNormalizer": {"embedding_dim": by_shapes(768)},
}
