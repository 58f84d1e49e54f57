"""Rules for unCLIP decoders: the layouts of Karlo and Kandinsky 2.1, that of diffusers, and our names."""

from __future__ import annotations

from collections.abc import Iterable

from ldm.models.unclip.decoder import DecoderConfig
from ldm.models.unet_config import UNetConfig
from ldm.weights.keymap import IDENTITY, Rule, Section, Table, rename
from ldm.weights.rules.unet import unet_table

KARLO_RULES = (
    Rule(("null_image",), ("cf_param",)),
    *rename(
        ("image", "clip_emb"),
        ("pooled", "text_feat_proj"),
        ("tokens", "clip_tok_proj"),
        ("text", "text_seq_proj.0"),
        ("norms.text_norm", "text_seq_proj.1"),
    ),
)
KANDINSKY21_RULES = rename(
    ("text", "to_model_dim_n"),
    ("tokens", "clip_to_seq"),
    ("pooled", "proj_n"),
    ("norms.pooled_norm", "ln_model_n"),
    ("image", "img_layer"),
)
# In diffusers layout Karlo's projections and UNet are two parts, read below text_proj and decoder.
KARLO_DIFFUSERS = (
    Rule(("null_image",), ("learned_classifier_free_guidance_embeddings",)),
    *rename(
        ("image", "clip_image_embeddings_project_to_time_embeddings"),
        ("pooled", "embedding_proj"),
        ("tokens", "clip_extra_context_tokens_proj"),
        ("text", "encoder_hidden_states_proj"),
        ("norms.text_norm", "text_encoder_hidden_states_norm"),
    ),
)
KANDINSKY_DIFFUSERS = rename(
    ("text", "encoder_hid_proj.text_proj"),
    ("tokens", "encoder_hid_proj.image_embeds"),
    ("norms.tokens_norm", "encoder_hid_proj.norm"),
    ("pooled", "add_embedding.text_proj"),
    ("norms.pooled_norm", "add_embedding.text_norm"),
    ("image", "add_embedding.image_proj"),
    ("norms.image_norm", "add_embedding.image_norm"),
)


def decoder_table(config: DecoderConfig, names: Iterable[str], layout: str = "original") -> Table:
    """Return the table of a decoder's file.

    Args:
        config: Configuration of the decoder.
        names: Names of its tensors.
        layout: "original" (in Karlo's file below ``model.``) or "diffusers".

    Raises:
        ValueError: If the decoder is not published in this layout.
    """
    if config.unet is None:
        raise ValueError(f"layout {layout!r}: no published layout holds a decoder that is a transformer")
    karlo = config.condition.interleaved
    if layout == "diffusers":
        projections = (
            Section("condition", "text_proj", KARLO_DIFFUSERS)
            if karlo
            else Section("condition", "", KANDINSKY_DIFFUSERS)
        )
        return Table((Section("unet", "decoder" if karlo else "", IDENTITY), projections))
    if not karlo and config.condition.text_dim is None:
        raise ValueError('layout: expected "diffusers", the only layout of Kandinsky 2.2, got "original"')
    below = [name.removeprefix("unet.") for name in names if name.startswith("unet.")]
    inner = unet_table(below, heads=_head_count(config.unet), head_dim=config.unet.head_dim)
    unet = tuple(Section(f"unet.{s.ours}".rstrip("."), s.file, s.rules) for s in inner.sections)
    return Table((*unet, Section("condition", "", KARLO_RULES if karlo else KANDINSKY21_RULES)), inner.ignore)


def _head_count(config: UNetConfig) -> int | None:
    if isinstance(config.heads, tuple):
        raise ValueError(
            f"heads: expected one number for all levels in the original layout, got {config.heads}"
        )
    return config.heads
