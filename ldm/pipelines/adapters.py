"""`pipe.adapters`: load, set, remove and fuse the adapters of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ldm.catalog.distilled import DistilledCard, distilled_card
from ldm.conditioning.conditioner import TextConditioner
from ldm.pipelines.loaded_adapter import AdapterEntry, LoadedAdapter
from ldm.support.config import nearest
from ldm.support.scalars import finite_number
from ldm.support.warn import warn_user
from ldm.weights.adapters.adapter import Adapter
from ldm.weights.adapters.blocks import BlockWeights, block_weights
from ldm.weights.adapters.files import read_adapter
from ldm.weights.adapters.matching import match_adapter
from ldm.weights.adapters.merging import Merger, Weighted
from ldm.weights.adapters.on_the_fly import OnTheFly, separated
from ldm.weights.strict import mismatch


class UnusedKeys(UserWarning):
    """An adapter has keys that match nothing in the model."""


class DefaultsChanged(UserWarning):
    """An adapter is a distilled helper, whose sampling the pipeline now has as its defaults."""


class Adapters:
    """The adapters of a pipeline, in the order in which they were loaded.

    Sums, such as those of LoRAs, do not depend on the order. DoRA, OFT, (IA)³ and GLoRA change the weights as
    the adapters before them have left them.

    Args:
        networks: Returns the pipeline's networks by part.
        readers: Returns what reads prompts with learned words, by the part of its text tower.
        model: Name of the model.
    """

    def __init__(
        self,
        networks: Callable[[], Mapping[str, nn.Module]],
        readers: Callable[[], Mapping[str, TextConditioner]],
        model: str,
    ) -> None:
        self._networks = networks
        self._readers = readers
        self._model = model
        self._loaded: dict[str, LoadedAdapter] = {}
        self._fused: list[AdapterEntry] = []
        self._kept: DistilledCard | None = None  # the helper that was fused
        self._merger = Merger()
        self._hooks = OnTheFly()

    def load(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        strength: float = 1.0,
        text_strength: float | None = None,
        blocks: BlockWeights | None = None,
        merge: bool = True,
        strict: bool = True,
        token: str | None = None,
        helper: str | None = None,
    ) -> LoadedAdapter:
        """Load an adapter and apply it.

        Args:
            path: A .safetensors, .pt or .bin file, or a folder that peft or diffusers wrote.
            name: Its name. Default: that of the file without ending.
            strength: Factor of its changes; 1 is as trained, 0 none. Default: 1.
            text_strength: The same for the text towers. Default: `strength`.
            blocks: Factors of the denoiser's blocks: by name, a list, or a preset
                (`ldm.weights.adapters.blocks`). Default: 1 everywhere.
            merge: Whether to merge the changes into the weights. Otherwise layers add them on the fly; norms,
                biases and text towers are merged all the same. Default: True.
            strict: Whether keys that match nothing in the model are an error. Default: True; otherwise they
                are a warning.
            token: The word for a textual inversion. Default: the file's name, and the token that it states.
            helper: Name of a distilled helper (`ldm.catalog.distilled`), whose sampler, grid, steps and
                guidance become the pipeline's defaults; "none" for none. Default: by the file's name.

        Returns:
            What was loaded; its text names kinds, modules and strengths.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or refused, was made for another model, has keys that match
                nothing, or holds NaN; or if the name is taken. The pipeline is unchanged then.

        Warns:
            UnusedKeys: If keys match nothing and `strict` is False.
            DefaultsChanged: If the file's name says that it is a distilled helper.
        """
        name = _checked_name(path) if name is None else name
        if name in self._loaded:
            raise ValueError(f"name: an adapter {name!r} is loaded; remove it, or choose another name")
        strength, factors = finite_number("strength", strength), block_weights(blocks)
        text = strength if text_strength is None else finite_number("text_strength", text_strength)
        adapter = self._read(path, strict=strict, token=token)
        made = LoadedAdapter(
            name=name,
            adapter=adapter,
            strength=strength,
            text_strength=text,
            blocks=factors,
            merge=merge,
            token=token,
            helper=distilled_card(helper, adapter.file),
        )
        self._add(made, quiet=helper is not None)
        return made

    def set(
        self,
        name: str,
        strength: float | None = None,
        *,
        text_strength: float | None = None,
        blocks: BlockWeights | None = None,
    ) -> None:
        """Set the strength of an adapter; what is None stays.

        Args:
            name: Name of the adapter.
            strength: Factor of its changes; if no `text_strength` is given, also that of the text towers.
            text_strength: Factor of its changes of the text towers.
            blocks: Factors of the denoiser's blocks; see `load`.

        Raises:
            ValueError: If there is no such adapter, or a number is not finite.
        """
        old = self._get(name)
        new = old
        if strength is not None:
            value = finite_number("strength", strength)
            new = replace(new, strength=value, text_strength=value)
        if text_strength is not None:
            new = replace(new, text_strength=finite_number("text_strength", text_strength))
        if blocks is not None:
            new = replace(new, blocks=block_weights(blocks))
        self._apply({**self._loaded, name: new})

    def remove(self, name: str) -> None:
        """Remove an adapter; with the last one, every weight has the bits that it had before.

        Raises:
            ValueError: If there is no such adapter, or the weights were changed by something else since.
        """
        self._get(name)
        self._apply({key: each for key, each in self._loaded.items() if key != name})

    def fuse(self) -> None:
        """Make all adapters part of the weights, which then stay so; recipes still name them.

        Raises:
            ValueError: If an adapter has learned words, which are no weights.
        """
        words = {name: each for name, each in self._loaded.items() if each.words}
        if words:
            raise ValueError(
                f"{', '.join(words)}: learned words are no weights and cannot be fused; remove them"
            )
        self._apply({name: replace(each, merge=True) for name, each in self._loaded.items()})
        self._fused += [replace(each.entry(), fused=True) for each in self._loaded.values()]
        self._merger.fuse()
        self._kept = self.helper
        self._loaded = {}

    def list(self) -> tuple[LoadedAdapter, ...]:
        """Return the adapters, in the order in which they were loaded."""
        return tuple(self._loaded.values())

    def __len__(self) -> int:
        return len(self._loaded)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def __str__(self) -> str:
        return "\n".join(map(str, self.list())) or "no adapters"

    def entries(self) -> tuple[AdapterEntry, ...]:
        """Return what a recipe states of the adapters, those that were fused first."""
        return *self._fused, *(each.entry() for each in self._loaded.values())

    def load_entry(self, entry: AdapterEntry, path: Path) -> None:
        """Load an adapter as a recipe states it.

        Args:
            entry: What the recipe states.
            path: The file.
        """
        self.load(
            path,
            name=entry.name,
            strength=entry.strength,
            text_strength=entry.text_strength,
            blocks=entry.blocks,
            merge=entry.merge,
            token=entry.token,
            helper=entry.helper or "none",
            strict=False,  # the file is the one that was loaded then
        )
        if entry.fused:
            self.fuse()

    def _add(self, made: LoadedAdapter, *, quiet: bool) -> None:
        """Apply one more adapter, and say if it sets the defaults, unless that was asked for."""
        self._apply({**self._loaded, made.name: made})
        if made.helper is not None and not quiet:
            warn_user(f"the defaults are now those of {made.helper}", DefaultsChanged)

    def _read(self, path: str | Path, *, strict: bool, token: str | None) -> Adapter:
        """Return what a file changes in the model; see `load`."""
        file = read_adapter(path)
        adapter = match_adapter(file, self._networks(), model=self._model, strict=strict, token=token)
        self._check_words(adapter)
        if adapter.unused:
            unused = mismatch((), adapter.unused, ())
            warn_user(f"{adapter.file!r}: keys match nothing in {self._model!r}: {unused}", UnusedKeys)
        return adapter

    def check_saved(self) -> None:
        """Raise ValueError if the weights are not the model's own, because adapters are merged into them."""
        if self._merger.merged:
            names = ", ".join(name for name, each in self._loaded.items() if each.adapter.edits)
            raise ValueError(
                f"adapters are merged into the weights ({names}): call pipe.adapters.fuse() to save the model"
                " with them, or remove them first"
            )

    @property
    def helper(self) -> DistilledCard | None:
        """The distilled helper whose sampling counts: the last one that was loaded; None for none."""
        return next((each.helper for each in reversed(self._loaded.values()) if each.helper), self._kept)

    def _get(self, name: str) -> LoadedAdapter:
        if name not in self._loaded:
            raise ValueError(f"no adapter is called {name!r}; {nearest(name, self._loaded)}")
        return self._loaded[name]

    def _apply(self, loaded: dict[str, LoadedAdapter]) -> None:
        """Bring the networks to the state of some adapters; after an error everything is as before."""
        networks = self._networks()
        merged: list[Weighted] = []
        hooked: list[Weighted] = []
        for each in loaded.values():
            changes = list(each.weighted())
            layers, others = ([], changes) if each.merge else separated(networks, changes)
            merged += others
            hooked += layers
        self._merger.apply(networks, merged)
        self._hooks.apply(networks, hooked)
        learned = [vectors for each in loaded.values() for vectors in each.adapter.learned]
        for part, reader in self._readers().items():
            missing = torch.zeros(
                1, reader.width, device="cpu", dtype=torch.float32
            )  # of a tower that the file has no vectors for
            reader.learned.replace(
                {each.triggers: each.vectors.get(part, missing.expand(each.count, -1)) for each in learned}
            )
        self._loaded = loaded

    def _check_words(self, adapter: Adapter) -> None:
        """Raise ValueError if the model cannot read learned words, or one of them is taken."""
        if adapter.learned and not self._readers():
            raise ValueError(
                f"{adapter.file!r}: {self._model!r} has no CLIP text tower that reads its vectors"
            )
        taken = {word.lower() for each in self._loaded.values() for word in each.words}
        for word in (word for vectors in adapter.learned for word in vectors.triggers):
            if word.lower() in taken:
                raise ValueError(f"{adapter.file!r}: the word {word!r} is taken: choose another one, token=…")
            if not word.strip():
                raise ValueError(f"token: expected a word, got {word!r}")
            taken.add(word.lower())


def _checked_name(path: str | Path) -> str:
    return Path(path).stem or str(path)
