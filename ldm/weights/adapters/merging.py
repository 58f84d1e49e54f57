"""Merge changes into the weights of networks, so that removing them restores every bit.

The weights are computed from their originals each time, in float32, and converted once. The originals of
changed weights are in files (`Originals`): a usual LoRA changes a quarter of Stable Diffusion's UNet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.support.derived import checksum
from ldm.support.memory import release_unchanged
from ldm.weights.adapters.adapter import Edit
from ldm.weights.adapters.kinds.delta import Delta
from ldm.weights.adapters.originals import Key, Originals


class Weighted(NamedTuple):
    """A change and its strength."""

    edit: Edit
    strength: float


class _Merged(NamedTuple):
    """What a weight was made of, and what it was then (`ldm.support.derived.checksum`)."""

    recipe: tuple[tuple[Delta, float], ...]
    content: int
    dtype: torch.dtype


class Merger:
    """The changes that are merged into networks."""

    def __init__(self) -> None:
        self._originals = Originals()
        self._merged: dict[Key, _Merged] = {}
        self._applied: list[Weighted] = []

    @property
    def merged(self) -> bool:
        """Whether any weight is changed."""
        return bool(self._merged)

    def apply(self, networks: Mapping[str, nn.Module], changes: Iterable[Weighted]) -> None:
        """Set the weights of networks to their originals with changes.

        Args:
            networks: The networks by part.
            changes: The changes, in their order; those that were merged before and are not among them are
                undone.

        Raises:
            ValueError: If weights were changed otherwise since changes were merged.
            OSError: If the originals cannot be written. After an error the weights are as before.
        """
        changes = [each for each in changes if each.strength != 0]
        own = _parameters(networks)
        groups = _groups(changes)
        recipes = {key: _recipe(group) for keys, group in groups for key in keys}
        stale = {key for key, each in self._merged.items() if recipes.get(key) != each.recipe}
        fresh = [key for key in recipes if key not in self._merged]
        self._check_untouched(own, stale)
        self._originals.keep({key: own[key] for key in fresh})
        due = stale | set(fresh)
        try:
            self._restore(own, stale - recipes.keys())
            self._write(own, [(keys, group) for keys, group in groups if due & set(keys)])
        except BaseException:
            self._restore(own, due)
            self._write(own, [(keys, group) for keys, group in _groups(self._applied) if due & set(keys)])
            raise
        self._applied = changes

    def fuse(self) -> None:
        """Make the changed weights the originals."""
        self._originals.drop(list(self._merged))
        self._merged, self._applied = {}, []

    def _check_untouched(self, own: Mapping[Key, Tensor], keys: Iterable[Key]) -> None:
        """Raise ValueError if merged weights were written to by something else, which would be lost."""
        touched = [
            f"{part}: {name}"
            for part, name in keys
            if own[part, name].dtype == self._merged[part, name].dtype
            and checksum(own[part, name]) != self._merged[part, name].content
        ]
        if touched:
            raise ValueError(
                f"{len(touched)} weights were changed after an adapter was merged into them"
                f" ({', '.join(touched[:3])}): call fuse() to keep them as they are"
            )

    @torch.no_grad()
    def _restore(self, own: Mapping[Key, Tensor], keys: Iterable[Key]) -> None:
        keys = [key for key in keys if key in self._originals]
        for key in keys:
            self._originals.restore(key, own[key])
            self._merged.pop(key, None)
        self._originals.drop(keys)

    @torch.no_grad()
    def _write(self, own: Mapping[Key, Tensor], groups: Sequence[tuple[set[Key], list[Weighted]]]) -> None:
        """Compute the weights of groups from their originals."""
        lost = [key for keys, _ in groups for key in keys if key not in self._originals]
        self._originals.keep({key: own[key] for key in lost})
        for keys, group in groups:
            part = next(iter(keys))[0]
            values = {name: self._original(own, (part, name)) for _, name in keys}
            for edit, strength in group:
                changed = edit.delta.apply(edit.site.read(values), strength)
                values |= edit.site.write(values, changed)
            for name, value in values.items():
                parameter = own[part, name]
                if self._originals.is_memory_of((part, name), parameter):
                    mapped, parameter.data = parameter.detach(), value.to(parameter.dtype)
                    release_unchanged([mapped])
                elif value.data_ptr() != parameter.data_ptr():
                    parameter.copy_(value)
                recipe = _recipe(group)
                self._merged[part, name] = _Merged(recipe, checksum(parameter), parameter.dtype)

    def _original(self, own: Mapping[Key, Tensor], key: Key) -> Tensor:
        """Return the original of a weight in float32; the weight itself where it is unchanged and fits."""
        unchanged = key not in self._merged and not self._originals.is_memory_of(key, own[key])
        kept = own[key].detach() if unchanged else self._originals.read(key).to(own[key].device)
        # the dtype of a pipeline that was converted since counts
        return kept.to(own[key].dtype).to(torch.float32)


def _parameters(networks: Mapping[str, nn.Module]) -> dict[Key, Tensor]:
    return {
        (part, name): parameter
        for part, network in networks.items()
        for name, parameter in network.named_parameters()
    }


def _recipe(group: Iterable[Weighted]) -> tuple[tuple[Delta, float], ...]:
    return tuple((each.edit.delta, each.strength) for each in group)


def _groups(changes: Iterable[Weighted]) -> list[tuple[set[Key], list[Weighted]]]:
    """Return the tensors that change together, with their changes in order."""
    found: dict[Key, tuple[set[Key], list[Weighted]]] = {}
    for each in changes:
        site = each.edit.site
        keys: set[Key] = {(site.part, name) for name in site.ours}
        joined = [found[key] for key in keys if key in found]
        group = joined[0] if joined else (set(), [])
        for other in joined[1:]:
            if other is not group:
                group[0].update(other[0])
                group[1].extend(change for change in other[1] if change not in group[1])
        group[0].update(keys)
        group[1].append(each)
        for key in group[0]:
            found[key] = group
    return list({id(group): group for group in found.values()}.values())
