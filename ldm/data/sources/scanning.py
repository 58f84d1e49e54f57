"""Look through the files of a data set before it is trained on: headers, sizes, captions and duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from ldm.conditioning.prompt import MAX_CHARACTERS, check_text
from ldm.data.dataset import BROKEN, Problem, Record
from ldm.data.sources.config import FileData
from ldm.data.sources.decoding import Header, TooManyPixels, check_side_pixels, image_header
from ldm.support.text import escaped

MOST_NAMED = 8  # names of a kind of problem in a message


@dataclass(frozen=True, kw_only=True)
class ScannedFile:
    """A file that may be an image.

    Args:
        name: Its name.
        size: Its size in bytes.
        fingerprint: See `Record`.
        captions: Its captions.
        header: What its header states, or what is wrong with it.
    """

    name: str
    size: int
    fingerprint: str
    captions: tuple[str, ...]
    header: Header | Fault


class Fault(NamedTuple):
    """Why a file is no image that can be trained on: kind and reason of a `Problem`."""

    kind: str
    reason: str


def look_at(read: Callable[[], BinaryIO]) -> Header | Fault:
    """Return what the header of a file that `read` opens states, or what is wrong with it."""
    try:
        with read() as file:
            return image_header(file)
    except TooManyPixels as error:
        return Fault("too large", str(error))
    except (ValueError, OSError) as error:
        return Fault("unreadable", escaped(error, 300))


def look_again(header: Header | None, read: Callable[[], BinaryIO]) -> Header | Fault:
    """Return a header that an earlier scan has found, within the present limits; see `look_at`."""
    if header is None:
        return look_at(read)
    try:
        check_side_pixels(header.width, header.height)
    except TooManyPixels as error:
        return Fault("too large", str(error))
    return header


def scan(
    candidates: Sequence[ScannedFile],
    read: Callable[[int], BinaryIO],
    config: FileData,
) -> tuple[list[int], list[Record], list[Problem]]:
    """Choose the files that are images to train on.

    Args:
        candidates: The files.
        read: Opens candidate i.
        config: Which images are left out.

    Returns:
        The numbers of the candidates that are images to train on, their records, and all problems.
    """
    kept, records, problems = list[int](), list[Record](), list[Problem]()
    for i, each in enumerate(candidates):
        header = each.header
        if isinstance(header, Fault):
            problems.append(Problem(each.name, header.kind, header.reason))
            continue
        if min(header.height, header.width) < config.least_side:
            size = f"{header.width}×{header.height} pixels, expected sides of at least {config.least_side}"
            problems.append(Problem(each.name, "too small", size))
            continue
        if header.frames:
            problems.append(Problem(each.name, "several frames", "the first is used"))
        captions = tuple(text for text in each.captions if _is_caption(text))
        if len(captions) < len(each.captions):
            found = f"a caption is no valid text, or longer than {MAX_CHARACTERS} characters"
            problems.append(Problem(each.name, "bad metadata", found))
        captions = captions or config.captions
        if not captions:
            used = "it is left out" if config.uncaptioned == "skip" else "it has the empty caption"
            problems.append(Problem(each.name, "no caption", used))
            if config.uncaptioned == "skip":
                continue
        kept.append(i)
        records.append(
            Record(
                name=each.name,
                captions=captions,
                height=header.height,
                width=header.width,
                fingerprint=each.fingerprint,
            )
        )
    problems += find_duplicates([candidates[i] for i in kept], lambda j: read(kept[j]))
    return kept, records, problems


def _is_caption(text: str) -> bool:
    try:
        check_text(text, "caption")
    except ValueError:
        return False
    return True


def find_duplicates(candidates: list[ScannedFile], read: Callable[[int], BinaryIO]) -> list[Problem]:
    """Return the files that have the same bytes as an earlier one.

    Only files of one size and one beginning are read.
    """
    alike: dict[tuple[int, str], list[int]] = {}
    for i, each in enumerate(candidates):
        assert isinstance(each.header, Header)
        alike.setdefault((each.size, each.header.head), []).append(i)
    problems = []
    for group in alike.values():
        first: dict[bytes, int] = {}
        for i in group if len(group) > 1 else ():
            with read(i) as file:
                same = first.setdefault(hashlib.sha256(file.read()).digest(), i)
            if same != i:
                problems.append(
                    Problem(candidates[i].name, "duplicate", f"of {escaped(candidates[same].name, 200)}")
                )
    return problems


def describe_problems(problems: Iterable[Problem], *, most: int = MOST_NAMED) -> list[str]:
    """Return a line for each kind of problem: how many files have it, and the first ones with the reason.

    Args:
        problems: The problems.
        most: Number of files that a line names. Default: `MOST_NAMED`.
    """
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    lines = []
    for kind, found in kinds.items():
        named = "; ".join(f"{escaped(p.name, 200)} ({p.reason})" for p in found[:most])
        more = f"; and {len(found) - most} more" if len(found) > most else ""
        lines.append(f"{kind}: {len(found)}: {named}{more}")
    return lines


def check_problems(problems: Iterable[Problem], config: FileData, images: int) -> None:
    """Raise ValueError if a data set cannot be trained on.

    Args:
        problems: What was found.
        config: The limits.
        images: Number of images that are left.
    """
    problems = list(problems)
    broken = [problem for problem in problems if problem.kind in BROKEN]
    if not images:
        found = "; ".join(describe_problems(problems)) or "there is no image file"
        raise ValueError(f"data.path {config.path!r}: no image to train on: {found}")
    if len(broken) > config.max_broken:
        raise ValueError(
            f"data.path {config.path!r}: {len(broken)} broken files, data.max_broken permits"
            f" {config.max_broken}: {'; '.join(describe_problems(broken))}"
        )
    if config.uncaptioned == "stop":
        if bare := [problem for problem in problems if problem.kind == "no caption"]:
            raise ValueError(f"data.path {config.path!r}: {'; '.join(describe_problems(bare))}")
