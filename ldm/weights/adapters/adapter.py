"""`Adapter`: what a file changes in a model, matched and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ldm.weights.adapters.embeddings import LearnedVectors
from ldm.weights.adapters.kinds.delta import Delta
from ldm.weights.adapters.places import Site


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """The change of one tensor.

    Args:
        site: The tensor.
        block: Its block in the notation of block weights; see `ModulePlace`.
        delta: The change.
    """

    site: Site
    block: str
    delta: Delta


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """The changes of a model's weights by one file.

    Args:
        file: Name of the file.
        digest: Its SHA-256.
        made_for: The family that it was made for, in words.
        edits: The changes, in the file's order.
        modules: Number of changed modules by part.
        learned: Learned vectors that stand for words.
        without_effect: Keys of modules that the model never reads.
        unused: Keys that match nothing.
        metadata: What the file states about itself.
    """

    file: str
    digest: str
    made_for: str
    edits: tuple[Edit, ...]
    modules: Mapping[str, int]
    learned: tuple[LearnedVectors, ...] = ()
    without_effect: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> Adapter:
        return self  # nothing changes it

    @property
    def kinds(self) -> Mapping[str, int]:
        """Number of changed tensors by kind, the most frequent first."""
        return dict(Counter(edit.delta.kind for edit in self.edits).most_common())

    @property
    def ranks(self) -> Mapping[int, int]:
        """Number of changes by rank, the smallest first."""
        return dict(sorted(Counter(rank for edit in self.edits if (rank := edit.delta.rank)).items()))
