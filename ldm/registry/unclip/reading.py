"""unCLIP models, and priors alone, from wherever their weights are."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.catalog.unclip_cards import PriorCard, UnCLIPCard
from ldm.pipelines.stages.prior import PriorStage
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.unclip.assembly import assemble_unclip
from ldm.registry.unclip.layouts import pipelines
from ldm.registry.unclip.originals import is_original, prior_network, unclip_from_file, unclip_from_files
from ldm.registry.unclip.sources import (
    UnCLIPSource,
    unclip_from_diffusers,
    unclip_from_native,
    unclip_from_random,
)
from ldm.weights.formats.diffusers_folder import list_variants


def load_unclip(
    card: UnCLIPCard,
    embedded_in: Path | None,
    path: Path | None,
    dtype: torch.dtype,
    *,
    ema: bool | None,
    variant: str | None,
) -> UnCLIP:
    """A card's model from a path, or (None) with random weights; see `ldm.registry.loading.load`."""
    return assemble_unclip(
        card,
        (
            unclip_from_random(card, dtype, embedded_in)
            if path is None
            else read_unclip_source(card, path, dtype, ema=ema, variant=variant)
        ),
    )


def read_unclip_source(
    card: UnCLIPCard, path: Path, dtype: torch.dtype, *, ema: bool | None, variant: str | None
) -> UnCLIPSource:
    """The networks in a single file, in a folder of ours, of diffusers (or in one that holds several of
    these), or of their authors' files."""
    if path.is_file():
        return unclip_from_file(card, path, dtype, ema=ema)
    if not path.is_dir():
        raise FileNotFoundError(
            f"weights {str(path)!r}: expected a folder of diffusers, one that ldm.save wrote, a single file,"
            ' or "random"'
        )
    if (path / "card.yaml").is_file():
        return unclip_from_native(card, path, dtype)
    if pipelines(path):
        return unclip_from_diffusers(
            card, path, dtype, variant="non_ema" if ema is False and variant is None else variant
        )
    if is_original(card, path):
        return unclip_from_files(card, path, dtype)
    nothing = (
        "neither model_index.json (of diffusers, here or one folder below) nor card.yaml (of ldm.save) nor"
        " the files of its authors"
    )
    what = "weights of one part alone" if list_variants(path) else nothing
    raise FileNotFoundError(f"weights {str(path)!r}: expected the folder of a model, it holds {what}")


def load_prior(card: PriorCard, path: Path | None, dtype: torch.dtype) -> PriorStage:
    """A prior alone, to be given to an `UnCLIP` of the same CLIP."""
    if path is not None and not path.is_file():
        raise FileNotFoundError(f'weights {str(path)!r}: expected the file of a prior, or "random"')
    return PriorStage(prior_network(card, path, dtype), card.prior, clip=card.clip).eval()
