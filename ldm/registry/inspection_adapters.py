"""Report what is in an adapter file: kinds, family, ranks by block, what it changes in a model, its words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from ldm.catalog.lookup import find_card
from ldm.registry.inspection_diffusers import stated_lines
from ldm.registry.report import BlockReport, MatchReport, Report, non_finite, report_part
from ldm.weights.adapters.adapter import Adapter
from ldm.weights.adapters.embeddings import split_embeddings
from ldm.weights.adapters.families import WIDTHS, family_in_words
from ldm.weights.adapters.files import FOLDER_FILES, AdapterFile, adapter_digest, read_adapter
from ldm.weights.adapters.leaves import grouped, has_adapter_keys
from ldm.weights.adapters.matching import match_places
from ldm.weights.adapters.peft_config import component_fields, config_findings
from ldm.weights.adapters.places import Places
from ldm.weights.formats.pickles import examine
from ldm.weights.formats.single_file import SAFETENSORS_KIND, file_kind
from ldm.weights.parts import build_network

# the card that an adapter of a family is compared with
CARD_OF = dict(zip(WIDTHS.values(), ("sd-v1-5", "sd-v2-1", "sdxl-base", "sdxl-refiner"), strict=True))
ADAPTED_PARTS = ("unet", "text", "text2")
MOST_TAGS = 10  # of the training, that a report lists
MAX_TAG_TEXT = 2**24  # characters of the metadata that are read for them


def adapter_in(path: Path) -> AdapterFile | None:
    """Return the content of a file or folder if it is an adapter; None if it is not, or cannot be read."""
    if path.is_dir() and not any((path / name).is_file() for name in FOLDER_FILES):
        return None
    try:
        file = read_adapter(path, digest=False)
        if has_adapter_keys(file.tensors) or split_embeddings(file.tensors, file.path.stem)[0]:
            return file
    except (ValueError, OSError):
        pass
    return None


def inspect_adapter(file: AdapterFile, *, model: str | None, nan: bool, digest: bool) -> Report:
    """Report what is in an adapter.

    Args:
        file: Its content.
        model: The card to compare it with. None: that of the family that it was made for.
        nan: Whether to look for NaN and infinity.
        digest: Whether to compute SHA-256.

    Raises:
        ValueError: If there is no such card.
    """
    kind = file_kind(file.path)
    pickled = None if kind == SAFETENSORS_KIND else examine(file.path)
    embeddings, rest = split_embeddings(file.tensors, file.path.stem)
    problems: list[str] = []
    try:
        made_for = family_in_words(grouped(rest)[0], embeddings, file.metadata)
    except ValueError as error:
        made_for = ""
        problems.append(str(error))
    try:
        config = [
            line
            for component, findings in config_findings(file.config).items()
            for line in stated_lines(
                component or "peft", findings, component_fields(file.config, component), problems
            )
        ]
    except ValueError as error:
        config = []
        problems.append(str(error))
    names = [model] if model is not None else [CARD_OF[made_for]] if made_for in CARD_OF else CARD_OF.values()
    matches: list[MatchReport] = []
    reasons: list[str] = []
    for name in names:
        try:
            matches.append(_match(file, name))
        except ValueError as error:
            reasons.append(str(error))
    return Report(
        path=file.path,
        kind=f"{kind}, an adapter, which is added to a model",
        size=file.path.stat().st_size,
        sha256={file.path.name: adapter_digest(file.path)} if digest else {},
        parts=(report_part("adapter", file.tensors),),
        values={key: value for key, value in file.values.items() if key != "ss_tag_frequency"},
        stated=(*_stated(file.metadata), *config),
        bad=non_finite(file.tensors) if nan else None,
        globals=pickled.globals if pickled else (),
        unsafe=pickled.refused if pickled else (),
        judged=pickled is None or not pickled.problem,
        problems=(*problems, *(reasons if not matches else ())),
        made_for=made_for,
        matches=tuple(matches),
    )


def _match(file: AdapterFile, name: str) -> MatchReport:
    """Return how an adapter matches a published model; ValueError if it does not."""
    card = find_card(name)[0]
    configs = card.shapes()
    places = {part: Places(part, build_network(configs[part])) for part in ADAPTED_PARTS if part in configs}
    adapter = match_places(file, places, model=name, strict=False)
    return MatchReport(
        card=name,
        kinds=adapter.kinds,
        modules=adapter.modules,
        unused=adapter.unused,
        without_effect=adapter.without_effect,
        words=tuple(f"{each.triggers[0]} ({each.count} vectors)" for each in adapter.learned),
        blocks=tuple(_blocks(adapter)),
    )


def _blocks(adapter: Adapter) -> Iterator[BlockReport]:
    """Yield the ranks and alphas of each part's blocks."""
    found: dict[tuple[str, str], list[tuple[int | None, float | None]]] = {}
    for edit in adapter.edits:
        found.setdefault((edit.site.part, edit.block), []).append((edit.delta.rank, edit.delta.alpha))
    for (part, block), pairs in sorted(found.items(), key=lambda item: (item[0][0] != "unet", item[0])):
        ranks = sorted({rank for rank, _ in pairs if rank is not None})
        alphas = sorted({round(alpha, 4) for _, alpha in pairs if alpha is not None})
        yield BlockReport(
            part=part, block=block, tensors=len(pairs), ranks=tuple(ranks), alphas=tuple(alphas)
        )


def _stated(metadata: Mapping[str, str]) -> Iterator[str]:
    """Yield the words and the most frequent tags that an adapter was trained with."""
    if phrase := metadata.get("modelspec.trigger_phrase", ""):
        yield f"trigger words: {phrase}"
    text = metadata.get("ss_tag_frequency", "")
    if not text or len(text) > MAX_TAG_TEXT:
        return
    try:
        folders = json.loads(text)
    except (ValueError, RecursionError):
        yield "ss_tag_frequency is not valid JSON"
        return
    tags = Counter[str]()
    for counts in folders.values() if isinstance(folders, dict) else ():
        for tag, count in counts.items() if isinstance(counts, dict) else ():
            tags[tag.strip()] += count if isinstance(count, int) and not isinstance(count, bool) else 0
    if tags:
        yield "most frequent tags: " + ", ".join(f"{tag} ({n})" for tag, n in tags.most_common(MOST_TAGS))
