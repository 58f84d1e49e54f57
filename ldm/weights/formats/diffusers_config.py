"""Express our configurations as the config.json files of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm.catalog.cards import DiffusionCard
from ldm.diffusion.interfaces import Prediction
from ldm.models.clip.towers import TextConfig
from ldm.models.control.control_net import ControlNetConfig
from ldm.models.text.bert import BertConfig
from ldm.models.tiny import TinyConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.models.vq import VQConfig

JSON = dict[str, Any]
SCHEDULERS = {
    "plms": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
# entries of a UNet's configuration that a ControlNet's has not
OF_UNET_ALONE = ("out_channels", "sample_size", "up_block_types", "time_cond_proj_dim", "dropout")
PREDICTION_TYPES: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def unet_config(config: UNetConfig, sample_size: int = 64) -> tuple[str, JSON]:
    """Return the class of a UNet in diffusers, and its configuration.

    Args:
        config: Our configuration.
        sample_size: Side of the usual latent. Default: 64.

    Raises:
        ValueError: If no class of diffusers computes this UNet.
    """
    common: JSON = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "sample_size": sample_size,
    }
    name, own = unconditional_unet(config) if config.attention == "block" else conditional_unet(config)
    return name, {"_class_name": name, **common, **own}


def control_net_entries(config: ControlNetConfig) -> JSON:
    """Return the configuration of a ControlNet in diffusers.

    Raises:
        ValueError: If no class of diffusers computes the UNet that it is for.
    """
    _, unet = unet_config(config.unet)
    kept = {name: value for name, value in unet.items() if name not in OF_UNET_ALONE}
    return {
        **kept,
        "_class_name": "ControlNetModel",
        "conditioning_channels": config.hint_channels,
        "conditioning_embedding_out_channels": list(config.hint_widths),
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": config.global_pool,
    }


def unconditional_unet(config: UNetConfig) -> tuple[str, JSON]:
    """Return the class of a UNet with AttentionBlocks, and the entries that are specific to it."""
    if (
        config.scale_shift
        or config.resample is not None
        or config.head_dim is None
        or config.context_dim is not None
        or not config.mid_depth
    ):
        raise ValueError(
            "no class of diffusers computes this UNet: AttentionBlocks with scale-shift, resampling blocks, a"
            " context, a given number of heads, or none in the middle"
        )
    down = ["AttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depth]
    return "UNet2DModel", {
        "down_block_types": down,
        "up_block_types": mirrored(down),
        "attention_head_dim": config.head_dim,
        "norm_eps": 1e-5,
    }


def conditional_unet(config: UNetConfig) -> tuple[str, JSON]:
    """Return the class of a UNet with transformers, and the entries that are specific to it."""
    if config.scale_shift or config.resample is not None or not config.mid_depth:
        raise ValueError(
            "no class of diffusers computes this UNet: transformers with scale-shift, resampling blocks, or"
            " none in the middle"
        )
    levels = range(len(config.channels))
    down = ["CrossAttnDownBlock2D" if config.depth[level] else "DownBlock2D" for level in levels]
    depth = [*(depth or 1 for depth in config.depth[:-1]), config.depth[-1] or config.mid_depth]
    if depth[-1] != config.mid_depth:
        raise ValueError(
            "no class of diffusers computes this UNet: the middle must have as many transformer blocks as the"
            f" last level, got {config.mid_depth} and {depth[-1]}"
        )
    return "UNet2DConditionModel", {
        **vector_entries(config),
        "down_block_types": down,
        "up_block_types": mirrored(down),
        "norm_eps": 1e-5,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": [config.split(level)[0] for level in levels],  # the number of heads
        "use_linear_projection": config.linear_projection,
        "transformer_layers_per_block": depth,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "only_cross_attention": list(config.only_cross) if config.only_cross else False,
        "time_cond_proj_dim": config.guidance_dim,
    }


def vector_entries(config: UNetConfig) -> JSON:
    """Return the entries of a UNet's pooled, class-embedding or class condition; empty without one."""
    if config.pooled_dim:
        return {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": config.pooled_dim,
        }
    if config.class_dim:
        return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": config.class_dim}
    return {"num_class_embeds": config.classes} if config.classes else {}


def mirrored(down: list[str]) -> list[str]:
    """Return the types of the up blocks that mirror the down blocks."""
    return [name.replace("Down", "Up") for name in reversed(down)]


def vae_config(
    config: VAEConfig | VQConfig | TinyConfig,
    latent_scale: float,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> tuple[str, JSON]:
    """Return the class of an autoencoder in diffusers, and its configuration.

    Args:
        config: Our configuration.
        latent_scale: Factor of the latents.
        mean: Mean of each channel of the latents. Default: none.
        std: Standard deviation of each channel of the latents. Default: none.

    Raises:
        ValueError: If no class of diffusers computes it.
    """
    if isinstance(config, TinyConfig):
        counts = {"num_encoder_blocks": list(config.encoder), "num_decoder_blocks": list(config.decoder)}
        widths = {
            f"{half}_block_out_channels": [config.width] * len(config.encoder)
            for half in ("encoder", "decoder")
        }
        name = "AutoencoderTiny"
        return name, {
            "_class_name": name,
            "latent_channels": config.latent_channels,
            **counts,
            **widths,
            "scaling_factor": 1.0,
        }
    if config.patch != 1:
        raise ValueError(
            f"no class of diffusers computes an autoencoder with patches of {config.patch}×{config.patch}"
        )
    down = [
        "AttnDownEncoderBlock2D" if level in config.attention_levels else "DownEncoderBlock2D"
        for level in range(len(config.channels))
    ]
    up = [name.replace("Down", "Up").replace("Encoder", "Decoder") for name in reversed(down)]
    common = {
        "in_channels": config.picture_channels,
        "out_channels": config.picture_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "down_block_types": down,
        "up_block_types": up,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "scaling_factor": latent_scale,
        "mid_block_add_attention": config.mid_attention,
    }
    if isinstance(config, VQConfig):
        return "VQModel", {"_class_name": "VQModel", **common, "num_vq_embeddings": config.codes}
    if mean or std:
        channels = config.latent_channels
        common["latents_mean"] = list(mean or [0.0] * channels)
        common["latents_std"] = list(std or [1.0] * channels)
    return "AutoencoderKL", {"_class_name": "AutoencoderKL", **common}


def text_config(config: TextConfig) -> tuple[str, JSON]:
    """Return the class of a CLIP text tower in transformers, and its configuration."""
    name = "CLIPTextModel" if config.embed_dim is None else "CLIPTextModelWithProjection"
    return name, {
        "architectures": [name],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width or 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context_length,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": config.embed_dim or config.width,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eot_id,
        "pad_token_id": 1,
    }


def bert_config(config: BertConfig) -> tuple[str, JSON]:
    """Return the class of LDM's text encoder in diffusers, and its configuration."""
    return "LDMBertModel", {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "encoder_layers": config.layers,
        "encoder_attention_heads": config.heads,
        "head_dim": config.head_dim,
        "encoder_ffn_dim": 4 * config.width,
        "max_position_embeddings": config.length,
    }


def training_facts(card: DiffusionCard) -> JSON:
    """Return the fields of a scheduler's configuration that state how the network was trained."""
    schedule = card.schedule
    if schedule.sigmas is not None:
        low, high, data = schedule.sigmas
        grid = card.grids().grids["*"]
        return {
            "num_train_timesteps": schedule.timesteps,
            "sigma_min": low,
            "sigma_max": high,
            "sigma_data": data,
            "sigma_schedule": grid.get("spacing", "karras"),
            "rho": grid.get("rho", 7.0),
            "prediction_type": PREDICTION_TYPES[card.prediction],
        }
    betas = (
        {}
        if schedule.beta_start is None
        else {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    )
    return {
        "num_train_timesteps": schedule.timesteps,
        "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(schedule.kind, schedule.kind),
        **betas,
        "prediction_type": PREDICTION_TYPES[card.prediction],
        **({"rescale_betas_zero_snr": True} if schedule.zero_terminal_snr else {}),
    }


def scheduler_config(facts: JSON, sampler: str, *, trailing: bool) -> tuple[str, JSON]:
    """Return the class of a sampler's scheduler in diffusers, and its configuration.

    Args:
        facts: The fields that state the training; see `training_facts`.
        sampler: Name of the sampler. Samplers without a scheduler get that of DDIM.
        trailing: Whether the timesteps are spaced "trailing"; otherwise "leading".
    """
    if "sigma_data" in facts:
        return "EDMEulerScheduler", {"_class_name": "EDMEulerScheduler", **facts}
    name = SCHEDULERS.get(sampler, "DDIMScheduler")
    found: JSON = {
        "_class_name": name,
        **facts,
        "timestep_spacing": "trailing" if trailing else "leading",
        "steps_offset": 1,
    }
    if name in ("PNDMScheduler", "DDIMScheduler"):
        found["set_alpha_to_one"] = False
    found["clip_sample"] = False
    if name == "PNDMScheduler":
        found["skip_prk_steps"] = True
    return name, found
