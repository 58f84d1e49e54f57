"""The kinds of networks that can be trained, what they read and what they export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ldm.training.loop import Trainable


@dataclass(frozen=True, kw_only=True)
class PartKind:
    """A kind of network that can be trained.

    Args:
        config: The class of its configuration, which has a field `run`.
        part: Builds the network in training from its configuration and a device.
        exports: The parts in its export; a draft is there only if the text tower has one.
        reads: For each dotted key of the configuration that names a folder, the parts that it may hold.
    """

    config: type
    part: Callable[[Any, torch.device], Trainable]  # Any: each part takes a configuration of its own class
    exports: frozenset[str]
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_VAE, _TEXT, _VISION = {"vae": ("vae",)}, {"text": ("text",)}, {"vision": ("vision",)}
_MODEL = {"unet", "vae", "text", "text2", "draft"}  # a whole one
_UNCLIP = {"text", "vision", "prior", "decoder", "noise", "words", "vae", "upsampler"}
_FROM_PRIOR = {"from_prior.prior": ("prior",)}


def _kind(
    config: type,
    part: Callable[[Any, torch.device], Trainable],
    exports: set[str],
    reads: Mapping[str, tuple[str, ...]] | None = None,
) -> PartKind:
    return PartKind(config=config, part=part, exports=frozenset(exports), reads=reads or {})


def _tunings() -> dict[str, PartKind]:
    """Return the kinds of trainings that begin with a loaded model."""
    from ldm.training.adapters.trained_control import ControlNetPart, ControlNetTraining
    from ldm.training.adapters.trained_ip_adapter import IPAdapterPart, IPAdapterTraining
    from ldm.training.tuning.exemplar_image import ExemplarImagePart, ExemplarImageTraining
    from ldm.training.tuning.fine_tune import FineTunePart, FineTuning
    from ldm.training.tuning.fine_tune_decoder import DecoderFineTuning, FineTuneDecoderPart
    from ldm.training.tuning.fine_tune_unclip import FineTuneUnCLIPPart, UnCLIPFineTuning
    from ldm.training.tuning.inversion import InversionPart, InversionTraining
    from ldm.training.tuning.lora import LoRAPart, LoRATraining

    return {
        "fine-tune": _kind(FineTuning, FineTunePart, _MODEL),
        "fine-tune-decoder": _kind(DecoderFineTuning, FineTuneDecoderPart, _MODEL),
        "fine-tune-unclip": _kind(UnCLIPFineTuning, FineTuneUnCLIPPart, _UNCLIP),
        "lora": _kind(LoRATraining, LoRAPart, {"adapter"}),
        "control-net": _kind(ControlNetTraining, ControlNetPart, {"control"}),
        "ip-adapter": _kind(IPAdapterTraining, IPAdapterPart, {"control"}),
        "textual-inversion": _kind(InversionTraining, InversionPart, {"adapter"}),
        "exemplar-image": _kind(ExemplarImageTraining, ExemplarImagePart, {"exemplar"}),
    }


def part_kinds() -> dict[str, PartKind]:
    """Return the kinds of networks that can be trained, by the name that `part` has in a stage file."""
    from ldm.training.parts.clip import CLIPPart, CLIPTraining
    from ldm.training.parts.clip_text import CLIPTextPart, CLIPTextTraining
    from ldm.training.parts.decoder import DecoderPart, DecoderTraining
    from ldm.training.parts.draft import DraftPart, DraftTraining
    from ldm.training.parts.exemplar import ExemplarPart, ExemplarTraining
    from ldm.training.parts.exemplar_decoder import ExemplarDecoderPart, ExemplarDecoderTraining
    from ldm.training.parts.layout import LayoutPart, LayoutTraining
    from ldm.training.parts.prior import PriorPart, PriorTraining
    from ldm.training.parts.reflow import ReflowPart, ReflowTraining
    from ldm.training.parts.unet import UNetPart, UNetTraining
    from ldm.training.parts.upsampler import UpsamplerPart, UpsamplerTraining
    from ldm.training.parts.vae import VAEPart, VAETraining
    from ldm.training.tokens.dalle import TokenPart, TokenTraining
    from ldm.training.tokens.vq import VQPart, VQTraining

    return {
        "vae": _kind(VAETraining, VAEPart, {"vae"}),
        "vq": _kind(VQTraining, VQPart, {"vae"}),
        "clip": _kind(CLIPTraining, CLIPPart, {"text", "vision"}),
        "clip-text": _kind(CLIPTextTraining, CLIPTextPart, {"text"}, _TEXT | _VISION),
        "draft": _kind(DraftTraining, DraftPart, {"text", "draft"}, _VAE | _TEXT),
        "unet": _kind(
            UNetTraining,
            UNetPart,
            {"unet", "text", "draft"},
            _VAE | {"text.folder": ("text",), "net": ("unet",)},
        ),
        **_tunings(),
        "exemplar": _kind(ExemplarTraining, ExemplarPart, {"unet", "text"}, _VAE | {"net": ("unet",)}),
        "exemplar-decoder": _kind(
            ExemplarDecoderTraining,
            ExemplarDecoderPart,
            {"decoder", "words"},
            _VAE | _VISION | {"net": ("unet",)},
        ),
        "layout": _kind(LayoutTraining, LayoutPart, {"layout"}, _TEXT | {"teacher": ("layout",)}),
        "reflow": _kind(
            ReflowTraining,
            ReflowPart,
            {"unet"},
            {f"teacher.parts.{part}": (part,) for part in ("vae", "unet", "text", "draft", "layout")},
        ),
        "prior": _kind(PriorTraining, PriorPart, {"prior", "text"}, _TEXT | _VISION | {"net": ("prior",)}),
        "decoder": _kind(
            DecoderTraining,
            DecoderPart,
            {"decoder"},
            _VAE | _TEXT | _VISION | _FROM_PRIOR | {"net": ("unet", "decoder")},
        ),
        "tokens": _kind(
            TokenTraining, TokenPart, {"encoder", "decoder"}, _VAE | _TEXT | {"net": ("decoder",)}
        ),
        "upsampler": _kind(UpsamplerTraining, UpsamplerPart, {"upsampler"}),
    }
