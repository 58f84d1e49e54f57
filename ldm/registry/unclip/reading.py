"""unCLIP models and priors, from wherever their weights are."""

from __future__ import annotations

from dataclasses import replace

from ldm.catalog.unclip_cards import PriorCard, UnCLIPCard
from ldm.pipelines.stages.prior import PriorStage
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.locating import WeightsRequest
from ldm.registry.sources import Source
from ldm.registry.unclip.assembly import assemble_unclip
from ldm.registry.unclip.layouts import pipelines
from ldm.registry.unclip.originals import (
    is_original,
    prior_from_file,
    prior_from_random,
    unclip_from_file,
    unclip_from_files,
)
from ldm.registry.unclip.sources import unclip_from_diffusers, unclip_from_ldm, unclip_from_random
from ldm.support.warn import warn_user
from ldm.weights.formats.diffusers_folder import list_variants


def load_unclip(card: UnCLIPCard, request: WeightsRequest) -> UnCLIP:
    """Return a card's pipeline; see `ldm.registry.loading.load`."""
    refuse_latent_options(card, request)
    source = read_unclip_source(card, request)
    for note in source.notes:
        warn_user(f"weights {str(request.weights)!r}: {note}")
    if source.stated.pad is not None:
        card = replace(card, words=replace(card.words, pad=source.stated.pad))
    with request.naming():
        return assemble_unclip(card, source)


def read_unclip_source(card: UnCLIPCard, request: WeightsRequest) -> Source:
    """Read a model's networks from a single file or a folder in any layout, or at random.

    The folder is one in ldm layout, one in diffusers layout, one that holds several of these, or one of the
    authors' files.
    """
    if request.random:
        return unclip_from_random(card, request.dtype, request.embedded)
    path = request.path(card)
    if path.is_file():
        return unclip_from_file(card, path, request.dtype, ema=request.ema)
    if not path.is_dir():
        raise FileNotFoundError(
            f"weights {str(path)!r}: expected a folder in diffusers layout, a folder that ldm.save wrote, a"
            ' single file, or "random"'
        )
    if (path / "card.yaml").is_file():
        return unclip_from_ldm(card, path, request.dtype)
    if pipelines(path):
        return unclip_from_diffusers(card, path, request.dtype, variant=request.folder_variant)
    if is_original(card, path):
        return unclip_from_files(card, path, request.dtype)
    found = (
        "the weights of one part alone"
        if list_variants(path)
        else "neither model_index.json (diffusers layout, here or one folder below) nor card.yaml (written by"
        " ldm.save) nor the files of its authors"
    )
    raise FileNotFoundError(f"weights {str(path)!r}: expected the folder of a model, but it holds {found}")


def load_prior(card: PriorCard, request: WeightsRequest) -> PriorStage:
    """Return a prior, to be combined with the decoder of an `UnCLIP` of the same CLIP."""
    refuse_latent_options(card, request)
    if request.random:
        network = prior_from_random(card, request.dtype)
    else:
        path = request.path(card)
        if not path.is_file():
            raise FileNotFoundError(f'weights {str(path)!r}: expected the file of a prior, or "random"')
        network = prior_from_file(card, path, request.dtype)
    return PriorStage(network, card.prior, clip=card.clip).eval()


def refuse_latent_options(card: UnCLIPCard | PriorCard, request: WeightsRequest) -> None:
    """Raise ValueError for options of latent diffusion models."""
    if request.prediction is not None or request.vocabulary is not None:
        raise ValueError(
            f"{card.name!r} is of the unCLIP family: prediction and vocabulary are options of latent"
            " diffusion models"
        )
