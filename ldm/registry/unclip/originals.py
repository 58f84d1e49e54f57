"""unCLIP models in the layouts of their authors: single files of Stable unCLIP, folders of files of Karlo and
Kandinsky 2.1, priors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.unclip_cards import PriorCard, UnCLIPCard
from ldm.models.unclip.noise_augmentation import NoiseAugmentation
from ldm.models.unclip.prior import Prior
from ldm.registry.latent.sources import part_dtype
from ldm.registry.unclip.sources import OPTIONAL, UnCLIPSource
from ldm.weights.formats.diffusers_folder import read_component
from ldm.weights.formats.pickles import read_pickle
from ldm.weights.formats.safetensors import fingerprint
from ldm.weights.formats.single_file import read_single, read_tensors
from ldm.weights.keymap import below
from ldm.weights.parts import build_network, fill_network, randomise
from ldm.weights.rules.prior import with_statistics

STATISTICS_FILE = (  # mean and deviation of CLIP's image embeddings, as Karlo's authors published them
    "ViT-L-14_stats.th"
)
# our parts: those of a single file
STABLE_PARTS = {"decoder": "unet", "words": "text", "vision": "image", "vae": "vae"}
# part: the pattern of its file's name, and below what it stands there; what is a folder has the layout of
# Hugging Face
CLIP_FILES = {"text": ("ViT-L-14.*", ""), "vision": ("ViT-L-14.*", "")}
FILES: dict[str, dict[str, tuple[str, str]]] = {
    "karlo": {
        **CLIP_FILES,
        "prior": ("prior*.ckpt", "model."),
        "decoder": ("decoder*.ckpt", "model."),
        "upsampler": ("*sr*.ckpt", "model_first_steps."),
        "upsampler-last": ("*sr*.ckpt", "model_last_step."),
    },
    "kandinsky21": {
        **CLIP_FILES,
        "prior": ("prior*.ckpt", "model."),
        "decoder": ("decoder*.ckpt", ""),
        "vae": ("movq*.ckpt", ""),
        "words": ("text_encoder", ""),
    },
}


def is_original(card: UnCLIPCard, path: Path) -> bool:
    """Whether a folder holds the files of a model as its authors published them: that of its decoder
    tells."""
    return card.family in FILES and bool(list(path.glob(_files(card)["decoder"][0])))


def _files(card: UnCLIPCard) -> dict[str, tuple[str, str]]:
    files = FILES[card.family]
    return {**files, "decoder": ("inpainting*.ckpt", "")} if card.concat == "known" else files


def unclip_from_files(card: UnCLIPCard, path: Path, dtype: torch.dtype) -> UnCLIPSource:
    """A folder of the authors' files. CLIP's, which OpenAI published as a program, is expected in any layout
    of tensors as ViT-L-14.safetensors.

    FileNotFoundError for a file that is absent; ValueError for a prior without its statistics, for two files
    of one part, and what does not fit.
    """
    assert card.networks is not None
    networks: dict[str, nn.Module] = {}
    origin: dict[str, str] = {}
    for part, config in card.networks.configs().items():
        pattern, prefix = _files(card)[part]
        found = sorted(file for file in path.glob(pattern))
        if not found and part in OPTIONAL:
            continue
        if len(found) != 1:
            have = ", ".join(file.name for file in found) or "none"
            error = FileNotFoundError if not found else ValueError
            raise error(
                f"{str(path)!r}: expected one file {pattern} with the {part} of {card.name!r}, there is"
                f" {have}"
            )
        folder = found[0].is_dir()
        tensors = dict(read_component(found[0]).tensors) if folder else read_tensors(found[0])[0]
        state: dict[str, Any] = below(prefix, tensors) if prefix else tensors
        if part == "prior":
            state = with_statistics(state, read_statistics(path / STATISTICS_FILE))
        networks[part] = fill_network(
            build_network(config), state, "original", source=found[0], dtype=part_dtype(part, dtype)
        )
        origin |= {found[0].name: fingerprint(found[0])} if not folder else {}
    words = path / "text_encoder"
    return UnCLIPSource(
        networks=networks,
        latent_scale=card.latent_scale or 1.0,
        origin=origin,
        pieces=words if "words" in networks else None,
    )


def unclip_from_file(card: UnCLIPCard, path: Path, dtype: torch.dtype, *, ema: bool | None) -> UnCLIPSource:
    """A single file of Stable Diffusion 2.1 unCLIP; that on ViT-L/14 needs ViT-L-14_stats.th beside it, which
    ValueError says."""
    if card.family not in ("sd21-unclip-h", "sd21-unclip-l"):
        raise ValueError(
            f"{str(path)!r}: the weights of {card.name!r} come as a folder, not as a single file"
        )
    assert card.networks is not None
    single = read_single(path, ema=ema, family=card.family)
    networks, configs = {}, card.networks.configs()
    for part, name in STABLE_PARTS.items():
        if name not in single.parts:
            raise ValueError(
                f"{str(path)!r} holds {', '.join(single.parts)}, and no {name}, the {part} of {card.name!r}"
            )
        state, kind = single.parts.pop(name), part_dtype(part, dtype)
        networks[part] = fill_network(
            build_network(configs[part]), state, single.found.layout, source=f"{path}: {name}", dtype=kind
        )
    noise = NoiseAugmentation(configs["noise"])
    if card.family == "sd21-unclip-l":
        mean, std = read_statistics(path.with_name(STATISTICS_FILE))
        noise.mean.copy_(mean.reshape(1, -1))
        noise.std.copy_(std.reshape(1, -1))
    networks["noise"] = noise.to(dtype).requires_grad_(False)
    scale = single.scale_factor or card.latent_scale or 1.0
    return UnCLIPSource(networks=networks, latent_scale=scale, origin={path.name: fingerprint(path)})


def read_statistics(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation (E,) of CLIP's image embeddings in a file of Karlo's; ValueError if it is absent, or
    holds something else."""
    if not path.is_file():
        raise ValueError(
            f"the statistics of CLIP's image embeddings are missing: expected {path.name} in"
            f" {str(path.parent)!r}"
        )
    content = read_pickle(path)
    if not isinstance(content, tuple | list) or not all(isinstance(tensor, Tensor) for tensor in content):
        raise ValueError(f"{str(path)!r}: expected a mean and a deviation, got {type(content).__name__}")
    state = with_statistics({}, tuple(content))
    return state["clip_mean"][0].float(), state["clip_std"][0].float()


def prior_network(card: PriorCard, path: Path | None, dtype: torch.dtype) -> Prior:
    """A prior alone in DALLE2-pytorch's layout, its averaged weights where it has them; (path None) with
    random ones."""
    network = build_network(card.config())
    assert isinstance(network, Prior)
    if path is None:
        randomise(network, 0, dtype)
        return network
    tensors, _ = read_tensors(path)
    state = {
        key.removeprefix("net."): value
        for key, value in tensors.items()
        if not key.startswith(("noise_scheduler.", "clip."))
    }
    if not any(key.startswith("net.") for key in tensors):
        raise ValueError(
            f"{str(path)!r} is no prior of DALLE2-pytorch: expected tensors below net., in ema_model, in"
            " model or at its top level"
        )
    fill_network(network, state, "original", source=path, dtype=dtype)
    return network
