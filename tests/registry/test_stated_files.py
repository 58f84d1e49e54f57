"""What a single file states about itself is followed, compared, or refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import reduced_families
import torch

import ldm
from ldm.diffusion.schedule import NoiseSchedule
from ldm.registry.inspection import inspect
from ldm.weights.formats.safetensors import read_header, read_safetensors, write_safetensors

MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
STATISTICS = {"edm_mean": torch.tensor(MEAN)[None, :, None, None], "edm_std": torch.tensor(STD)}
ONE = torch.zeros(1)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, torch.Tensor], Path]:
    """Return a reduced SDXL pipeline, the content of its single file, and a folder."""
    torch.set_grad_enabled(False)
    place = tmp_path_factory.mktemp("sdxl")
    pipe = reduced_families.load(reduced_families.register("sdxl-base", place).name)
    path = ldm.save(pipe, place / "one.safetensors", layout="original")
    return pipe, dict(read_safetensors(path)), place


@pytest.fixture
def write(sdxl: tuple[Any, dict[str, torch.Tensor], Path], tmp_path: Path) -> Any:
    """Return a function that writes the file with further tensors and metadata."""

    def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
        write_safetensors(tmp_path / "file.safetensors", sdxl[1] | tensors, metadata)
        return tmp_path / "file.safetensors"

    return written


def load(path: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return reduced_families.load("tiny-sdxl-base", weights=path, **options)


def draw(pipe: Any) -> torch.Tensor:
    return pipe.text_to_image("a red apple", steps=3, guidance=3.0, progress=False).tensor


def test_the_markers_of_playground_are_followed(sdxl: Any, write: Any, tmp_path: Path) -> None:
    """The file is the same model as a folder with EDM's scheduler and the statistics in its autoencoder."""
    pipe = load(write(STATISTICS))
    assert pipe.card.schedule.sigmas == (0.002, 80.0, 0.5) and pipe.latent_scale == 1.0
    assert pipe.card.latent_mean == pytest.approx(MEAN) and pipe.card.latent_std == pytest.approx(STD)
    folder = ldm.save(sdxl[0], tmp_path / "folder", layout="diffusers")
    scheduler = {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    del index["_ldm_sha256"]  # the configurations are changed
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    config |= {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5}
    (folder / "vae" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert torch.allclose(draw(pipe), draw(load(folder)), atol=1e-5)
    assert not torch.allclose(draw(pipe), draw(sdxl[0]), atol=1e-2)


def test_the_markers_of_cosxl_are_followed(write: Any) -> None:
    levels = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor([0.002])}
    pipe = load(write(levels))
    assert pipe.card.schedule.sigmas == pytest.approx((0.002, 120.0, 1.0))
    assert pipe.denoiser.prediction == "v" and pipe.latent_scale == 0.13025
    # it reads ln(s)/4, and its levels reach from one end to the other
    time = pipe.denoiser.schedule.network_time(torch.tensor([0.0, 999.0]))
    assert time.tolist() == pytest.approx(
        [torch.tensor(s).log().item() / 4 for s in (0.002, 120.0)], rel=1e-5
    )
    weight = pipe.denoiser.net.conv_out.weight
    assert torch.equal(weight, reduced_families.load("tiny-sdxl-base").denoiser.net.conv_out.weight)
    negated = load(write(STATISTICS)).denoiser.net.conv_out
    assert torch.equal(negated.weight, -weight)
    with pytest.raises(ValueError, match="prediction 'eps': the weights state an EDM schedule, expected 'v'"):
        load(write(levels), prediction="eps")


@pytest.mark.parametrize(
    ("tensors", "metadata", "prediction", "zero"),
    [
        ({}, {"modelspec.predict_key": "v"}, "v", False),
        ({}, {"ss_v_parameterization": "True"}, "v", False),
        ({}, {"ss_v_parameterization": "None"}, "eps", False),
        ({"v_pred": ONE}, {"ss_zero_terminal_snr": "True"}, "v", True),
        ({}, {"ss_zero_terminal_snr": "False", "modelspec.resolution": "1024x1024"}, "eps", False),
        ({"v_pred": ONE}, {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, "v", False),
    ],
)
def test_predictions_are_followed(
    write: Any, tensors: dict[str, torch.Tensor], metadata: dict[str, str], prediction: str, zero: bool
) -> None:
    pipe = load(write(tensors, metadata))
    assert pipe.denoiser.prediction == prediction and pipe.card.schedule.zero_terminal_snr is zero


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (
            {"v_pred": ONE},
            {"ss_v_parameterization": "False"},
            "v_pred and ss_v_.* contradict each other; pass",
        ),
        ({}, {"modelspec.prediction_type": "v", "modelspec.predict_key": "epsilon"}, "contradict each other"),
        (
            {},
            {"modelspec.prediction_type": "\x1b[31mflow"},
            r"prediction_type '\\x1b.*expected one of 'epsilon'",
        ),
        (
            {"edm_mean": STATISTICS["edm_mean"]},
            {},
            "the key edm_mean, and of edm_mean and edm_std not the other",
        ),
        ({**STATISTICS, "edm_std": torch.zeros(4)}, {}, "edm_std: expected a positive number"),
        (
            {**STATISTICS, "edm_mean": torch.full((4,), float("nan"))},
            {},
            "edm_mean: expected a finite number",
        ),
        ({**STATISTICS, "edm_mean": torch.zeros(3)}, {}, "latent_mean: expected 4 numbers"),
        ({**STATISTICS, "ztsnr": ONE}, {}, "an EDM schedule and zero terminal SNR"),
        ({"edm_vpred.sigma_max": torch.ones(2)}, {}, r"edm_vpred.sigma_max: expected one number"),
        ({"edm_vpred.sigma_max": torch.tensor(1e-4)}, {}, "expected 0 < sigma_min < sigma_max"),
        ({"scale_factor": torch.tensor(0.0)}, {}, "scale_factor: expected a positive number"),
        ({"scale_factor": torch.tensor(float("nan"))}, {}, "scale_factor: expected a finite number"),
        ({"scale_factor": torch.ones(2)}, {}, "scale_factor"),
        ({"betas": torch.ones(1000)}, {}, "betas are not those of the card's schedule"),
        ({"alphas_cumprod": torch.linspace(1, 0, 10)}, {}, "alphas_cumprod are not those"),
    ],
)
def test_statements_that_cannot_be_followed_are_refused(
    write: Any, tensors: dict[str, torch.Tensor], metadata: dict[str, str], message: str
) -> None:
    path = write(tensors, metadata)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_the_user_decides_between_contradictions(write: Any) -> None:
    path = write({"v_pred": ONE}, {"ss_v_parameterization": "False"})
    assert load(path, prediction="v").denoiser.prediction == "v"
    assert load(path, prediction="eps").denoiser.prediction == "eps"


@pytest.mark.parametrize(
    "metadata",
    [
        {"modelspec.architecture": "stable-diffusion-v1"},
        {"modelspec.architecture": "stable-diffusion-xl-v1-refiner"},
        {"ss_base_model_version": "sd_v2"},
        {"ss_v2": "True"},
    ],
)
def test_another_family_in_the_metadata_is_reported(write: Any, metadata: dict[str, str]) -> None:
    (name,) = metadata
    with pytest.warns(UserWarning, match=rf"its metadata state {name} .*, its keys are those of sdxl"):
        reduced_families.load("tiny-sdxl-base", weights=write({}, metadata))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tables_of_the_schedule_are_compared(write: Any, dtype: torch.dtype) -> None:
    """A file with the tables of its training says nothing new; one with rescaled tables is followed."""
    schedule = NoiseSchedule.scaled_linear()
    rescaled = schedule.zero_terminal_snr()
    for name in ("alphas_cumprod", "betas"):
        plain = load(write({name: getattr(schedule, name).to(dtype)}))
        assert not plain.card.schedule.zero_terminal_snr
        followed = load(write({name: getattr(rescaled, name).to(dtype), "v_pred": ONE}))
        assert followed.card.schedule.zero_terminal_snr


def test_a_model_that_follows_a_file_is_written_with_its_markers(write: Any, tmp_path: Path) -> None:
    for tensors, metadata, options in (
        ({"v_pred": ONE, "ztsnr": ONE}, {}, {}),
        ({}, {}, {"prediction": "v"}),
        ({}, {}, {"prediction": "x0"}),
    ):
        pipe = load(write(tensors, metadata), **options)
        again = load(ldm.save(pipe, tmp_path / "again.safetensors", layout="original"))
        assert again.card == pipe.card
    assert read_header(tmp_path / "again.safetensors")[1]["modelspec.prediction_type"] == "sample"


def test_inspection_shows_markers_and_metadata(write: Any) -> None:
    metadata = {"modelspec.prediction_type": "v", "modelspec.resolution": "1024x1024"}
    report = inspect(write({"v_pred": ONE, "ztsnr": ONE}, metadata), digest=False)
    for line in (
        "v_pred = 0.0 (followed: the network predicts v)",
        "ztsnr = 0.0 (followed: zero terminal SNR)",
        "modelspec.prediction_type = v (followed: the prediction)",
        "modelspec.resolution = '1024x1024' (ignored: the card and the call state the size)",
    ):
        assert line in report.stated and line in report.text(), line
    wrong = inspect(write({"v_pred": ONE}, {"modelspec.prediction_type": "epsilon"}), digest=False)
    assert any("contradict each other" in problem for problem in wrong.problems)
