"""Build the network of a control's file, whatever its kind, for a model's UNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.catalog.control_cards import CONTROL_CARDS, ControlCard
from ldm.models.clip.towers import VisionTower
from ldm.models.control.control_net import ControlNetConfig
from ldm.models.control.controlled import ControlKind, ControlNetKind
from ldm.models.control.dit_control import DiTControlConfig, DiTControlKind
from ldm.models.control.ip_adapter import IPAdapterConfig, IPAdapterKind
from ldm.models.control.lllite import LLLiteConfig, LLLiteKind
from ldm.models.control.t2i_adapter import T2IAdapterConfig, T2IAdapterKind
from ldm.models.control.union import UnionControlNet, UnionKind
from ldm.models.dit import DiTConfig
from ldm.models.unet_config import UNetConfig
from ldm.support.text import errors_of, shown
from ldm.weights.adapters.families import WIDTHS
from ldm.weights.controls.control_lora import LORA_MARK, is_change
from ldm.weights.controls.control_net import (
    build_control_net,
    control_net_config,
    control_net_layout,
    is_union,
    made_for,
)
from ldm.weights.controls.dit_control import build_dit_control, dit_control_config, is_dit_control
from ldm.weights.controls.files import ControlFile, read_control
from ldm.weights.controls.ip_adapter import (
    advice,
    attention_widths,
    build_ip_adapter,
    ip_adapter_config,
    is_ip_adapter,
)
from ldm.weights.controls.lllite import build_lllite, is_lllite, lllite_config, lllite_family, lllite_places
from ldm.weights.controls.shapes import shapes_in, size_of
from ldm.weights.controls.t2i_adapter import (
    build_t2i_adapter,
    t2i_adapter_config,
    t2i_adapter_layout,
    t2i_family,
)
from ldm.weights.keymap import Shape
from ldm.weights.parts import Layout, build_network


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model that a control is for.

    Args:
        model: Its name.
        network: The configuration of its denoising network.
        factor: Size of an image divided by that of the latent.
        dtype: Floating-point type of the UNet.
        attentions: Width of each of its attentions, by name.
        vision: CLIP's image tower, for IP-Adapters; None if none was given.
        base: Its tensors, to which Control-LoRAs and differences are added.
    """

    model: str
    network: UNetConfig | DiTConfig
    factor: int
    dtype: torch.dtype
    attentions: Mapping[str, int] = field(default_factory=dict)
    vision: VisionTower | None = None
    base: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def unet(self) -> UNetConfig:
        """The configuration of its UNet; ValueError if its network is another."""
        if not isinstance(self.network, UNetConfig):
            raise ValueError(f"the file controls a UNet, but {self.model!r} has a diffusion transformer")
        return self.network

    @property
    def dit(self) -> DiTConfig:
        """The configuration of its diffusion transformer; ValueError if its network is another."""
        if not isinstance(self.network, DiTConfig):
            raise ValueError(f"the file controls a diffusion transformer, but {self.model!r} has a UNet")
        return self.network


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltControl:
    """A control, built.

    Args:
        what: Its kind, in words.
        network: The network.
        kind: What it computes in a call.
        card: The convention of its hints.
    """

    what: str
    network: nn.Module
    kind: ControlKind
    card: ControlCard


def _control_net(file: ControlFile, target: Target, card: ControlCard) -> BuiltControl:
    network = build_control_net(
        file,
        target.unet,
        model=target.model,
        dtype=target.dtype,
        base=target.base,
        global_pool=card.global_pool,
    )
    if network.control.global_pool:
        card = replace(card, global_pool=True)
    if file.config.get("controlnet_conditioning_channel_order") == "bgr":
        card = replace(card, order="bgr")
    kind = ControlNetKind(network=network)
    if isinstance(network, UnionControlNet):
        kind = UnionKind(network=network, type=union_type(file, card, network.union.types))
    return BuiltControl(what=control_words(file), network=network, kind=kind, card=card)


def union_type(file: ControlFile, card: ControlCard, types: int) -> int:
    """Return the type of a card's hints in a ControlNet Union.

    Raises:
        ValueError: If it has no such type; the message names the cards of those that it has.
    """
    if card.union is None or card.union >= types:
        known = ", ".join(
            name for name, each in CONTROL_CARDS.items() if each.union is not None and each.union < types
        )
        raise ValueError(
            f"{str(file.path)!r} is a ControlNet Union of {types} types of hints, card {card.name!r}: state"
            f" the type by card=, one of {known}"
        )
    return card.union


def _t2i_adapter(file: ControlFile, target: Target, card: ControlCard) -> BuiltControl:
    network = build_t2i_adapter(
        file, target.unet, factor=target.factor, model=target.model, dtype=target.dtype
    )
    what = f"{'light ' if network.config.light else ''}{T2I_ADAPTER_KIND}"
    return BuiltControl(what=what, network=network, kind=T2IAdapterKind(network=network), card=card)


def _ip_adapter(file: ControlFile, target: Target, card: ControlCard) -> BuiltControl:
    if target.vision is None:
        config = ip_adapter_config(shapes_in(file.tensors), source=file.path)
        raise ValueError(f"{str(file.path)!r} is an IP-Adapter, which reads CLIP's states: {advice(config)}")
    names, widths = attention_widths(target.attentions)
    network = build_ip_adapter(
        file, widths, target.unet.context_dim, target.vision, model=target.model, dtype=target.dtype
    )
    kind = IPAdapterKind(network=network, vision=target.vision, attentions=names)
    words = {"base": "", "plus": " Plus", "full": " full face"}
    what = f"{IP_ADAPTER_KIND}{words[network.config.kind]}"
    return BuiltControl(what=what, network=network, kind=kind, card=CONTROL_CARDS["reference"])


def _dit_control(file: ControlFile, target: Target, card: ControlCard) -> BuiltControl:
    network = build_dit_control(file, target.dit, dtype=target.dtype)
    kind = DiTControlKind(network=network)
    return BuiltControl(what=DIT_CONTROL_KIND, network=network, kind=kind, card=card)


def _lllite(file: ControlFile, target: Target, card: ControlCard) -> BuiltControl:
    network, places = build_lllite(file, target.unet, dtype=target.dtype)
    return BuiltControl(
        what=LLLITE_KIND, network=network, kind=LLLiteKind(network=network, places=places), card=card
    )


LLLITE_KIND = "ControlNet-LLLite"
DIT_CONTROL_KIND = "ControlNet of a diffusion transformer"
CONTROL_NET_KIND, T2I_ADAPTER_KIND, IP_ADAPTER_KIND = "ControlNet", "T2I-Adapter", "IP-Adapter"
# for each kind: its name, whether keys and shapes are those of it, and what builds it
CONTROL_KINDS: Mapping[
    str,
    tuple[
        Callable[[Mapping[str, Shape]], object], Callable[[ControlFile, Target, ControlCard], BuiltControl]
    ],
] = {
    CONTROL_NET_KIND: (control_net_layout, _control_net),
    T2I_ADAPTER_KIND: (t2i_adapter_layout, _t2i_adapter),
    IP_ADAPTER_KIND: (is_ip_adapter, _ip_adapter),
    DIT_CONTROL_KIND: (is_dit_control, _dit_control),
    LLLITE_KIND: (is_lllite, _lllite),
}


def control_kind(file: ControlFile) -> str | None:
    """Return the name of a file's kind; None if it is no control."""
    shapes = shapes_in(file.tensors)
    return next((name for name, (found, _) in CONTROL_KINDS.items() if found(shapes)), None)


def build_control(file: ControlFile, target: Target, card: ControlCard) -> BuiltControl:
    """Return the control of a file.

    Args:
        file: The file.
        target: The model that it is for.
        card: The convention of its hints.

    Raises:
        ValueError: If it is no control, or does not fit; see the function of its kind.
    """
    name = control_kind(file)
    if name is None:
        raise ValueError(
            f"{str(file.path)!r} is no {' or '.join(CONTROL_KINDS)}: its keys are such as"
            f" {shown(next(iter(file.tensors), None))}"
        )
    if target.vision is not None and name != IP_ADAPTER_KIND:
        raise ValueError(f"vision: {str(file.path)!r} is a {name}, which reads no image tower")
    with errors_of(file.path):
        return CONTROL_KINDS[name][1](file, target, card)


def control_words(file: ControlFile) -> str:
    """Return the kind of a file in words, which tell Control-LoRAs and differences from ControlNets."""
    if LORA_MARK in file.tensors:
        return "Control-LoRA"
    name = control_kind(file) or "control of an unknown kind"
    if is_union(shapes_in(file.tensors)):
        return "ControlNet Union"
    return f"{name}, as a difference to the UNet" if is_change(file.tensors) else name


def layout_of(file: ControlFile) -> Layout:
    """Return the layout of a control's file."""
    shapes = shapes_in(file.tensors)
    return control_net_layout(shapes) or t2i_adapter_layout(shapes) or "original"


def config_of(
    file: ControlFile, target: Target
) -> ControlNetConfig | T2IAdapterConfig | IPAdapterConfig | DiTControlConfig | LLLiteConfig:
    """Return the configuration of a control's network, for a model.

    Raises:
        ValueError: If the shapes in the file are those of no network, or of one for another kind of model.
    """
    shapes = shapes_in(file.tensors)
    if (layout := control_net_layout(shapes)) is not None:
        return control_net_config(shapes, layout, target.unet)
    if is_ip_adapter(shapes):
        return ip_adapter_config(shapes, source=file.path)
    if is_dit_control(shapes):
        return dit_control_config(shapes, target.dit, source=file.path)
    if is_lllite(shapes):
        found = lllite_config(shapes, source=file.path)
        lllite_places(found, build_network(target.unet), source=file.path)
        return found
    return t2i_adapter_config(shapes, layout_of(file), target.unet)


def family_of(file: ControlFile) -> str:
    """Return the family that a control was made for, in words; "" if no key shows it."""
    shapes = shapes_in(file.tensors)
    if is_ip_adapter(shapes):
        with errors_of(file.path):
            width = size_of(shapes, next(key for key in shapes if key.endswith(".to_k_ip.weight")), 1)
        return WIDTHS.get(width, f"a model with a context of {width}")
    if is_lllite(shapes):
        return lllite_family(shapes)
    return made_for(shapes) or (t2i_family(shapes) if t2i_adapter_layout(shapes) else "")


def reads_vision(path: str | Path) -> bool:
    """Return whether the control in a file reads CLIP's image tower."""
    return control_kind(read_control(path, digest=False)) == IP_ADAPTER_KIND
