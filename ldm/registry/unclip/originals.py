"""Read unCLIP models in their authors' layouts: files of Stable unCLIP, Karlo, Kandinsky 2.1, and priors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.catalog.unclip_cards import STABLE_FILE_PARTS, PriorCard, UnCLIPCard
from ldm.models.unclip.noise_augmentation import AugmentationConfig, NoiseAugmentation
from ldm.models.unclip.prior import Prior
from ldm.registry.sources import Source, part_dtype, random_networks, states_zero_terminal_snr
from ldm.registry.unclip.sources import OPTIONAL
from ldm.weights.formats.diffusers_folder import read_component
from ldm.weights.formats.diffusers_hashes import folder_hashes
from ldm.weights.formats.pickles import read_pickle
from ldm.weights.formats.single_file import SingleFile, read_single, read_tensors
from ldm.weights.hashing import FileHashes
from ldm.weights.keymap import below
from ldm.weights.parts import build_network, fill_network
from ldm.weights.rules.prior import with_statistics

# Mean and standard deviation of CLIP's image embeddings, as Karlo's authors published them.
STATISTICS_FILE = "ViT-L-14_stats.th"
# part: pattern of its file's name, and prefix of its keys in the file; a folder is in Hugging Face layout.
CLIP_FILES = {"text": ("ViT-L-14.*", ""), "vision": ("ViT-L-14.*", "")}
ORIGINAL_FILES: dict[str, dict[str, tuple[str, str]]] = {
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
    """Return whether a folder holds a model's decoder in a file as its authors published it."""
    return card.family in ORIGINAL_FILES and bool(list(path.glob(file_patterns(card)["decoder"][0])))


def file_patterns(card: UnCLIPCard) -> dict[str, tuple[str, str]]:
    """Return the pattern of each part's file name, and the prefix of its keys in the file."""
    files = ORIGINAL_FILES[card.family]
    return {**files, "decoder": ("inpainting*.ckpt", "")} if card.concat == "known" else files


def unclip_from_files(card: UnCLIPCard, path: Path, dtype: torch.dtype) -> Source:
    """Read a folder of the authors' files.

    CLIP, which OpenAI published as a program, is expected as ViT-L-14.safetensors in any layout of tensors.

    Raises:
        FileNotFoundError: If a file is absent.
        ValueError: If a prior lacks its statistics, a part has several files, or weights do not fit.
    """
    assert card.networks is not None
    networks: dict[str, nn.Module] = {}
    origin = FileHashes({})
    for part, config in card.networks.configs().items():
        pattern, prefix = file_patterns(card)[part]
        found = sorted(path.glob(pattern))
        if not found and part in OPTIONAL:
            continue
        if len(found) != 1:
            error = FileNotFoundError if not found else ValueError
            raise error(
                f"{str(path)!r}: expected one file {pattern} with the {part} of {card.name!r}, found"
                f" {', '.join(file.name for file in found) or 'none'}"
            )
        if found[0].is_dir():
            component = read_component(found[0])
            tensors, files = dict(component.tensors), list(component.files)
        else:
            tensors, files = read_tensors(found[0])[0], found
        state = below(prefix, tensors) if prefix else tensors
        if part == "prior":
            state = with_statistics(state, read_statistics(path / STATISTICS_FILE))
            files = [*files, path / STATISTICS_FILE]
        networks[part] = fill_network(
            build_network(config), state, "original", source=found[0], dtype=part_dtype(part, dtype)
        )
        origin = origin.joined(folder_hashes(path, files))
    return Source(
        networks=networks,
        latent_scale=card.latent_scale or 1.0,
        origin=origin,
        pieces=path / "text_encoder" if "words" in networks else None,
    )


def unclip_from_file(card: UnCLIPCard, path: Path, dtype: torch.dtype, *, ema: bool | None) -> Source:
    """Read a single file of Stable Diffusion 2.1 unCLIP.

    The model on ViT-L/14 also needs ViT-L-14_stats.th in the same folder.

    Args:
        card: The model's card.
        path: The file.
        dtype: Floating-point type of the networks.
        ema: Whether to take averaged weights; None takes them if present.

    Raises:
        ValueError: If the card's weights are not a single file, the file lacks a part or does not fit, or the
            statistics are absent.
    """
    if card.family not in ("sd21-unclip-h", "sd21-unclip-l"):
        raise ValueError(
            f"{str(path)!r}: the weights of {card.name!r} come as a folder, not as a single file"
        )
    assert card.networks is not None
    single = read_single(path, ema=ema, family=card.family)
    check_statements(card, single)
    networks, configs = dict[str, nn.Module](), card.networks.configs()
    for name, part in STABLE_FILE_PARTS.items():
        if name not in single.parts:
            raise ValueError(
                f"{str(path)!r} holds {', '.join(single.parts)}, and no {name}, the {part} of {card.name!r}"
            )
        networks[part] = fill_network(
            build_network(configs[part]),
            single.parts.pop(name),
            single.found.layout,
            source=f"{path}: {name}",
            dtype=part_dtype(part, dtype),
        )
    files, config = [path], configs["noise"]
    assert isinstance(config, AugmentationConfig)
    noise = NoiseAugmentation(config)
    if card.family == "sd21-unclip-l":
        mean, std = read_statistics(path.with_name(STATISTICS_FILE))
        files.append(path.with_name(STATISTICS_FILE))
        noise.mean.copy_(mean.reshape(1, -1))
        noise.std.copy_(std.reshape(1, -1))
    networks["noise"] = noise.to(dtype).requires_grad_(False)
    scale = single.scale_factor or card.latent_scale or 1.0
    return Source(
        networks=networks,
        latent_scale=scale,
        origin=folder_hashes(path.parent, files),
        notes=single.notes,
    )


def check_statements(card: UnCLIPCard, single: SingleFile) -> None:
    """Raise ValueError if a single file states another training of the decoder than the card."""
    stated, decoder = single.stated, card.decoder
    zero = states_zero_terminal_snr(single.tables, decoder.schedule, single.path) or stated.zero_terminal_snr
    wrong = {
        f"prediction {stated.prediction!r}": stated.prediction not in (None, decoder.prediction),
        "zero terminal SNR": zero and not decoder.schedule.zero_terminal_snr,
        "an EDM schedule": stated.schedule is not None,
    }
    if stating := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"{str(single.path)!r} states {' and '.join(stating)}; expected the training of {card.name!r},"
            f" which predicts {decoder.prediction!r}: register a card that states it"
        )


def read_statistics(path: Path) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of CLIP's image embeddings in Karlo's file, (E,) float32 each.

    Raises:
        ValueError: If the file is absent, or holds something else.
    """
    if not path.is_file():
        raise ValueError(
            f"the statistics of CLIP's image embeddings are missing: expected {path.name} in"
            f" {str(path.parent)!r}"
        )
    content = read_pickle(path)
    if not isinstance(content, tuple | list) or not all(isinstance(tensor, Tensor) for tensor in content):
        raise ValueError(
            f"{str(path)!r}: expected a mean and a standard deviation, got {type(content).__name__}"
        )
    state = with_statistics({}, tuple(content))
    return state["clip_mean"][0].float(), state["clip_std"][0].float()


def prior_from_random(card: PriorCard, dtype: torch.dtype) -> Prior:
    """Return a prior with random weights, the same in every call."""
    network = random_networks(card.shapes(), dtype)["prior"]
    assert isinstance(network, Prior)
    return network


def prior_from_file(card: PriorCard, path: Path, dtype: torch.dtype) -> Prior:
    """Return the prior in a file in DALLE2-pytorch's layout, with the averaged weights if it has them.

    Raises:
        ValueError: If the file holds no prior, or its weights do not fit.
    """
    network = build_network(card.config())
    assert isinstance(network, Prior)
    tensors, _ = read_tensors(path)
    if not any(key.startswith("net.") for key in tensors):
        raise ValueError(
            f"{str(path)!r} is no prior of DALLE2-pytorch: expected tensors below net., in ema_model, in"
            " model or at the top level"
        )
    state = {
        key.removeprefix("net."): value
        for key, value in tensors.items()
        if not key.startswith(("noise_scheduler.", "clip."))
    }
    fill_network(network, state, "original", source=path, dtype=dtype)
    return network
