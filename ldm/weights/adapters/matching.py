"""Match the keys of an adapter file to the networks of a model: every key is used or named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.support.text import errors_of, escaped
from ldm.support.warn import warn_user
from ldm.weights.adapters.adapter import Adapter, Edit
from ldm.weights.adapters.embeddings import LearnedVectors, learned_vectors, split_embeddings
from ldm.weights.adapters.families import family_in_words
from ldm.weights.adapters.files import AdapterFile
from ldm.weights.adapters.kinds.delta import Delta
from ldm.weights.adapters.kinds.table import TERMS, deltas_of
from ldm.weights.adapters.leaves import Group, grouped
from ldm.weights.adapters.places import ModulePlace, Places
from ldm.weights.cast import is_finite
from ldm.weights.strict import mismatch


class Prefix(NamedTuple):
    """What stems of one component begin with.

    Attributes:
        text: The beginning.
        flat: Whether the dots of the names after it are underscores.
        parts: The networks that it may mean, the first that the model has counts; none for all of them.
        config: Beginning of the component's keys in a configuration.
    """

    text: str
    flat: bool
    parts: tuple[str, ...]
    config: str = ""


UNET, TEXT, TEXT2 = ("unet", "decoder"), ("text",), ("text2",)
PREFIXES = (
    Prefix("lora_unet_", True, UNET, "unet"),
    Prefix("lora_transformer_", True, UNET, "transformer"),
    Prefix("lycoris_", True, ()),
    Prefix("lora_te_wrapped_transformer_", True, TEXT, "text_encoder"),
    Prefix("lora_te1_", True, TEXT, "text_encoder"),
    Prefix("lora_te2_", True, TEXT2, "text_encoder_2"),
    Prefix("lora_te_", True, TEXT, "text_encoder"),
    Prefix("unet.base_model.model.", False, UNET, "unet"),
    Prefix("unet.", False, UNET, "unet"),
    Prefix("transformer.", False, UNET, "transformer"),
    Prefix("model.diffusion_model.", False, UNET, "unet"),
    Prefix("diffusion_model.", False, UNET, "unet"),
    Prefix("text_encoder.base_model.model.", False, TEXT, "text_encoder"),
    Prefix("text_encoder_2.base_model.model.", False, TEXT2, "text_encoder_2"),
    Prefix("text_encoder.", False, TEXT, "text_encoder"),
    Prefix("text_encoder_2.", False, TEXT2, "text_encoder_2"),
    Prefix("text_encoders.clip_l.transformer.", False, TEXT, "text_encoder"),
    Prefix("text_encoders.clip_h.transformer.", False, TEXT, "text_encoder"),
    Prefix("text_encoders.clip_g.transformer.", False, TEXT2, "text_encoder_2"),
    Prefix("base_model.model.", False, ()),
    Prefix("", False, ()),
)


class StemMatch(NamedTuple):
    """A module that a stem may mean: the place (None if the model never reads it), and the beginning of the
    keys that a configuration has for it."""

    place: ModulePlace | None
    config: str


def candidates(stem: str, networks: Mapping[str, Places]) -> Iterator[StemMatch]:
    """Yield the modules that a stem may mean, the most specific reading first.

    A model with two towers does not take the names of a model with one: what was made for one tower fits
    neither.
    """
    two = "text2" in networks and "text" in networks
    for prefix in PREFIXES:
        if not stem.startswith(prefix.text) or (two and prefix.text == "lora_te_"):
            continue
        name = stem.removeprefix(prefix.text)
        for part in prefix.parts or tuple(networks):
            if part in networks:
                place = networks[part].find(name, flat=prefix.flat)
                if place is not None:
                    yield StemMatch(place, prefix.config)
                elif prefix.text and networks[part].without_effect(name):
                    yield StemMatch(None, prefix.config)


class _Misfit(Exception):
    """Why a group of tensors does not fit the modules that its stem may mean."""


def match_adapter(
    file: AdapterFile,
    networks: Mapping[str, nn.Module],
    *,
    model: str,
    strict: bool = True,
    token: str | None = None,
) -> Adapter:
    """Return what a file changes in a model.

    Args:
        file: The content of the file.
        networks: The networks by part; they may be on the meta device.
        model: Name of the model, for messages.
        strict: Whether keys that match nothing are an error. Default: True; otherwise they are in
            `Adapter.unused`.
        token: The word that stands for the vectors of an embedding. Default: None, the file's name, and the
            token that it states.

    Raises:
        ValueError: If nothing matches, keys match nothing, a tensor does not fit its module, or tensors are
            not finite. The message says what the file was made for.
    """
    places = {part: Places(part, network) for part, network in networks.items()}
    for note in file.check_config():
        warn_user(note)
    return match_places(file, places, model=model, strict=strict, token=token)


def match_places(
    file: AdapterFile,
    places: Mapping[str, Places],
    *,
    model: str,
    strict: bool = True,
    token: str | None = None,
) -> Adapter:
    """Return what a file changes in a model whose modules are known; see `match_adapter`."""
    where = repr(str(file.path))
    embeddings, tensors = split_embeddings(file.tensors, file.path.stem)
    with errors_of(file.path):
        file.check_config()
        learned, left = _learned(embeddings, places, token)
        groups, unused = grouped(tensors)
    unused += left
    made_for = family_in_words(groups, embeddings, file.metadata)
    edits: list[Edit] = []
    misfits: list[str] = []
    without_effect: list[str] = []
    modules = Counter[str]()
    for group in groups:
        try:
            found = _group_edits(group, file, places)
        except _Misfit as error:
            misfits.append(f"{group.stem}: {error}")
            continue
        if found is None:
            unused += group.keys.values()
        elif not found.edits:
            without_effect += group.keys.values()
        else:
            edits += found.edits
            unused += [group.keys[leaf] for leaf in found.left if leaf != TERMS]
            modules[found.edits[0].site.part] += 1
    if not edits and not misfits and not learned:
        raise ValueError(_no_match(where, made_for, model, list(file.tensors)))
    if misfits or (unused and strict):
        wrong = mismatch((), unused, misfits)
        hint = "" if misfits else "; strict=False leaves such keys out"
        raise ValueError(f"{where}, made for {made_for}, does not fit {model!r}: {wrong}{hint}")
    bad = [edit.site.name for edit in edits if not _is_finite(edit.delta)]
    bad += [each.triggers[0] for each in learned if not all(map(is_finite, each.vectors.values()))]
    if bad:
        raise ValueError(
            f"{where}: NaN or infinity in the changes of {len(bad)} tensors ({', '.join(bad[:5])}); the file"
            " is damaged"
        )
    return Adapter(
        file=file.path.name,
        digest=file.digest,
        made_for=made_for,
        edits=tuple(edits),
        modules=modules,
        learned=tuple(learned),
        without_effect=tuple(without_effect),
        unused=tuple(unused),
        metadata=file.metadata,
    )


def _learned(
    embeddings: Mapping[str, Mapping[str, Tensor]], places: Mapping[str, Places], token: str | None
) -> tuple[list[LearnedVectors], list[str]]:
    """Return the learned vectors of a file, and the keys of those that are not used.

    Args:
        embeddings: The tensors of each embedding by name.
        places: The networks.
        token: The trigger of a single embedding, in place of its names.

    Raises:
        ValueError: If an embedding is not plausible, or there are several for one trigger.
    """
    widths = {part: each.token_width for part, each in places.items() if each.token_width is not None}
    if token is not None and len(embeddings) != 1:
        raise ValueError(f"token: the file holds {len(embeddings)} embeddings, expected one")
    found: list[LearnedVectors] = []
    unused: list[str] = []
    for name, tensors in embeddings.items():
        vectors, left = learned_vectors(name, tensors, widths, token)
        found += [] if vectors is None else [vectors]
        unused += left
    return found, unused


class _Found(NamedTuple):
    edits: list[Edit]
    left: Sequence[str]


def _group_edits(group: Group, file: AdapterFile, places: Mapping[str, Places]) -> _Found | None:
    """Return the changes of a module, and the leaves that are not used.

    They are empty for a module that the model never reads; None: the model has no such module, or the tensors
    are of no kind.

    Raises:
        _Misfit: If the tensors do not fit the module.
    """
    wrong = ""
    for place, config in candidates(group.stem, places):
        if place is None:
            return _Found([], ())
        try:
            leaves = group.leaves
            if "oft_R.weight" in leaves:
                leaves = {**leaves, TERMS: torch.tensor(file.rotation_terms(config) or 0, device="cpu")}
            delta, bias, left = deltas_of(leaves, partial(file.scale, config, place.path))
        except ValueError as error:
            raise _Misfit(str(error)) from None
        if delta is None and bias is None:
            return None
        edits: list[Edit] = []
        own = ""
        for leaf, change in (("weight", delta), ("bias", bias)):
            if change is None:
                continue
            site = place.sites.get(leaf)
            if site is None and change.optional:
                continue
            own = own or (f"the model's has no {leaf}" if site is None else change.misfit(site.shape))
            if site is not None:
                edits.append(Edit(site=site, block=place.block, delta=change))
        if not own:
            return _Found(edits, left)
        wrong = wrong or own
    if wrong:
        raise _Misfit(wrong)
    return None


def _is_finite(delta: Delta) -> bool:
    return all(is_finite(tensor) for tensor in delta.tensors().values())


def _no_match(where: str, made_for: str, model: str, keys: Sequence[str]) -> str:
    """Return the message for a file of which nothing matches."""
    shown = f"{', '.join(escaped(key, 200) for key in keys[:5])}{' …' if len(keys) > 5 else ''}" or "none"
    return f"{where}, made for {made_for}, changes no module of {model!r}; its keys: {shown}"
