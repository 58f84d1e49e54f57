"""Which compositions are computed once and kept: every picture on every ground, and a number of small and
double ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.data import PALETTE, Composition, held_out_pair
from ldm.training.data import Pictures


@dataclass(frozen=True)
class Compositions:
    """The rows of a cache: all pictures of the mix that training may see, on every ground that it may see
    them on, then the ``variants``, drawn once from the mix's small and double ones.
    """

    rows: tuple[Composition, ...]
    row_of: dict[tuple[int, str | None], int]
    variants: int

    @classmethod
    def of(cls, pictures: Pictures, *, variants: int, seed: int) -> Compositions:
        """Those of a run's pictures."""
        mix = pictures.config.mix
        plain = [
            Composition(image=int(row), background=ground)
            for row in pictures.data.train
            if getattr(mix, pictures.data.index[int(row)].style) > 0
            for ground in (None, *(PALETTE if mix.background > 0 else ()))
            if ground != "white" and not held_out_pair(pictures.data.index[int(row)].name, ground)
        ]
        row_of = {(c.image, c.background): i for i, c in enumerate(plain)}
        # white said or unsaid is one picture
        row_of.update({(c.image, "white"): i for i, c in enumerate(plain) if c.background is None})
        return cls((*plain, *draw_variants(pictures, variants, seed)), row_of, variants)

    def choose(self, composition: Composition, rng: np.random.Generator) -> tuple[Composition, int]:
        """The kept composition for a drawn one (a small or double one becomes one of the variants), and its
        row."""
        if composition.second is None and composition.size == "full":
            return composition, self.row_of[composition.image, composition.background]
        row = len(self.rows) - self.variants + int(rng.integers(self.variants))
        return self.rows[row], row


def draw_variants(pictures: Pictures, n: int, seed: int) -> list[Composition]:
    """n compositions of the mix that are small or double."""
    mix = pictures.config.mix
    if n and mix.small + mix.two == 0:
        raise ValueError(f"variants {n}: the mix has neither small nor double pictures to draw them from")
    if not n and mix.small + mix.two > 0:
        raise ValueError("variants 0: the mix has small or double pictures, so expected at least 1")
    rng, drawn = np.random.default_rng(seed), []
    while len(drawn) < n:
        drawn += [c for c in pictures.draw(rng, n, mix) if c.second is not None or c.size == "small"]
    return drawn[:n]
