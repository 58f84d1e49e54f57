"""Detect the family of a file of weights from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm.catalog.families import FAMILIES, UNET_PREFIX, Family
from ldm.weights.keymap import Shape

Shapes = Mapping[str, Shape]


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A detected family.

    Args:
        name: Name of the family.
        layout: Layout of the file.
        evidence: What determined the family.
    """

    name: str
    layout: Literal["original", "diffusers"]
    evidence: str

    @property
    def family(self) -> Family:
        """The family of this name."""
        return FAMILIES[self.name]


class WrongFamily(ValueError):
    """Raised for weights of another family than expected; ``found`` is theirs."""

    def __init__(self, message: str, found: Detection) -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True, kw_only=True)
class UNetFacts:
    """What tells the UNets of different families apart.

    Args:
        inputs: Number of input channels.
        width: Number of channels at the full resolution.
        context: Width of the context; None without one.
        vector: Width of the vector condition; None without one.
        classes: Number of classes; None without classes.
        guidance: Whether the guidance scale is an input.
    """

    inputs: int
    width: int
    context: int | None
    vector: int | None
    classes: int | None
    guidance: bool

    def __str__(self) -> str:
        known = {
            "channels in": self.inputs,
            "width": self.width,
            "context": self.context,
            "vector": self.vector,
            "classes": self.classes,
        }
        return "UNet: " + ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


def unet_facts(shapes: Shapes, prefix: str) -> UNetFacts | None:
    """Return the facts of the UNet below a prefix, in either layout; None if there is none."""
    stem = shapes.get(f"{prefix}input_blocks.0.0.weight", shapes.get(f"{prefix}conv_in.weight"))
    if stem is None or len(stem) != 4:
        return None

    def length(names: Iterable[str], axis: int) -> int | None:
        return next((shapes[name][axis] for name in names if shapes.get(name)), None)

    def below(*names: str) -> list[str]:
        return [prefix + name for name in names]

    attends = (key for key in shapes if key.startswith(prefix) and key.endswith(".attn2.to_k.weight"))
    return UNetFacts(
        inputs=stem[1],
        width=stem[0],
        context=length(attends, -1),
        classes=length(below("label_emb.weight", "class_embedding.weight"), 0),
        vector=length(
            below("label_emb.0.0.weight", "add_embedding.linear_1.weight", "class_embedding.linear_1.weight"),
            -1,
        ),
        guidance=f"{prefix}time_embedding.cond_proj.weight" in shapes,
    )


def classify(facts: UNetFacts) -> str | None:
    """Return the family of a UNet with these facts; None if there is none."""
    lcm = facts.guidance
    if facts.vector is not None:
        by_vector = {  # (width of the vector, channels in)
            (2816, 4): "sdxl-lcm" if lcm else "sdxl",
            (2816, 9): "sdxl-inpainting",
            (2560, 4): "sdxl-refiner",
            (2048, 4): "sd21-unclip-h",
            (1536, 4): "sd21-unclip-l",
        }
        return by_vector.get((facts.vector, facts.inputs))
    if facts.classes is not None:
        return "sd-x4-upscaler" if facts.context == 1024 and facts.inputs == 7 else None
    table: dict[tuple[int | None, int, int], str] = {  # (context, channels in, width)
        (768, 4, 320): "sd1-lcm" if lcm else "sd1",
        (768, 9, 320): "sd1-inpainting",
        (768, 8, 320): "instruct-pix2pix",
        (1024, 4, 320): "sd2",
        (1024, 9, 320): "sd2-inpainting",
        (1024, 5, 320): "sd2-depth",
        (1280, 4, 320): "ldm-text2img-large",
        (640, 3, 192): "ldm-text2img256",
        (512, 4, 256): "ldm-cin256",
        (512, 3, 192): "ldm-cin256-v2",
        (512, 3, 128): "ldm-layout2img",
        (768, 16, 448): "rdm768",
        (None, 3, 224): "ldm-uncond256",
        (None, 4, 192): "ldm-churches256",
        (None, 7, 256): "ldm-inpainting-big",
        (None, 6, 160): "ldm-bsr-sr",
        (None, 6, 128): "ldm-semantic",
    }
    return table.get((facts.context, facts.inputs, facts.width))


def _has_key(pattern: str) -> Callable[[Shapes], bool]:
    """Return a test for a key that matches a pattern."""
    found = re.compile(pattern)
    return lambda shapes: any(found.search(key) for key in shapes)


def _is_textual_inversion(shapes: Shapes) -> bool:
    if {"string_to_param", "emb_params"} & set(shapes) or {"clip_l", "clip_g"} <= set(shapes):
        return True
    return any(key.startswith("string_to_param.") for key in shapes) or (
        len(shapes) == 1 and len(next(iter(shapes.values()))) in (1, 2)
    )


# Tests before and after that of UNets, in this order. Additions to a model come first, because they may be in
# one file with the model.
BEFORE: tuple[tuple[Callable[[Shapes], bool], str, Literal["original", "diffusers"]], ...] = (
    (_has_key(r"^control_model\.time_embed\.0\.weight$"), "controlnet", "original"),
    (_has_key(r"^controlnet_cond_embedding\.conv_in\.weight$"), "controlnet", "diffusers"),
    (
        _has_key(r"lora_down\.weight$|lora_A\.weight$|_lora\.down\.weight$|lora_linear_layer\.down\.weight$"),
        "lora",
        "original",
    ),
    (_is_textual_inversion, "textual-inversion", "original"),
    (_has_key(r"^(model\.)?prd_emb$"), "karlo-prior", "original"),
    (_has_key(r"^model\.cf_param$"), "karlo-decoder", "original"),
    (_has_key(r"^model_first_steps\."), "karlo-sr", "original"),
    (_has_key(r"^clip_to_seq\.weight$"), "kandinsky21", "original"),
    (_has_key(r"^prd_embedding$"), "karlo-prior", "diffusers"),
    (_has_key(r"^encoder_hid_proj\.text_proj\.weight$"), "kandinsky21", "diffusers"),
    (_has_key(r"^encoder_hid_proj\.image_embeds\.weight$"), "kandinsky22", "diffusers"),
)
AFTER: tuple[tuple[Callable[[Shapes], bool], str, Literal["original", "diffusers"]], ...] = (
    (_has_key(r"^concept_embeds$"), "safety-checker", "diffusers"),
    (_has_key(r"(^|\.)net\.learned_query$"), "dalle2-prior", "original"),
    (_has_key(r"^unets\.0\."), "dalle2-decoder", "original"),
    (_has_key(r"^(model\.)?decoder\.layers\.0\.glu\.fc0\.weight$"), "dalle-mini", "original"),
    (lambda s: "layers.0.glu.fc0.weight" in s and "lm_head.weight" in s, "dalle-mini-decoder", "original"),
    (_has_key(r"^layers\.0\.glu\.fc0\.weight$"), "dalle-mini-encoder", "original"),
    (_has_key(r"^encoder\.blocks\.group_1\.block_1\.res_path\.conv_1\.w$"), "dalle-dvae", "original"),
    (lambda s: s.get("blocks.input.w", ())[2:] == (1, 1), "dalle-dvae-decoder", "original"),
    (_has_key(r"^blocks\.group_1\.block_1\.res_path\.conv_1\.w$"), "dalle-dvae-encoder", "original"),
    (_has_key(r"^decoder\.up\.0\..*conv_y\."), "movq", "original"),
    (
        lambda s: "embedding.weight" in s and "decoder.up.0.block.0.conv1.weight" in s,
        "dalle-mini-detokenizer",
        "original",
    ),
    (_has_key(r"^decoder\.up_blocks\.0\..*conv_y\."), "movq", "diffusers"),
    (
        lambda s: "decoder.up.0.block.0.conv1.weight" in s and "quantize.embedding.weight" in s,
        "first-stage-vq",
        "original",
    ),
    (_has_key(r"^decoder\.up\.0\.block\.0\.conv1\.weight$"), "first-stage-kl", "original"),
    (
        lambda s: "decoder.up_blocks.0.resnets.0.conv1.weight" in s and "quantize.embedding.weight" in s,
        "first-stage-vq",
        "diffusers",
    ),
    (_has_key(r"^decoder\.up_blocks\.0\.resnets\.0\.conv1\.weight$"), "first-stage-kl", "diffusers"),
    (_has_key(r"^decoder\.layers\.2\.conv\.0\.weight$"), "tiny-autoencoder", "diffusers"),
    (
        _has_key(
            r"^(visual\.)?transformer\.resblocks\.0\.attn\.in_proj_weight$|^(text|vision)_model\.encoder\.layers\.0\."
        ),
        "clip",
        "original",
    ),
)


def detect(shapes: Shapes, *, source: str | Path = "") -> Detection:
    """Return the family of a file with tensors of these names and shapes.

    Args:
        shapes: Shapes of the tensors by name.
        source: The file, for messages.

    Raises:
        ValueError: If the family is unknown; the message describes what the file holds.
    """
    for test, name, layout in BEFORE:
        if test(shapes):
            return Detection(name=name, layout=layout, evidence="its keys")
    for prefix in (UNET_PREFIX, ""):
        facts = unet_facts(shapes, prefix)
        bare = prefix == "" and not any(key.startswith(("down_blocks.", "input_blocks.")) for key in shapes)
        if facts is None or bare:
            continue
        family = classify(facts)
        if family is None:
            raise ValueError(f"{str(source)!r} holds a diffusion model of no family that is known ({facts})")
        return Detection(
            name=family,
            layout="original" if f"{prefix}input_blocks.0.0.weight" in shapes else "diffusers",
            evidence=str(facts),
        )
    for test, name, layout in AFTER:
        if test(shapes):
            return Detection(name=name, layout=layout, evidence="its keys")
    roots = sorted({key.split(".")[0] for key in shapes})
    raise ValueError(
        f"{str(source)!r} is of no family that is known: {len(shapes)} tensors below {', '.join(roots[:8])}"
    )


def require(found: Detection, *, source: str | Path) -> Family:
    """Return the family; ValueError naming file and family if `ldm.load` does not support it."""
    if found.family.refusal:
        raise ValueError(
            f"{str(source)!r} is a file of the family {found.name} ({found.family.title}), which"
            f" {found.family.refusal}"
        )
    return found.family


def expect(family: str, shapes: Shapes, *, source: str | Path) -> Detection:
    """Return the detection of a file that is expected to be of a family.

    A file whose shapes no published model has is accepted if its keys are below the family's prefixes.

    Args:
        family: The expected family.
        shapes: Shapes of the file's tensors by name.
        source: The file, for messages.

    Raises:
        WrongFamily: If the file belongs to another family.
        ValueError: If the file is unknown and has none of the family's prefixes.
    """
    parts = FAMILIES[family].parts
    if not parts:
        raise ValueError(f"files of the family {family} ({FAMILIES[family].title}) have no known parts")
    try:
        found = detect(shapes, source=source)
    except ValueError:
        if not any(key.startswith(prefix) for prefix in parts.values() for key in shapes):
            raise
        return Detection(name=family, layout="original", evidence="as expected by the caller")
    if found.name != family:
        what = f"{found.name} ({found.family.title}; {found.evidence})"
        raise WrongFamily(
            f"{str(source)!r} is a file of the family {what}, expected one of {family}"
            f" ({FAMILIES[family].title})",
            found,
        )
    return found
