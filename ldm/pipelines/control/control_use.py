"""`Control`: how a call uses a control of its pipeline, with a hint; and what recipes state of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

from torch import Tensor

from ldm.images.pixels import ImageInput
from ldm.models.control.controlled import ControlPart, interval
from ldm.pipelines.control.loaded_control import ControlEntry, LoadedControl
from ldm.pipelines.recipe import content_sha256
from ldm.pipelines.replayable import FileEntry, InMemory, as_json
from ldm.support.scalars import check_kind, check_within, finite_number, python_scalar, whole_number
from ldm.support.text import shown

MOST_STRENGTH = 1000.0
NO_MARGINS, MOST_MARGIN = (0, 0, 0, 0), 2**20


@dataclass(frozen=True)
class Control:
    """How a call uses a control, such as a ControlNet, that was loaded by `pipe.controls.load`.

    Args:
        name: Its name.
        hint: The image that it reads: one, or one for each image to be made; see `ImageInput`. Its size is
            that of the images to be made, or another with the same aspect ratio, from which it is resized.
        strength: Factor of what it adds; 1 is as trained, 0 nothing. Default: 1.
        start, end: Fractions of the sampling steps between which it acts. Default: 0 and 1.
        guess: Guess mode: it acts on the conditional branch of guidance alone, and early maps count less.
            Default: False.
        mask: Mask of the hint, white where the image is filled in, for controls that take one.
        margins: Pixels at left, right, top and bottom by which the hint is extended, as outpainting extends
            the image; see `ldm.pipelines.control.hints.extended`. Default: none.

    Raises:
        ValueError: If a value is out of range.
    """

    name: str
    hint: ImageInput
    _: KW_ONLY
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    mask: ImageInput | None = None
    margins: tuple[int, int, int, int] = NO_MARGINS

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"control: expected the name of a control, got {shown(self.name)}")
        for name in ("strength", "start", "end"):
            object.__setattr__(self, name, finite_number(name, getattr(self, name)))
        object.__setattr__(self, "guess", python_scalar(self.guess))
        check_kind("guess", self.guess, "bool")
        if not hasattr(self.margins, "__len__") or len(self.margins) != len(NO_MARGINS):
            raise ValueError(f"margins: expected left, right, top and bottom, got {shown(self.margins)}")
        margins = tuple(whole_number("margins", each, least=0, most=MOST_MARGIN) for each in self.margins)
        object.__setattr__(self, "margins", margins)
        check_within("strength", self.strength, -MOST_STRENGTH, MOST_STRENGTH)
        check_within("start", self.start, 0, 1)
        check_within("end", self.end, 0, 1)
        if self.start >= self.end:
            raise ValueError(
                f"control {shown(self.name)}: start {self.start}, expected less than end {self.end}"
            )

    def as_json(self) -> dict[str, Any]:
        """Return the control as a recipe states it.

        Raises:
            InMemory: If an image is no file.
        """
        return {field.name: as_json(field.name, getattr(self, field.name)) for field in fields(self)}

    @property
    def in_files(self) -> bool:
        """Whether its images are files."""
        try:
            return bool(self.as_json())
        except InMemory:
            return False


CONTROL_FIELDS = tuple(field.name for field in fields(Control))
Controlling = Sequence[Control | Mapping[str, Any] | Sequence[Any]]


def as_controls(given: object) -> tuple[Control, ...]:
    """Return the controls that a caller or a recipe states: `Control`s, mappings, or (name, hint) and so on.

    Raises:
        ValueError: If one is none of these.
    """
    if given is None:
        return ()
    if isinstance(given, Control | Mapping | str) or not isinstance(given, Sequence):
        raise ValueError(f"controls: expected a list of ldm.Control, got {shown(given)}")
    return tuple(_as_control(each) for each in given)


def _as_control(each: object) -> Control:
    if isinstance(each, Control):
        return each
    if isinstance(each, Mapping):
        unknown = [str(name) for name in each if name not in CONTROL_FIELDS]
        if unknown or not {"name", "hint"} <= set(each):
            raise ValueError(
                f"controls: expected the entries name and hint, and of {', '.join(CONTROL_FIELDS[2:])}, got"
                f" {shown(sorted(map(str, each)))}"
            )
        return Control(**each)
    if isinstance(each, Sequence) and not isinstance(each, str) and 2 <= len(each) <= 5:
        names = ("name", "hint", "strength", "start", "end")
        return Control(**dict(zip(names, each, strict=False)))
    raise ValueError(
        f"controls: expected an ldm.Control, or (name, hint, strength, start, end), got {shown(each)}"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlUse:
    """A control of a call, settled.

    Args:
        option: What the caller asked for.
        loaded: The control.
        hint: What the network reads, (1 or B, C, H, W), float32 on the CPU.
    """

    option: Control
    loaded: LoadedControl
    hint: Tensor

    @property
    def guess(self) -> bool:
        """Whether it acts on the conditional branch alone."""
        return self.option.guess or self.loaded.card.global_pool

    @property
    def shows_edges(self) -> bool:
        """Whether its hint shows the edges of the image, from the first step on."""
        return self.loaded.card.edges and self.option.strength > 0 and self.option.start == 0


def json_of(uses: Sequence[ControlUse]) -> list[dict[str, Any]]:
    """Return the controls of a call as a recipe states them; images in memory are left out."""
    found = []
    for use in uses:
        try:
            found.append(use.option.as_json())
        except InMemory:
            bare = replace(use.option, hint="", mask=None)
            found.append({**bare.as_json(), "hint": None})
    return found


def control_parts(uses: Sequence[ControlUse], times: Sequence[float]) -> tuple[ControlPart, ...]:
    """Return the parts of a `Controlled` UNet.

    Args:
        uses: The controls of a call.
        times: Timesteps of the call's grid, as the network gets them.
    """
    return tuple(
        ControlPart(
            kind=use.loaded.kind,
            strength=use.option.strength,
            guess=use.option.guess,
            interval=interval(times, use.option.start, use.option.end),
        )
        for use in uses
    )


def entries_of(uses: Sequence[ControlUse]) -> tuple[ControlEntry, ...]:
    """Return what a recipe states of the controls that a call uses, each once."""
    return tuple({use.option.name: use.loaded.entry() for use in uses}.values())


def hint_digests(uses: Sequence[ControlUse]) -> dict[str, str | None]:
    """Return the SHA-256 of the hints that were given in memory."""
    return {f"hint of {use.option.name}": content_sha256(use.hint) for use in uses if not use.option.in_files}


@dataclass(frozen=True, kw_only=True)
class StatedControl:
    """A `Control` as a recipe holds it; see there."""

    name: str
    hint: FileEntry
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    mask: FileEntry | None = None
    margins: tuple[int, int, int, int] = NO_MARGINS

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Its images."""
        return (self.hint,) if self.mask is None else (self.hint, self.mask)

    def checked(self) -> Control:
        """Return the control, after its files were compared with their SHA-256.

        Raises:
            FileNotFoundError: If a file is absent.
            ValueError: If one has changed.
        """
        mask = None if self.mask is None else self.mask.check("mask")
        return replace(
            Control(self.name, self.hint.check("hint"), mask=mask),
            strength=self.strength,
            start=self.start,
            end=self.end,
            guess=self.guess,
            margins=self.margins,
        )
