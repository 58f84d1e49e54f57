"""The models of a server: loaded on first use, the least recently used unloaded beyond a limit of memory."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.catalog.cards import Card
from ldm.catalog.dalle_cards import DalleCard
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.pipelines.latent import LatentDiffusion
from ldm.pipelines.together import Together
from ldm.pipelines.unclip import UnCLIP
from ldm.samplers import SAMPLERS
from ldm.serving.errors import ApiError
from ldm.serving.sizes import final_size, usual_sizes
from ldm.support.config import nearest
from ldm.support.text import shown

ALIASES = ("dall-e-2",)  # names of the first model, for clients that know no other
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that a server offers.

    Attributes:
        name: Its id.
        card: The card of a model that draws images.
        load: Loads it, ready to sample.
    """

    name: str
    card: Card
    load: Callable[[], Any]


class Seat:
    """A model in memory.

    Args:
        pipe: The pipeline.
        exact: See `Together`.
    """

    def __init__(self, pipe: Any, *, exact: bool = True) -> None:
        self.pipe = pipe
        batched = isinstance(pipe, LatentDiffusion | UnCLIP)
        self.together = Together(pipe, exact=exact) if batched else None
        self.bytes = sum(
            each.numel() * each.element_size()
            for network in pipe.networks().values()
            for each in (*network.parameters(), *network.buffers())
        )


class Fleet:
    """The models that a server offers, and those of them that are in memory.

    Args:
        models: The models; the first is the default.
        memory: Bytes of weights that may be in memory at once; one model always may. Default: None, any.
        exact: See `Together`. Default: True.
    """

    def __init__(
        self, models: Sequence[ServedModel], *, memory: int | None = None, exact: bool = True
    ) -> None:
        names = [model.name for model in models]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"expected models with different names, got {names}")
        self.models: Mapping[str, ServedModel] = {model.name: model for model in models}
        self.memory, self.exact = memory, exact
        self._seats: dict[str, Seat] = {}  # by name, the most recently used last
        self._lock = threading.Lock()

    @property
    def default(self) -> str:
        """Name of the first model."""
        return next(iter(self.models))

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the models in memory."""
        with self._lock:
            return tuple(self._seats)

    def name_of(self, asked: str | None) -> str:
        """Return the name of the model that a request asks for; ApiError if there is none."""
        if asked is None or asked in ALIASES:
            return self.default
        if asked not in self.models:
            choices = nearest(asked, [*self.models, *ALIASES])
            raise ApiError(
                404, f"model: unknown model {shown(asked)}; {choices}", param="model", code="model_not_found"
            )
        return asked

    def joins(self, name: str) -> bool:
        """Return whether requests of a model are drawn in one batch; not before it is in memory."""
        with self._lock:
            seat = self._seats.get(name)
        return seat is not None and seat.together is not None

    def seat(self, name: str) -> Seat:
        """Return a model in memory; load it, and unload others, if it is not there.

        Raises:
            Exception: What loading raises.
        """
        with self._lock:
            found = self._seats.pop(name, None)
            if found is not None:
                self._seats[name] = found
                return found
        made = Seat(self.models[name].load(), exact=self.exact)
        with self._lock:
            self._seats[name] = made
            while self.memory is not None and len(self._seats) > 1 and self._bytes() > self.memory:
                first = next(iter(self._seats))
                del self._seats[first]
                _logger.info("unloaded %s", first)
        gc.collect()
        return made

    def _bytes(self) -> int:
        return sum(seat.bytes for seat in self._seats.values())

    def describe(self, name: str, *, nouns: bool = False) -> dict[str, Any]:
        """Return what the list of models says of a model.

        Args:
            name: Its name.
            nouns: Whether to add what prompts may name, of a model with exemplars: the nouns of its library,
                and the styles that may stand before them. Default: False.

        Some facts are known of a model in memory only: its nouns, and sizes besides its own.
        """
        card = self.models[name].card
        defaults, (width, height) = card.usual(), final_size(card)
        with self._lock:
            seat = self._seats.get(name)
        sizes = [(width, height)]
        if seat is not None and isinstance(seat.pipe, LatentDiffusion):
            sizes = usual_sizes((width, height), seat.pipe.multiple)
        sampled = not isinstance(card, DalleCard)  # tokens are drawn one by one
        own: dict[str, Any] = {
            "summary": card.summary,
            "loaded": seat is not None,
            "size": f"{width}x{height}",
            "sizes": [f"{w}x{h}" for w, h in sizes],
            "steps": defaults.steps if sampled else None,
            "guidance": defaults.guidance,
            "sampler": defaults.sampler if sampled else None,
            "samplers": sorted(SAMPLERS) if sampled else [],
        }
        pipe = None if seat is None else seat.pipe
        text = pipe.decoder.text if isinstance(pipe, UnCLIP) else getattr(pipe, "text", None)
        if nouns and isinstance(text, ExemplarConditioner):
            own |= {"nouns": sorted(text.library.nouns), "styles": text.library.styles}
        return {"id": name, "object": "model", "created": 0, "owned_by": "ldm", "ldm": own}
