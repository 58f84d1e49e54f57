"""What folders and files of unCLIP models state is compared with the card, and refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers_unclip_pipelines as peers
import pytest
import torch
from test_unclip_sources import single_file
from tiny_unclip import tiny_kandinsky, tiny_karlo, tiny_stable

from ldm.weights.formats.safetensors import read_safetensors, write_safetensors

Folders = dict[str, tuple[Any, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Write Karlo, Stable unCLIP for images and Kandinsky 2.2's prior with diffusers."""
    torch.set_grad_enabled(False)
    place = tmp_path_factory.mktemp("unclip")
    made = {
        "karlo": (tiny_karlo(), peers.karlo),
        "stable": (tiny_stable(), peers.stable_unclip_img2img),
        "kandinsky": (tiny_kandinsky(), peers.kandinsky_prior),
    }
    for name, (pipe, make) in made.items():
        make(pipe, place).save_pretrained(place / name / "prior" if name == "kandinsky" else place / name)
    peers.kandinsky22(made["kandinsky"][0]).save_pretrained(place / "kandinsky" / "decoder")
    return {name: (pipe, place / name) for name, (pipe, _) in made.items()}


@pytest.fixture
def edited(folders: Folders, tmp_path: Path) -> Any:
    """Return a function that changes fields of a file in a copy of a folder, and returns model and copy."""

    def change(model: str, file: str, **changes: Any) -> tuple[Any, Path]:
        pipe, folder = folders[model]
        copy = Path(shutil.copytree(folder, tmp_path / model, dirs_exist_ok=True))
        path = copy / file.replace("*", "scheduler_config.json")
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
        return pipe, copy

    return change


@pytest.mark.parametrize("model", ["karlo", "stable", "kandinsky"])
def test_what_diffusers_writes_is_read_without_a_warning(folders: Folders, model: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peers.load_folder(*folders[model])


@pytest.mark.parametrize(
    ("model", "file", "changes", "message"),
    [
        (
            "karlo",
            "prior_scheduler/*",
            {"beta_schedule": "linear"},
            "beta_schedule linear",
        ),
        ("karlo", "super_res_scheduler/*", {"num_train_timesteps": 10}, "num_train_time"),
        ("karlo", "decoder/config.json", {"resnet_time_scale_shift": "default"}, "resnet_time_scale_shift"),
        (
            "karlo",
            "decoder/config.json",
            {"class_embed_type": None},
            "class_embed_type None, expected",
        ),
        ("karlo", "prior/config.json", {"norm_in_type": "layer"}, "norm_in_type layer"),
        ("karlo", "super_res_last/config.json", {"norm_eps": 1e-6}, "norm_eps 1e-06"),
        ("karlo", "text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("karlo", "tokenizer/tokenizer_config.json", {"do_lower_case": False}, "do_lower_case False"),
        (
            "stable",
            "image_noising_scheduler/*",
            {"beta_schedule": "linear"},
            "of the noise",
        ),
        ("stable", "image_encoder/config.json", {"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06"),
        ("stable", "feature_extractor/preprocessor_config.json", {"image_mean": [0, 0, 0]}, "image_mean"),
        (
            "stable",
            "vae/config.json",
            {"latents_mean": [0] * 4, "latents_std": [1] * 4},
            "latents_mean",
        ),
        ("stable", "vae/config.json", {"scaling_factor": "large"}, "scaling_factor|finite"),
        ("stable", "unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type timestep"),
        ("kandinsky", "prior/image_processor/preprocessor_config.json", {"resample": 2}, "resample 2"),
        (
            "kandinsky",
            "decoder/unet/config.json",
            {"addition_embed_type": "text"},
            "addition_embed_type",
        ),
        (
            "kandinsky",
            "decoder/movq/config.json",
            {"lookup_from_codebook": True},
            "lookup_from_code",
        ),
        ("kandinsky", "decoder/scheduler/*", {"beta_end": 0.02}, "beta_end 0.02"),
    ],
)
def test_another_model_is_refused_by_name(
    edited: Any, model: str, file: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        peers.load_folder(*edited(model, file, **changes))


@pytest.mark.parametrize(
    ("model", "file", "changes", "message"),
    [
        (
            "karlo",
            "prior_scheduler/*",
            {"clip_sample_range": 3.0},
            "clip_sample_range 3.0",
        ),
        ("karlo", "decoder_scheduler/*", {"clip_sample": False}, "clip_sample False"),
        ("kandinsky", "decoder/scheduler/*", {"thresholding": True}, "thresholding True"),
        ("stable", "unet/config.json", {"new_field": "on"}, "new_field on"),
    ],
)
def test_another_sampling_is_reported(
    edited: Any, model: str, file: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        peers.load_folder(*edited(model, file, **changes))


def test_the_padding_of_the_decoders_texts_is_followed(edited: Any) -> None:
    pipe, path = edited("stable", "tokenizer/tokenizer_config.json", pad_token="<|endoftext|>")
    assert peers.load_folder(pipe, path).card.words.pad == 49407 != pipe.card.words.pad


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"modelspec.prediction_type": "epsilon"}, "states prediction 'eps'"),
        ({"ztsnr": torch.zeros(1)}, {}, "states zero terminal SNR"),
        ({"edm_vpred.sigma_max": torch.ones(1)}, {}, "states an EDM schedule"),
        ({"betas": torch.full((1000,), 0.01)}, {}, "its betas are not those of the card's schedule"),
    ],
)
def test_a_single_file_of_another_training_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], message: str
) -> None:
    pipe = tiny_stable()
    path = single_file(pipe, tmp_path / "sd21-unclip-l.safetensors")
    write_safetensors(path, {**read_safetensors(path), **tensors}, metadata)
    with pytest.raises(ValueError, match=message):
        peers.load_folder(pipe, path)
