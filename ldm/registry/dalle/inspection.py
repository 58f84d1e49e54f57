"""What is in a folder of DALL·E Mini's published files, without building its networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ldm.catalog.dalle_cards import DalleCard
from ldm.catalog.lookup import known_cards
from ldm.registry.dalle.model_config import judged_config
from ldm.registry.dalle.sources import TELLING, has_size, part_file_name, pieces_of, weight_files
from ldm.registry.inspection_diffusers import examine_pickles, stated_lines
from ldm.registry.report import Report, non_finite_in_parts, report_part
from ldm.weights.formats.safetensors import sha256

FAMILY = "dalle-mini"  # begins the names of the families of its files


class Piece(NamedTuple):
    """A part of a model in a file.

    Attributes:
        part: Name of the part.
        file: The file.
        state: Its tensors.
    """

    part: str
    file: Path
    state: dict[str, Tensor]


def inspect_tokens_folder(path: Path, *, nan: bool, digest: bool) -> Report | None:
    """Report what is in a folder of DALL·E Mini's files; None if it holds none.

    Args:
        path: The folder.
        nan: Whether to look for NaN and infinity.
        digest: Whether to compute SHA-256.
    """
    problems: list[str] = []
    pieces: list[Piece] = []
    found = False
    try:
        weights = list(weight_files(path))
    except ValueError:  # more files than these models have
        return None
    for file in weights:
        try:
            family, states = pieces_of(file)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        found = found or family.startswith(FAMILY)
        pieces += [Piece(part, file, state) for part, state in states.items()]
    if not found:
        return None
    card = card_of(pieces)
    parts: dict[str, dict[str, Tensor]] = {}
    for piece in pieces:
        name = piece.part if piece.part not in parts else f"{piece.part} ({part_file_name(path, piece.file)})"
        parts[name] = piece.state
    stated = [f"the sizes are those of {card.name!r}" if card else "the sizes are those of no known card"]
    for folder in dict.fromkeys(piece.file.parent for piece in pieces if piece.part in TELLING):
        if card is not None:
            config, findings = judged_config(card, folder)
            stated += stated_lines("config.json", findings, config, problems)
    names, unsafe, judged = examine_pickles(path)
    files = list(dict.fromkeys(piece.file for piece in pieces))
    return Report(
        path=path,
        kind="folder of DALL·E Mini's files",
        size=sum(file.stat().st_size for file in files),
        sha256={part_file_name(path, file): sha256(file) for file in files} if digest else {},
        parts=tuple(report_part(name, state) for name, state in parts.items()),
        stated=tuple(stated),
        bad=non_finite_in_parts(parts) if nan else None,
        globals=names,
        unsafe=unsafe,
        judged=judged,
        problems=tuple(problems),
    )


def card_of(pieces: Sequence[Piece]) -> DalleCard | None:
    """Return the published card whose encoder and decoder are among the pieces; None if there is none."""
    telling = {piece.part for piece in pieces if piece.part in TELLING}
    for card in known_cards().values():
        if isinstance(card, DalleCard) and card.networks is not None and telling:
            shapes = card.shapes()
            fitting = {
                piece.part for piece in pieces if has_size(piece.part, piece.state, shapes[piece.part])
            }
            if telling <= fitting:
                return card
    return None
