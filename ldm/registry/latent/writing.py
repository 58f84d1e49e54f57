"""Write latent diffusion models in ldm layout, as a single file in the original layout, or for diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.catalog.cards import ModelCard
from ldm.catalog.families import COND_PREFIX, FAMILIES
from ldm.catalog.lookup import known_cards
from ldm.conditioning.bert import BertConditioner
from ldm.conditioning.conditioner import TextConditioner
from ldm.conditioning.exemplars import ExemplarConditioner
from ldm.models.clip.towers import TextConfig, TextTower
from ldm.models.text.bert import BertConfig
from ldm.models.text.bpe import EOT, all_symbols, merges
from ldm.models.unet import UNetConfig
from ldm.pipelines.latent import LatentDiffusion
from ldm.support.files import write_atomically
from ldm.weights.formats.diffusers_config import (
    bert_config,
    scheduler_config,
    text_config,
    training_facts,
    unet_config,
    vae_config,
)
from ldm.weights.formats.diffusers_hashes import HASHES_KEY, PIPELINE_INDEX, folder_hashes
from ldm.weights.formats.exemplar_file import write_library
from ldm.weights.formats.ldm_folder import narrow, write_part, write_vocabulary
from ldm.weights.formats.ldm_model import write_card
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import to_layout

PREDICTION_NAMES = {"eps": "epsilon", "v": "v", "x0": "sample"}  # of modelspec.prediction_type
LAYOUTS = ("native", "original", "diffusers")
WITH_SAFETY_CHECKER = ("sd1", "sd2", "sd1-inpainting", "sd2-inpainting", "sd1-lcm", "instruct-pix2pix")
DIFFUSERS_PIPELINES = {  # family: class of the pipeline in diffusers
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd1-inpainting": "StableDiffusionInpaintPipeline",
    "sd2-inpainting": "StableDiffusionInpaintPipeline",
    "instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline",
    "sd1-lcm": "LatentConsistencyModelPipeline",
    "sd-x4-upscaler": "StableDiffusionUpscalePipeline",
    "sd2-depth": "StableDiffusionDepth2ImgPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-lcm": "StableDiffusionXLPipeline",
    "sdxl-inpainting": "StableDiffusionXLInpaintPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "ldm-text2img-large": "LDMTextToImagePipeline",
    "ldm-text2img256": "LDMTextToImagePipeline",
    "ldm-uncond256": "LDMPipeline",
    "ldm-bsr-sr": "LDMSuperResolutionPipeline",
}


def write_ldm(
    pipe: LatentDiffusion, folder: Path, dtype: torch.dtype | None, facts: Mapping[str, Any]
) -> Path:
    """Write a folder in ldm layout: each network with its YAML, the tokenizer's vocabulary, and the card.

    Parts that the model shares with another one are written too.

    Args:
        pipe: The model.
        folder: The folder to write.
        dtype: Floating-point type of the weights; None keeps each network's own.
        facts: Entries that are added to every part's YAML.

    Returns:
        The folder.
    """
    for part, network in pipe.networks().items():
        extra = {"latent_scale": pipe.latent_scale} if part == "vae" else {}
        if part == "layout":
            extra = {"layout_steps": pipe.text.layout_steps}
        write_part(folder, part, network, network.config, dtype=dtype, **extra, **facts)
    text = pipe.text
    if isinstance(text, ExemplarConditioner):
        write_library(folder, text.library)
        text = text.text
    if isinstance(text, TextConditioner):
        write_vocabulary(folder, text.tokenizer, text.known_words)
    elif isinstance(text, BertConditioner):
        write_word_pieces(folder, text)
    write_card(folder, replace(pipe.card, parts={}))
    return folder


def write_word_pieces(folder: Path, text: BertConditioner) -> None:
    """Write BERT's vocab.txt, one token per line."""
    lines = "".join(f"{token}\n" for token in text.tokenizer.vocabulary)
    write_atomically(folder / "vocab.txt", lines.encode())


def write_original(pipe: LatentDiffusion, path: Path, dtype: torch.dtype | None) -> Path:
    """Write a single .safetensors file in the layout of the model's authors, each part below its prefix.

    Args:
        pipe: The model.
        path: The file to write.
        dtype: Floating-point type of the weights; None keeps each network's own.

    Returns:
        The file.

    Raises:
        ValueError: If the name does not end in .safetensors, or the layout cannot hold a network.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{str(path)!r}: the original layout is written as safetensors, expected a name that ends in"
            " .safetensors"
        )
    family = FAMILIES[pipe.card.family]
    markers, metadata = sampling_markers(pipe.card)
    state: dict[str, Tensor] = {}
    for part, network in pipe.networks().items():
        # LDM's inpainting model encodes the masked image with a copy of the autoencoder
        copies = (COND_PREFIX,) if part == "vae" and f"{COND_PREFIX}*" in family.unneeded else ()
        prefix = family.parts[part]
        inner = to_layout(network, "original", hugging_face=prefix.endswith("transformer."))
        for place in (prefix, *copies):
            state |= {place + key: narrow(place + key, tensor, dtype) for key, tensor in inner.items()}
    if pipe.latent_scale != pipe.card.latent_scale:
        state["scale_factor"] = torch.tensor(pipe.latent_scale, dtype=torch.float64, device="cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, state | markers, {"format": "pt", **metadata})
    return path


def sampling_markers(card: ModelCard) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the keys and the metadata that state where a card differs from the known card of its name.

    Raises:
        ValueError: If the layout has no marker for the difference.
    """
    known = known_cards().get(card.name, card)
    assert isinstance(known, ModelCard)
    if replace(known.schedule, zero_terminal_snr=card.schedule.zero_terminal_snr) != card.schedule or (
        (known.latent_mean, known.latent_std, known.text.pad, known.zero_negative)
        != (card.latent_mean, card.latent_std, card.text.pad, card.zero_negative)
    ):
        raise ValueError(
            f"layout 'original' cannot state the schedule, the latents or the texts by which these weights"
            f" differ from the card {card.name!r}: expected 'native' or 'diffusers'"
        )
    marker, keys = torch.zeros(0, device="cpu", dtype=torch.float32), dict[str, Tensor]()
    metadata: dict[str, str] = {}
    if card.prediction != known.prediction:
        metadata["modelspec.prediction_type"] = PREDICTION_NAMES[card.prediction]
        keys |= (
            {"v_pred": torch.zeros(0, device="cpu", dtype=torch.float32)} if card.prediction == "v" else {}
        )
    if card.schedule.zero_terminal_snr and not known.schedule.zero_terminal_snr:
        keys["ztsnr"] = marker
    return keys, metadata


def write_diffusers(pipe: LatentDiffusion, folder: Path, dtype: torch.dtype | None) -> Path:
    """Write a folder in diffusers layout.

    model_index.json is written last, so that an interrupted folder is not taken for a model. It states the
    SHA-256 of all other files.

    Args:
        pipe: The model.
        folder: The folder to write, which is empty.
        dtype: Floating-point type of the weights; None keeps each network's own.

    Returns:
        The folder.

    Raises:
        ValueError: Before anything is written, if diffusers has no pipeline or no network for the model.
    """
    card = pipe.card
    if card.family not in DIFFUSERS_PIPELINES:
        raise ValueError(f"{card.name!r}: no pipeline of diffusers takes the family {card.family!r}")
    bert = isinstance(pipe.text, BertConditioner)
    names = {
        "unet": "unet",
        "vae": "vqvae" if bert or pipe.text is None else "vae",  # LDM's pipelines use this name for KL too
        "text": "bert" if bert else "text_encoder",
        "text2": "text_encoder_2",
    }
    side = card.defaults.height // pipe.vae.config.factor
    sigmas = card.schedule.sigmas
    described = {
        part: diffusers_description(network, latent_side=side) for part, network in pipe.networks().items()
    }
    # in an EDM model of diffusers, the latents have the standard deviation of its data
    scale = pipe.latent_scale * (1.0 if sigmas is None else sigmas[2])
    described["vae"] = vae_config(pipe.vae.config, scale, card.latent_mean, card.latent_std)
    index: dict[str, Any] = {"_class_name": DIFFUSERS_PIPELINES[card.family], "_diffusers_version": "0.31.0"}
    for part, network in pipe.networks().items():
        class_name, config = described[part]
        stem = "model" if part in ("text", "text2") else "diffusion_pytorch_model"
        index[names[part]] = [diffusers_library(part, bert=bert), class_name]
        write_component(folder / names[part], network, config, stem, dtype)
    index |= write_schedulers(card, folder)
    index |= write_tokenizers(pipe, folder)
    index |= pipeline_options(card)
    index[HASHES_KEY] = dict(
        folder_hashes(folder, sorted(path for path in folder.rglob("*") if path.is_file()))
    )
    write_json(folder / PIPELINE_INDEX, index)
    return folder


def diffusers_library(part: str, *, bert: bool) -> str:
    """Return the library that model_index.json names for a part; ``bert``: the text encoder is LDM's."""
    if part not in ("text", "text2"):
        return "diffusers"
    return "latent_diffusion" if bert and part == "text" else "transformers"


def write_schedulers(card: ModelCard, folder: Path) -> dict[str, Any]:
    """Write the schedulers' configurations; return their entries of model_index.json."""
    facts, grids = training_facts(card), card.grids()
    trailing = grids.grids.get(card.defaults.sampler, grids.grids["*"]).get("spacing") == "trailing"
    class_name, config = scheduler_config(facts, card.defaults.sampler, trailing=trailing)
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    index: dict[str, Any] = {"scheduler": ["diffusers", class_name]}
    if card.concat == "lowres-noised":
        config = scheduler_config({**facts, "prediction_type": "epsilon"}, "ddpm", trailing=False)[1]
        write_json(folder / "low_res_scheduler" / "scheduler_config.json", config)
        index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
    return index


def pipeline_options(card: ModelCard) -> dict[str, Any]:
    """Return the options of a pipeline and its absent components, as model_index.json states them."""
    index: dict[str, Any] = {}
    if card.family in WITH_SAFETY_CHECKER:
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    if card.text2 is not None:
        index |= {"force_zeros_for_empty_prompt": card.zero_negative}
    if card.vector == "aesthetic":
        index |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    return index


def diffusers_description(
    network: nn.Module, latent_scale: float = 1.0, latent_side: int = 64
) -> tuple[str, dict[str, Any]]:
    """Return the class of a network in diffusers or transformers, and the content of its config.json.

    Args:
        network: The network.
        latent_scale: Scale of the latents, which an autoencoder's configuration states.
        latent_side: Side of the default latent, which a UNet's configuration states.

    Raises:
        ValueError: If no class computes the network.
    """
    config: Any = network.config
    if isinstance(config, UNetConfig):
        return unet_config(config, latent_side)
    if isinstance(config, TextConfig):
        return text_config(config)
    return bert_config(config) if isinstance(config, BertConfig) else vae_config(config, latent_scale)


def write_component(
    folder: Path, network: nn.Module, config: Mapping[str, Any], stem: str, dtype: torch.dtype | None
) -> None:
    """Write the sub-folder of one part.

    Args:
        folder: The sub-folder.
        network: The network.
        config: The content of config.json.
        stem: Name of the weights without ending.
        dtype: Floating-point type of the weights; None keeps the network's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: narrow(key, tensor, dtype) for key, tensor in to_layout(network, "diffusers").items()}
    write_safetensors(folder / f"{stem}.safetensors", state, {"format": "pt"})
    write_json(folder / "config.json", config)


def write_tokenizers(pipe: LatentDiffusion, folder: Path) -> dict[str, list[str]]:
    """Write the tokenizers of the text towers; return their entries of model_index.json."""
    if isinstance(pipe.text, BertConditioner):
        write_word_pieces(folder / "tokenizer", pipe.text)
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": pipe.text.encoder.config.length,
        }
        write_json(folder / "tokenizer" / "tokenizer_config.json", config)
        return {"tokenizer": ["transformers", "BertTokenizer"]}
    found = {}
    pads = {"text": pipe.card.text.pad, "text2": pipe.card.text2.pad if pipe.card.text2 is not None else 0}
    for part, network in pipe.networks().items():
        if isinstance(network, TextTower):
            name = {"text": "tokenizer", "text2": "tokenizer_2"}[part]
            write_clip_tokenizer(folder / name, pads[part], network.config.context_length)
            found[name] = ["transformers", "CLIPTokenizer"]
    return found


def write_clip_tokenizer(folder: Path, pad: int, length: int) -> None:
    """Write CLIP's vocabulary and merges in the layout of Hugging Face.

    Args:
        folder: The folder to write.
        pad: Id of the token that texts are padded with.
        length: Number of tokens that the text tower reads.
    """
    end = "<|endoftext|>"
    # the two special tokens have other names in open_clip's vocabulary
    symbols = [*all_symbols()[:-2], "<|startoftext|>", end]
    write_json(folder / "vocab.json", {symbol: i for i, symbol in enumerate(symbols)})
    write_atomically(folder / "merges.txt", "\n".join(["#version: 0.2", *merges(), ""]).encode())
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": end,
        "pad_token": end if pad == EOT else symbols[pad],
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": length, **special},
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, completely or not at all."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
