"""The fields of requests: one table, which checks them and of which the OpenAPI document is made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ldm.conditioning.prompt import check_text
from ldm.diffusion.seeds import LARGEST
from ldm.samplers import SAMPLERS
from ldm.serving.errors import bad_field
from ldm.support.config import nearest
from ldm.support.text import shown

Endpoint = Literal["generations", "edits", "variations"]
FieldKind = Literal["text", "whole", "number", "switch", "size", "file"]
GENERATIONS, EDITS, VARIATIONS = "generations", "edits", "variations"
EVERY = (GENERATIONS, EDITS, VARIATIONS)
PROMPTED = (GENERATIONS, EDITS)
MOST_IMAGES, STEP_LIMIT, LONGEST_SIDE_OUT = 10, 250, 2048
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SIZE_TEXT = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
SWITCHES = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, kw_only=True)
class RequestField:
    """One field of a request.

    Args:
        name: Its name.
        kind: What its values are.
        about: What it means, for the OpenAPI document.
        on: The endpoints that have it. Default: all three.
        required: Whether it must be given. Default: False.
        choices: The texts that it takes; empty: any. Default: empty.
        least: Smallest number. Default: 0.
        most: Largest number. Default: infinity.
        aliases: Other names of it. Default: none.
        used: Whether it changes the images; else it is checked and ignored. Default: True.
    """

    name: str
    kind: FieldKind
    about: str
    on: Sequence[str] = EVERY
    required: bool = False
    choices: Iterable[str] = ()
    least: float = 0
    most: float = math.inf
    aliases: Sequence[str] = ()
    used: bool = True


REQUEST_FIELDS: tuple[RequestField, ...] = (
    RequestField(name="prompt", kind="text", about="what the images show", on=PROMPTED, required=True),
    RequestField(name="prompt", kind="text", about="what the image shows", on=(VARIATIONS,)),
    RequestField(name="image", kind="file", about="the image", on=(EDITS, VARIATIONS), required=True),
    RequestField(
        name="mask",
        kind="file",
        about="an image of the same size, transparent where the image is repainted",
        on=(EDITS,),
    ),
    RequestField(name="model", kind="text", about="id of a model; default: the server's first"),
    RequestField(name="n", kind="whole", about="number of images; default: 1", least=1, most=MOST_IMAGES),
    RequestField(name="size", kind="size", about="WIDTHxHEIGHT in pixels, or auto; default: auto"),
    RequestField(
        name="response_format",
        kind="text",
        about="default: url",
        choices=("url", "b64_json"),
    ),
    RequestField(name="output_format", kind="text", about="default: png", choices=tuple(MEDIA)),
    RequestField(
        name="output_compression",
        kind="whole",
        about="quality of jpeg and webp; default: 95",
        most=100,
    ),
    RequestField(
        name="background",
        kind="text",
        about="images are opaque: transparent is refused; default: auto",
        choices=("auto", "opaque", "transparent"),
    ),
    RequestField(name="stream", kind="switch", about="answer with server-sent events; default: false"),
    RequestField(
        name="partial_images",
        kind="whole",
        about="number of estimates of each image that a stream has; default: 0",
        most=3,
    ),
    RequestField(
        name="quality",
        kind="text",
        about="ignored",
        on=PROMPTED,
        choices=("auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"),
        used=False,
    ),
    RequestField(
        name="style",
        kind="text",
        about="ignored",
        on=(GENERATIONS,),
        choices=("vivid", "natural"),
        used=False,
    ),
    RequestField(
        name="moderation",
        kind="text",
        about="ignored",
        on=(GENERATIONS,),
        choices=("auto", "low"),
        used=False,
    ),
    RequestField(
        name="input_fidelity", kind="text", about="ignored", on=(EDITS,), choices=("high", "low"), used=False
    ),
    RequestField(name="user", kind="text", about="ignored", used=False),
    # fields of ldm
    RequestField(
        name="seed",
        kind="whole",
        about="seed of the first image; image i has seed + i; default: a random one",
        most=LARGEST - MOST_IMAGES,
    ),
    RequestField(
        name="steps",
        kind="whole",
        about="sampling steps; default: the model's",
        least=1,
        most=STEP_LIMIT,
        aliases=("num_inference_steps",),
    ),
    RequestField(
        name="guidance",
        kind="number",
        about="guidance scale; default: the model's",
        most=100,
        aliases=("guidance_scale", "cfg_scale"),
    ),
    RequestField(name="negative_prompt", kind="text", about="what the images do not show; default: nothing"),
    RequestField(name="sampler", kind="text", about="default: the model's", choices=SAMPLERS),
    RequestField(
        name="strength",
        kind="number",
        about="part of the steps that are run from the image; 1 ignores it; default: the task's",
        on=(EDITS, VARIATIONS),
        most=1,
    ),
    RequestField(
        name="preview_every",
        kind="whole",
        about="a stream has an estimate of each image after every so many steps, in place of partial_images",
        least=1,
        most=STEP_LIMIT,
    ),
    RequestField(name="progress", kind="switch", about="a stream has an event for each step; default: false"),
)


def fields_of(endpoint: str) -> dict[str, RequestField]:
    """Return the fields of an endpoint, by their names and aliases."""
    own = [each for each in REQUEST_FIELDS if endpoint in each.on]
    return {name: each for each in own for name in (each.name, *each.aliases)}


def checked_fields(
    endpoint: str, given: Mapping[str, Any], *, text: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the checked values of a request's fields, and the names that are no fields.

    Args:
        endpoint: "generations", "edits" or "variations".
        given: The values by name; None counts as not given. Files are not looked at.
        text: Whether numbers and switches are given as texts, as in a form.

    Raises:
        ApiError: For the first value that a field does not take, or a required field that is missing.
    """
    known = fields_of(endpoint)
    values: dict[str, Any] = {}
    for name, value in given.items():
        field = known.get(name)
        if field is None or value is None:
            continue
        if field.name in values:
            raise bad_field(name, f"given twice, also as {field.name}")
        values[field.name] = value if field.kind == "file" else checked_value(field, name, value, text=text)
    for field in known.values():
        if field.required and field.name not in values:
            raise bad_field(field.name, "missing; it is required", "missing_required_parameter")
    strangers = tuple(name for name in given if name not in known)
    return values, strangers


def checked_value(field: RequestField, name: str, value: Any, *, text: bool) -> Any:
    """Return the value of a field; see `checked_fields`."""
    if field.kind == "switch":
        found = SWITCHES.get(value.lower()) if text and isinstance(value, str) else value
        if not isinstance(found, bool):
            raise bad_field(name, f"expected true or false, got {shown(value)}", "invalid_type")
        return found
    if field.kind in ("whole", "number"):
        return checked_number(field, name, parsed_number(value) if text else value, value)
    if not isinstance(value, str):
        raise bad_field(name, f"expected a text, got {shown(value)}", "invalid_type")
    try:
        check_text(value, name)
    except ValueError as error:
        raise bad_field(name, str(error).removeprefix(f"{name} "), "string_above_max_length") from None
    if field.choices and value not in field.choices:
        raise bad_field(name, f"unknown value {shown(value)}; {nearest(value, field.choices)}")
    return checked_size(name, value) if field.kind == "size" else value


def parsed_number(value: Any) -> Any:
    """Return the number that a text of a form states; the value itself if it states none."""
    if not isinstance(value, str) or len(value) > 40 or not value.isascii():
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def checked_number(field: RequestField, name: str, value: Any, given: Any) -> int | float:
    """Return a number of a field; see `checked_fields`. `given` is what the message shows."""
    whole = field.kind == "whole"
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if whole and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if not numeric or (whole and not isinstance(value, int)) or not math.isfinite(value):
        kind = "a whole number" if whole else "a number"
        raise bad_field(name, f"expected {kind}, got {shown(given)}", "invalid_type")
    if not field.least <= value <= field.most:
        code = "integer_below_min_value" if value < field.least else "integer_above_max_value"
        raise bad_field(name, f"expected {field.least:,} to {field.most:,}, got {shown(given)}", code)
    return int(value) if whole else float(value)


def checked_size(name: str, value: str) -> tuple[int, int] | None:
    """Return the (width, height) of a size; None for "auto"."""
    if value == "auto":
        return None
    found = SIZE_TEXT.fullmatch(value)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= min(sides) <= max(sides) <= LONGEST_SIDE_OUT:
        raise bad_field(
            name,
            f"expected WIDTHxHEIGHT in pixels, such as 512x512, with sides of at most {LONGEST_SIDE_OUT}, or"
            f" auto, got {shown(value)}",
            "invalid_size",
        )
    return sides
