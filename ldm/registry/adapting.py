"""Make adapter files from others and from models: convert, resize and merge them, and extract one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.catalog.lookup import find_card
from ldm.registry.inspection_adapters import ADAPTED_PARTS, CARD_OF
from ldm.registry.loading import load
from ldm.weights.adapters.adapter import Adapter
from ldm.weights.adapters.embeddings import split_embeddings
from ldm.weights.adapters.families import family_in_words
from ldm.weights.adapters.files import AdapterFile, read_adapter
from ldm.weights.adapters.kinds.low_rank import LowRank
from ldm.weights.adapters.leaves import grouped
from ldm.weights.adapters.matching import match_adapter
from ldm.weights.adapters.places import Places
from ldm.weights.adapters.reduction import extracted, joined, resized
from ldm.weights.adapters.writing import ModuleChange, check_target, module_changes, write_adapter
from ldm.weights.parts import build_network


def convert_adapter(
    path: str | Path, to: str | Path, *, names: str = "kohya", model: str | None = None
) -> Path:
    """Write an adapter in other names; every number is preserved.

    Args:
        path: The adapter.
        to: The file to write; for peft, the folder.
        names: "kohya", "diffusers" or "peft".
        model: Name of a model that it is for. Default: one of the family that it was made for.

    Returns:
        ``to``.

    Raises:
        ValueError: If it fits no such model, or the names have none for a kind; see `write_adapter`.
    """
    to = check_target(Path(to), names)
    file, adapter = _matched(path, model)
    changes = module_changes(adapter)
    dtypes = {value.dtype for value in file.tensors.values() if value.is_floating_point() and value.ndim}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return write_adapter(to, changes, names, dtype=dtype, metadata=file.metadata)


def resize_adapter(
    path: str | Path,
    to: str | Path,
    *,
    rank: int | None = None,
    keep: float = 1.0,
    names: str = "kohya",
    model: str | None = None,
) -> Path:
    """Write a LoRA of other ranks, as close as these allow.

    Args:
        path: The LoRA.
        to: The file to write.
        rank: Largest rank of a module. Default: None, the present one.
        keep: Part of the squared norm of each module's change that is kept, in (0, 1]. Default: 1.
        names: See `convert_adapter`.
        model: See `convert_adapter`.

    Raises:
        ValueError: If a change is no plain LoRA, or a number is out of range.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a part in (0, 1], got {keep}")
    to = check_target(Path(to), names)
    _, adapter = _matched(path, model)
    changes = [
        replace(change, delta=resized(_lora(change), rank, keep=keep)) for change in module_changes(adapter)
    ]
    return write_adapter(to, changes, names)


def merge_adapters(
    adapters: Sequence[tuple[str | Path, float]],
    to: str | Path,
    *,
    rank: int | None = None,
    names: str = "kohya",
    model: str | None = None,
) -> Path:
    """Write the weighted sum of LoRAs as one; without `rank` it is exact, and the ranks add up.

    Args:
        adapters: LoRAs and their strengths.
        to: The file to write.
        rank: Largest rank of a module. Default: None, the sum of ranks.
        names: See `convert_adapter`.
        model: See `convert_adapter`.

    Raises:
        ValueError: If there are none, or a change is no plain LoRA.
    """
    to = check_target(Path(to), names)
    found: dict[tuple[str, str], list[tuple[LowRank, float]]] = {}
    for path, strength in adapters:
        for change in module_changes(_matched(path, model)[1]):
            found.setdefault((change.part, change.path), []).append((_lora(change), strength))
    if not found:
        raise ValueError("expected at least one adapter")
    changes = [ModuleChange(part=p, path=path, delta=joined(own)) for (p, path), own in found.items()]
    if rank is not None:
        changes = [replace(change, delta=resized(_lora(change), rank)) for change in changes]
    return write_adapter(to, changes, names)


def extract_adapter(
    base: str | Path | None,
    tuned: str | Path,
    to: str | Path,
    *,
    model: str | None = None,
    rank: int = 32,
    convolutions: bool = False,
    clamp: float = 1.0,
    names: str = "kohya",
    dtype: torch.dtype = torch.float16,
) -> tuple[Path, list[str]]:
    """Write the LoRA that is closest to the difference of two models.

    Args:
        base: Weights of the first model; see `ldm.load`.
        tuned: Weights of the second model.
        to: The file to write.
        model: Name of both models. Default: None, the one that the weights state.
        rank: Largest rank of a module. Default: 32.
        convolutions: Whether residual blocks and resampling are extracted too. Default: False.
        clamp: See `ldm.weights.adapters.reduction.extracted`. Default: 1.
        names: See `convert_adapter`.
        dtype: Floating-point type of the file. Default: float16.

    Returns:
        ``to``, and the names of the tensors that differ and are not in it.

    Raises:
        ValueError: If the models do not differ in any module, or a number is out of range.
    """
    if rank < 1 or not 0 < clamp <= 1:
        raise ValueError(f"expected a rank of at least 1 and clamp in (0, 1], got {rank} and {clamp}")
    to = check_target(Path(to), names)
    first, second = (_networks(load(model, weights=w, device="cpu", dtype="float32")) for w in (base, tuned))
    changes: list[ModuleChange] = []
    taken: set[tuple[str, str]] = set()
    for part, path, before, after, ours in _layers(first, second, convolutions):
        if not torch.equal(before, after):
            delta = extracted(after - before, rank, clamp=clamp)
            changes.append(ModuleChange(part=part, path=path, delta=delta))
        taken |= {(part, name) for name in ours}
    left = [
        f"{part}: {name}"
        for part, network in first.items()
        for name, value in network.state_dict().items()
        if (part, name) not in taken and not torch.equal(value, second[part].state_dict()[name])
    ]
    if not changes:
        raise ValueError(f"{str(tuned)!r} differs from {str(base)!r} in no module that a LoRA changes")
    return write_adapter(to, changes, names, dtype=dtype), left


def _layers(
    first: Mapping[str, nn.Module], second: Mapping[str, nn.Module], convolutions: bool
) -> Iterator[tuple[str, str, Tensor, Tensor, tuple[str, ...]]]:
    """Yield each module that a LoRA changes: part, path, both weights, and the network's own names."""
    for part, network in first.items():
        state, other = (dict(each.state_dict()) for each in (network, second[part]))
        for place in Places(part, network).layers(convolutions=convolutions):
            site = place.sites["weight"]
            yield part, place.path, site.read(state), site.read(other), site.ours


def _networks(pipe: nn.Module) -> dict[str, nn.Module]:
    """Return the networks of a pipeline that adapters change."""
    networks: Mapping[str, nn.Module] = pipe.networks()  # type: ignore[operator]  # a pipeline of any class
    return {part: network for part, network in networks.items() if part in ADAPTED_PARTS}


def _matched(path: str | Path, model: str | None) -> tuple[AdapterFile, Adapter]:
    """Return an adapter's content, and what it changes in a model."""
    file = read_adapter(path)
    embeddings, rest = split_embeddings(file.tensors, file.path.stem)
    if model is None:
        made_for = family_in_words(grouped(rest)[0], embeddings, file.metadata)
        if made_for not in CARD_OF:
            raise ValueError(f"{file.path.name!r} was made for {made_for}: state the model")
        model = CARD_OF[made_for]
    configs = find_card(model)[0].shapes()
    networks = {part: build_network(configs[part]) for part in ADAPTED_PARTS if part in configs}
    adapter = match_adapter(file, networks or _networks(load(model, device="cpu")), model=model)
    if adapter.learned:
        raise ValueError(f"{file.path.name!r} holds learned words, which these commands do not write")
    return file, adapter


def _lora(change: ModuleChange) -> LowRank:
    """Return the change of a module as a plain LoRA; ValueError if it is another kind."""
    if not isinstance(change.delta, LowRank):
        raise ValueError(f"{change.path}: {change.delta.kind} is no LoRA, which alone has a rank")
    return change.delta
