"""What folders in diffusers layout state is followed as diffusers follows it, or refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import reduced_families
import torch
from diffusers_pipelines import STEP, assert_equal, gradient_image, random_pipeline, seeded_noise

import ldm
from ldm.pipelines.stages.space import Space
from ldm.registry.inspection import inspect

MEAN, STD = [-0.6, 0.3, 0.2, 0.5], [1.4, 0.8, 1.1, 0.6]
PROMPT = "a red apple"


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(
        json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8"
    )


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Write a reduced SDXL pipeline with diffusers' layout, and return it with its folder."""
    torch.set_grad_enabled(False)
    place = tmp_path_factory.mktemp("sdxl")
    pipe, _ = random_pipeline("sdxl-base", "reduced", place)
    path = ldm.save(pipe, place / "folder", layout="diffusers")
    edit(path / "model_index.json", _ldm_sha256=None)  # the configurations are changed, as by another program
    return pipe, path


@pytest.fixture
def folder(sdxl: tuple[Any, Path]) -> Any:
    """Return a folder whose configurations are restored after the test."""
    path = sdxl[1]
    before = {
        file: file.read_text(encoding="utf-8")
        for file in path.rglob("*.json")
        if file.stat().st_size < 100_000
    }
    yield path
    for file, text in before.items():
        file.write_text(text, encoding="utf-8")


def load(path: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return reduced_families.load("tiny-sdxl-base", weights=path, **options)


def theirs_of(path: Path) -> Any:
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(path)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def draw_theirs(theirs: Any, noise: torch.Tensor, **options: Any) -> torch.Tensor:
    arguments = {
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "output_type": "pt",
    }
    return theirs(PROMPT, latents=noise.clone(), **arguments | options).images


EDM = {"sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 0.5, "num_train_timesteps": 1000}


def write_edm(path: Path, class_name: str = "EDMEulerScheduler", **fields: Any) -> None:
    config = {"_class_name": class_name, **EDM, **fields}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", class_name]
    (path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    edit(path / "vae" / "config.json", latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)


@pytest.mark.parametrize(
    ("class_name", "fields", "sampler"),
    [
        ("EDMEulerScheduler", {"prediction_type": "epsilon"}, "euler"),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_schedule": "exponential"}, "euler"),
        ("EDMEulerScheduler", {"sigma_data": 1.0, "rho": 5.0}, "euler"),
        ("EDMDPMSolverMultistepScheduler", {}, "dpmpp_2m"),
    ],
)
def test_edm_is_followed(folder: Path, class_name: str, fields: dict[str, Any], sampler: str) -> None:
    write_edm(folder, class_name, **fields)
    pipe, theirs = load(folder), theirs_of(folder)
    noise = seeded_noise(pipe, 32)
    ours = pipe.text_to_image(PROMPT, steps=4, guidance=3.0, sampler=sampler, latents=noise, progress=False)
    assert_equal(ours.tensor, draw_theirs(theirs, noise))


def test_edm_starts_from_an_image(folder: Path) -> None:
    write_edm(folder)
    pipe, theirs = load(folder), theirs_of(folder)
    image = gradient_image(32)
    ours = pipe.image_to_image(PROMPT, image, strength=0.5, steps=4, guidance=3.0, seed=5, progress=False)
    grid = pipe.card.grids().grid(pipe.denoiser.schedule, 4, "euler").last(2)
    eps = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    z = theirs.vae.encode(2 * image - 1).latent_dist.mode()
    mean, std = torch.tensor(MEAN)[None, :, None, None], torch.tensor(STD)[None, :, None, None]
    z = (z - mean) * theirs.vae.config.scaling_factor / std
    assert torch.allclose(pipe.stage.encode(image) * 0.5, z, atol=1e-5)  # EDM's data have this deviation
    sigmas = grid.ratio[:-1] * 0.5
    theirs.scheduler.set_timesteps(4)
    assert torch.allclose(sigmas.float(), theirs.scheduler.sigmas[2:4], rtol=1e-5)
    state = (z + sigmas[0] * eps) / (sigmas[0] ** 2 + 0.25) ** 0.5  # the input that EDM's network reads
    assert torch.allclose(grid.add_noise(pipe.stage.encode(image), eps), state.float(), atol=1e-4)
    assert ours.tensor.shape == (1, 3, 32, 32) and ours.tensor.std() > 0.01


def test_a_model_of_edm_is_written_and_read_again(folder: Path, tmp_path: Path) -> None:
    write_edm(folder, sigma_schedule="exponential")
    pipe = load(folder)
    noise = seeded_noise(pipe, 32)
    image = pipe.text_to_image(PROMPT, steps=3, latents=noise, progress=False).tensor
    for layout in ("native", "diffusers"):
        again = load(ldm.save(pipe, tmp_path / layout, layout=layout))
        assert again.card == pipe.card and again.latent_scale == pipe.latent_scale
        assert torch.equal(again.text_to_image(PROMPT, steps=3, latents=noise, progress=False).tensor, image)
    with pytest.raises(ValueError, match="'original' cannot state the schedule"):
        ldm.save(pipe, tmp_path / "one.safetensors", layout="original")
    assert not (tmp_path / "one.safetensors").exists()


def test_statistics_of_the_latents_are_followed(folder: Path) -> None:
    edit(folder / "vae" / "config.json", latents_mean=MEAN, latents_std=STD)
    pipe, theirs = load(folder), theirs_of(folder)
    noise = seeded_noise(pipe, 32)
    ours = pipe.text_to_image(PROMPT, steps=4, guidance=3.0, latents=noise, progress=False)
    assert_equal(ours.tensor, draw_theirs(theirs, noise))


def test_a_shift_of_the_latents_is_followed(folder: Path) -> None:
    edit(folder / "vae" / "config.json", shift_factor=0.7, scaling_factor=0.3)
    pipe = load(folder)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    image = gradient_image(32)
    z = (vae.encode(2 * image - 1).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    assert torch.allclose(pipe.stage.encode(image), z, atol=1e-5)
    theirs = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert (pipe.stage.images.decode(z) - ((theirs + 1) / 2).clamp(0, 1)).abs().max() < STEP
    again = pipe.stage.images.unscaled(z)
    assert torch.allclose(again, z / 0.3 + 0.7, atol=1e-6)


@pytest.mark.parametrize("zero", [True, False])
def test_zeros_for_an_empty_prompt_are_followed(folder: Path, zero: bool) -> None:
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=zero)
    pipe, theirs = load(folder), theirs_of(folder)
    assert pipe.card.zero_negative is zero
    noise = seeded_noise(pipe, 32)
    ours = pipe.text_to_image(PROMPT, steps=3, guidance=6.0, latents=noise, progress=False)
    assert_equal(ours.tensor, draw_theirs(theirs, noise, num_inference_steps=3, guidance_scale=6.0))


def test_absent_options_have_the_peers_defaults(folder: Path) -> None:
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=None)
    assert load(folder).card.zero_negative is True


TRAININGS: dict[str, dict[str, Any]] = {
    "prediction": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.015},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "steps": {"num_train_timesteps": 500},
    "zero": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("name", TRAININGS)
def test_the_training_that_a_scheduler_states_is_followed(folder: Path, name: str) -> None:
    """Compare DDIM, whose table diffusers keeps as it is, on a grid that ends at clean data."""
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
        **TRAININGS[name],
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.warns(UserWarning, match=r"timestep_spacing trailing, expected leading: pass spacing="):
        pipe = reduced_families.load("tiny-sdxl-base", weights=folder)
    theirs, noise = theirs_of(folder), seeded_noise(pipe, 32)
    ours = pipe.text_to_image(
        PROMPT, steps=4, guidance=3.0, sampler="ddim", spacing="trailing", latents=noise, progress=False
    )
    assert_equal(ours.tensor, draw_theirs(theirs, noise))


def test_fields_that_are_absent_mean_the_peers_defaults(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text("{}", encoding="utf-8")
    schedule = load(folder).card.schedule
    assert (schedule.kind, schedule.beta_start, schedule.beta_end) == ("linear", 0.0001, 0.02)


def test_betas_in_a_list_are_compared(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    betas = load(folder).denoiser.schedule.betas.tolist()
    edit(path, trained_betas=betas)
    assert load(folder).card.schedule.kind == "scaled_linear"
    edit(path, trained_betas=[beta * 1.01 for beta in betas])
    with pytest.raises(ValueError, match=r"trained_betas \[.*, expected those of the card's schedule"):
        load(folder)


def test_an_unlimited_scheduler_is_read(folder: Path) -> None:
    """A scheduler that diffusers writes with -Infinity in it."""
    theirs = diffusers.DPMSolverMultistepScheduler.from_pretrained(folder / "scheduler")
    theirs.save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    assert "Infinity" in (folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    assert load(folder).card.schedule.kind == "scaled_linear"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
            "class FlowMatchEulerDiscreteScheduler",
        ),
        ({"_class_name": "ScoreSdeVeScheduler"}, "class ScoreSdeVeScheduler"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas True, expected False"),
        ({"prediction_type": "flow_prediction"}, "prediction_type flow_prediction, expected one of"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule sigmoid, expected one of linear"),
        ({"timestep_type": "continuous"}, "timestep_type continuous, expected discrete"),
        ({"num_train_timesteps": 1.5}, "num_train_timesteps: expected a whole number"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000, expected at most"),
        ({"beta_start": "0.1"}, "beta_start: expected a finite number"),
        ({"beta_end": 2.0}, "betas must lie in"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr: expected true or false"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "prediction_type sample"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0}, "sigma_data: expected a positive number"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 90.0}, "expected 0 < sigma_min < sigma_max"),
        ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "cosine"}, "sigma_schedule cosine"),
    ],
)
def test_a_training_that_cannot_be_followed_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    if "_class_name" in changes:
        edit(folder / "model_index.json", scheduler=["diffusers", changes["_class_name"]])
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_sample": True}, "clip_sample True, expected False"),
        ({"thresholding": True}, "thresholding True, expected False"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 100}, "original_inference_steps 100"),
        ({"a_new_field": 3}, "a_new_field 3"),
        ({"_class_name": "BrandNewScheduler"}, "the class BrandNewScheduler is not known"),
    ],
)
def test_another_sampling_is_reported(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    if "_class_name" in changes:
        edit(folder / "model_index.json", scheduler=["diffusers", changes["_class_name"]])
    with pytest.warns(UserWarning, match=message):
        reduced_families.load("tiny-sdxl-base", weights=folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet", {"act_fn": "mish"}, "does not fit the unet: act_fn mish, expected silu"),
        ("unet", {"norm_eps": 1e-6}, "norm_eps 1e-06, expected 1e-05"),
        ("unet", {"attention_type": "gated"}, "attention_type gated"),
        ("vae", {"act_fn": "mish"}, "does not fit the vae: act_fn mish"),
        ("vae", {"use_quant_conv": False}, "use_quant_conv False"),
        ("vae", {"latents_mean": MEAN}, "latents_mean and latents_std: expected both"),
        ("vae", {"latents_mean": MEAN[:2], "latents_std": STD}, "latents_mean: expected 4 numbers"),
        (
            "vae",
            {"latents_mean": MEAN, "latents_std": [0, 1, 1, 1]},
            "latents_std: expected positive numbers",
        ),
        (
            "vae",
            {"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1},
            "shift_factor and latents_mean",
        ),
        ("vae", {"scaling_factor": 0}, "scaling_factor: expected a positive number"),
        ("vae", {"scaling_factor": "x"}, "scaling_factor: expected a finite number"),
        (
            "text_encoder",
            {"hidden_act": "gelu"},
            "does not fit the text: hidden_act gelu, expected quick_gelu",
        ),
        ("text_encoder", {"num_hidden_layers": 2}, "num_hidden_layers 2, expected 3"),
        ("text_encoder_2", {"layer_norm_eps": 1e-12}, "layer_norm_eps 1e-12, expected 1e-05"),
        ("text_encoder_2", {"eos_token_id": 5}, "eos_token_id 5"),
    ],
)
def test_a_network_that_computes_otherwise_is_refused(
    folder: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    edit(folder / file / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requires_aesthetics_score": True}, "requires_aesthetics_score True, expected False"),
        ({"is_cosxl_edit": True}, "is_cosxl_edit True"),
        ({"force_zeros_for_empty_prompt": "no"}, "force_zeros_for_empty_prompt no"),
    ],
)
def test_options_of_another_model_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "model_index.json", **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_component_that_is_not_loaded_is_reported(folder: Path) -> None:
    edit(folder / "model_index.json", controlnet=["diffusers", "ControlNetModel"], add_watermarker=True)
    with pytest.warns(UserWarning, match="names the component controlnet"):
        reduced_families.load("tiny-sdxl-base", weights=folder)


def test_the_padding_of_a_tokenizer_is_followed(folder: Path) -> None:
    edit(folder / "tokenizer" / "special_tokens_map.json", pad_token="!")
    pipe, theirs = load(folder), theirs_of(folder)
    assert pipe.card.text.pad == 0 == theirs.tokenizer.pad_token_id
    noise = seeded_noise(pipe, 32)
    ours = pipe.text_to_image(PROMPT, steps=3, guidance=6.0, latents=noise, progress=False)
    assert_equal(ours.tensor, draw_theirs(theirs, noise, num_inference_steps=3, guidance_scale=6.0))
    edit(folder / "tokenizer" / "tokenizer_config.json", added_tokens_decoder={}, pad_token="<|endoftext|>")
    assert load(folder).card.text.pad == 49407  # then the other file is not read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_max_length": 248}, "model_max_length 248, expected 77"),
        ({"do_lower_case": False}, "do_lower_case False"),
        ({"bos_token": "[CLS]"}, r"bos_token '\[CLS\]'"),
        ({"tokenizer_class": "T5Tokenizer"}, "tokenizer_class T5Tokenizer"),
        ({"pad_token": "no such token"}, "is not a token of CLIP's vocabulary"),
    ],
)
def test_another_tokenizer_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "tokenizer_2" / "special_tokens_map.json").write_text("{}", encoding="utf-8")
    edit(folder / "tokenizer_2" / "tokenizer_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_another_vocabulary_is_refused(folder: Path) -> None:
    path = folder / "tokenizer" / "vocab.json"
    text = path.read_text(encoding="utf-8")
    edit(path, **{"apple</w>": 3055 + 1})
    try:
        with pytest.raises(ValueError, match=r"vocab.json.* is another vocabulary than CLIP's"):
            load(folder)
    finally:
        path.write_text(text, encoding="utf-8")


def test_what_transformers_writes_is_read(folder: Path, tmp_path: Path) -> None:
    theirs_of(folder).save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").card == load(folder).card


def test_a_space_has_a_number_for_each_channel() -> None:
    pipe = reduced_families.load("tiny-sdxl-base")
    with pytest.raises(ValueError, match="latent_mean: expected 4 numbers, one per channel, got 2"):
        Space(pipe.vae, 1.0, (0.0, 1.0))


def test_inspection_shows_what_is_stated_and_what_is_done(folder: Path) -> None:
    write_edm(folder)
    edit(folder / "unet" / "config.json", new_attention="fancy")
    edit(folder / "text_encoder" / "config.json", layer_norm_eps=1e-12)
    report = inspect(folder, digest=False)
    text = report.text()
    for line in (
        "scheduler: EDMEulerScheduler",
        "scheduler: sigma_max = 40.0 (followed: how the network was trained)",
        "model_index.json: force_zeros_for_empty_prompt = True (followed:",
        "vae: latents_mean = [-0.6, 0.3, 0.2, 0.5] (followed:",
        "unet: attention_head_dim = [2, 4] (compared with the card)",
        "unet: new_attention = fancy (unknown:",
    ):
        assert line in text, line
    assert "text_encoder: layer_norm_eps 1e-12, expected 1e-05" in report.problems
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    assert any("FlowMatchEuler" in problem for problem in inspect(folder, digest=False).problems)
