"""Compare the configurations in a folder in diffusers layout with the networks that they are loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.models.clip.towers import TextConfig, VisionConfig
from ldm.models.control.control_net import ControlNetConfig
from ldm.models.control.t2i_adapter import T2IAdapterConfig
from ldm.models.text.bert import BertConfig
from ldm.models.text.xlmr import XLMRConfig
from ldm.models.unclip.decoder import DecoderConfig
from ldm.models.unclip.prior import PriorConfig
from ldm.models.unet import UNetConfig
from ldm.support.config import nearest
from ldm.weights.fields.judge import ANY, Fields, Finding, conflicts, judge_fields, named, warnings_of
from ldm.weights.fields.networks import NETWORK_CLASSES
from ldm.weights.fields.texts import CLIP_PIXELS, ENCODERS
from ldm.weights.formats.diffusers_config import bert_config, text_config, unet_config
from ldm.weights.formats.diffusers_folder import Component

CLASSES: Mapping[str, Fields] = {**NETWORK_CLASSES, **ENCODERS}
EMBEDDED = {  # of a decoder: what the condition is made of -> the names of diffusers
    "karlo": {"class_embed_type": "identity"},
    "kandinsky21": {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"},
    "kandinsky22": {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"},
}


def check_component(part: str, config: object, component: Component) -> tuple[str, ...]:
    """Compare a component's config.json with the network that its weights are loaded into.

    Args:
        part: Name of the part, for messages.
        config: Configuration of the network.
        component: The component, read. Without a config.json nothing is compared.

    Returns:
        Warnings about fields that are not known.

    Raises:
        ValueError: If the class is not known, or a field states another network.
    """
    if not component.config:
        return ()
    where = f"{str(component.path / 'config.json')!r}"
    if component.class_name not in CLASSES:
        raise ValueError(
            f"{where}: the class {named(component.class_name)} of the {part} is none whose configuration is"
            f" known; {nearest(component.class_name, CLASSES)}"
        )
    findings = component_findings(component, expected_fields(config))
    if wrong := conflicts(findings):
        raise ValueError(f"{where} does not fit the {part}: {'; '.join(wrong)}")
    return warnings_of(findings, where)


def component_findings(component: Component, expected: Mapping[str, object] | None = None) -> list[Finding]:
    """Return what is done with each field of a component's config.json.

    Args:
        component: The component, of a class that is known.
        expected: The fields of the network; see `judge_fields`.
    """
    return judge_fields(component.config, CLASSES[component.class_name], expected)


def expected_fields(config: object) -> dict[str, Any]:
    """Return the fields of config.json that the shapes of a network's tensors do not determine."""
    if isinstance(config, UNetConfig):
        return expected_unet(config)
    if isinstance(config, T2IAdapterConfig):
        xl = "_xl" if config.halved[:2] == (False, False) else ""
        return {"adapter_type": "light_adapter" if config.light else f"full_adapter{xl}"}
    if isinstance(config, ControlNetConfig):
        return expected_unet(config.unet)
    if isinstance(config, DecoderConfig) and config.unet is not None:
        condition = config.condition
        kind = "karlo" if condition.interleaved else "kandinsky21" if condition.text_dim else "kandinsky22"
        return {**expected_unet(config.unet), **EMBEDDED[kind]}
    if isinstance(config, PriorConfig):
        return {"num_attention_heads": config.heads, "attention_head_dim": config.head_dim}
    if isinstance(config, TextConfig):
        return text_config(config)[1]
    if isinstance(config, VisionConfig):
        return {
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "hidden_act": config.activation,
            "image_size": config.image_size,
        }
    if isinstance(config, XLMRConfig):
        return {"num_attention_heads": config.heads}
    return bert_config(config)[1] if isinstance(config, BertConfig) else {}


def expected_unet(config: UNetConfig) -> dict[str, Any]:
    """Return the fields of a UNet's config.json that the shapes of its tensors do not determine."""
    if config.attention is None:
        return unet_config(config)[1]
    attends = any(config.depth) or config.mid_depth
    return {
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "attention_head_dim": config.head_dim if attends and config.head_dim else ANY,
    }


def check_processor(stated: Mapping[str, Any], config: VisionConfig, where: str) -> tuple[str, ...]:
    """Compare a preprocessor_config.json with how an image tower's pixels are prepared.

    Args:
        stated: The content of the file.
        config: Configuration of the tower.
        where: The file, for messages.

    Returns:
        Warnings about fields that are not known.

    Raises:
        ValueError: If it states other pixels.
    """
    findings = judge_fields(stated, CLIP_PIXELS, {"image_mean": config.mean, "image_std": config.std})
    wrong = conflicts(findings)
    sizes = [side_of(stated.get(name)) for name in ("size", "crop_size")]
    if None not in sizes and sizes[0] != sizes[1]:
        wrong.append(
            f"size {named(stated['size'])}, expected that of crop_size, {named(stated['crop_size'])}"
        )
    if wrong:
        raise ValueError(f"{where} states other pixels than the image tower reads: {'; '.join(wrong)}")
    return warnings_of(findings, where)


def side_of(size: object) -> object:
    """Return the side of a square in a preprocessor_config.json, or the value itself if it is none."""
    if isinstance(size, Mapping):
        sides = set(map(str, size.values()))
        return next(iter(size.values())) if len(sides) == 1 else tuple(sorted(sides))
    return size
