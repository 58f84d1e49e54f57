"""Cards of distilled helpers: LoRAs that make a model draw in few steps, with the sampling that they need.

The values are those of the authors' instructions: LCM-LoRA (arXiv:2311.05556), TCD (arXiv:2402.19159),
SDXL-Lightning (arXiv:2402.13929), Hyper-SD (arXiv:2404.13686).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ldm.catalog.cards import ModelCard
from ldm.samplers.conventions import Options
from ldm.support.config import nearest

STEPS_IN_NAME = re.compile(r"(?<![0-9])([0-9]{1,2})[-_ ]?steps?(?![a-z])", re.IGNORECASE)
MOST_STEPS_IN_NAME = 16


@dataclass(frozen=True, kw_only=True)
class DistilledCard:
    """How a model with a distilled helper is sampled.

    Args:
        name: Its name.
        file: Regular expression that is found in the names of its files.
        sampler: Sampling method.
        steps: Number of sampling steps, where the file's name states none.
        guidance: Guidance scale; 1 is without guidance.
        grid: Options of `TimeGrid.make` for the sampler.
        options: Options of the sampler.
    """

    name: str
    file: str
    sampler: str
    steps: int
    guidance: float = 1.0
    grid: Options = field(default_factory=dict)
    options: Options = field(default_factory=dict)

    def applied(self, card: ModelCard) -> ModelCard:
        """Return a model's card with this sampling as its defaults."""
        rules = card.grids()
        convention = replace(
            rules,
            grids={**rules.grids, self.sampler: self.grid},
            options={**rules.options, self.sampler: self.options},
        )
        defaults = replace(card.defaults, sampler=self.sampler, steps=self.steps, guidance=self.guidance)
        return replace(card, defaults=defaults, convention=convention)

    def __str__(self) -> str:
        return f"{self.name}: sampler {self.sampler}, {self.steps} steps, guidance {self.guidance:g}"


_TRAILING = {"spacing": "trailing"}
HELPERS: Mapping[str, DistilledCard] = {
    card.name: card
    for card in (
        DistilledCard(
            name="lcm-lora", file=r"lcm[-_ ]?lora", sampler="lcm", steps=4, grid={"spacing": "lcm"}
        ),
        DistilledCard(
            name="tcd-lora",
            file=r"tcd[-_ ]?(sd|lora)",
            sampler="tcd",
            steps=4,
            grid={"spacing": "lcm", "final": "first"},
            options={"eta": 0.3},
        ),
        DistilledCard(
            name="sdxl-lightning", file=r"sdxl[-_ ]?lightning", sampler="euler", steps=4, grid=_TRAILING
        ),
        DistilledCard(
            name="hyper-sd",
            file=r"hyper[-_ ]?(sd|sdxl)",
            sampler="ddim",
            steps=8,
            grid={**_TRAILING, "final": "first"},
        ),
    )
}


def distilled_card(helper: str | None, file: str) -> DistilledCard | None:
    """Return the card of a helper, with the number of steps that the file's name states.

    Args:
        helper: Its name; "none" for none. None: the one whose files have such names.
        file: Name of the file.

    Raises:
        ValueError: If there is no helper of this name.
    """
    if helper == "none":
        return None
    if helper is None:
        found = [card for card in HELPERS.values() if re.search(card.file, file, re.IGNORECASE)]
    elif helper in HELPERS:
        found = [HELPERS[helper]]
    else:
        raise ValueError(f"helper {helper!r}; {nearest(helper, (*HELPERS, 'none'))}")
    if not found:
        return None
    match = STEPS_IN_NAME.search(file)
    steps = int(match[1]) if match else 0
    return replace(found[0], steps=steps) if 0 < steps <= MOST_STEPS_IN_NAME else found[0]
