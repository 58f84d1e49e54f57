"""`LoadedAdapter`: an adapter of a pipeline, and what recipes state of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ldm.catalog.distilled import DistilledCard
from ldm.weights.adapters.adapter import Adapter
from ldm.weights.adapters.merging import Weighted

TEXT_PARTS = ("text", "text2")  # the parts that `text_strength` is for


@dataclass(frozen=True, kw_only=True)
class AdapterEntry:
    """What a recipe states of an adapter.

    Args:
        name: Its name.
        file: Name of its file.
        sha256: SHA-256 of the file.
        strength, text_strength, blocks, merge, token: See `LoadedAdapter`.
        helper: Name of the distilled helper that it is; None if it is none.
        fused: Whether it had become part of the weights.
    """

    name: str
    file: str
    sha256: str
    strength: float = 1.0
    text_strength: float = 1.0
    blocks: Mapping[str, float] | None = None
    merge: bool = True
    token: str | None = None
    helper: str | None = None
    fused: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedAdapter:
    """An adapter of a pipeline.

    Args:
        name: Its name.
        adapter: What it changes.
        strength: Factor of its changes of the denoiser; 1 is as trained, negative values reverse it.
        text_strength: The same for the text towers.
        blocks: Factors of the denoiser's blocks (`ldm.weights.adapters.blocks`); None for 1 everywhere.
        merge: Whether its changes are merged into the weights.
        token: The word for its learned vectors that was asked for; None for the file's own.
        helper: The distilled helper that it is; None if it is none.
    """

    name: str
    adapter: Adapter
    strength: float
    text_strength: float
    blocks: Mapping[str, float] | None
    merge: bool
    token: str | None = None
    helper: DistilledCard | None = None

    def weighted(self) -> Iterator[Weighted]:
        """Yield its changes with their strengths."""
        for edit in self.adapter.edits:
            strength = self.text_strength if edit.site.part in TEXT_PARTS else self.strength
            yield Weighted(edit, strength * (1.0 if self.blocks is None else self.blocks.get(edit.block, 0)))

    @property
    def words(self) -> tuple[str, ...]:
        """The words that stand for its learned vectors."""
        return tuple(word for vectors in self.adapter.learned for word in vectors.triggers)

    def entry(self) -> AdapterEntry:
        """Return what a recipe states of it."""
        return AdapterEntry(
            name=self.name,
            file=self.adapter.file,
            sha256=self.adapter.digest,
            strength=self.strength,
            text_strength=self.text_strength,
            blocks=self.blocks,
            merge=self.merge,
            token=self.token,
            helper=None if self.helper is None else self.helper.name,
        )

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in self.adapter.kinds.items())
        parts = ", ".join(f"{count} modules of {part}" for part, count in self.adapter.modules.items())
        how = "merged" if self.merge else "on the fly"
        strengths = f"strength {self.strength:g}, text {self.text_strength:g}"
        said = [f"{kinds} in {parts}; {strengths}, {how}"] if kinds else []
        said += [f"{each.triggers[0]!r}: {each.count} learned vectors" for each in self.adapter.learned]
        said += [] if self.helper is None else [f"sets the defaults of {self.helper}"]
        return f"{self.name}: {'; '.join(said)}"
