"""Averages of any width: the profile in closed form, the combination, and a run's files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from photos import write_photos
from tiny_latent_diffusion import tiny_model
from tiny_trainings import run, write

import ldm
from ldm.__main__ import main
from ldm.training.power_averages import (
    Profile,
    average_of_width,
    combination,
    exponent,
    inner_product,
    power_decay,
    relative_width,
    snapshot_file,
    write_snapshot,
)
from ldm.training.run import open_run
from ldm.weights.formats.safetensors import read_safetensors, write_safetensors


def average(weights: np.ndarray, gamma: float) -> np.ndarray:
    """Return the averages after each step of weights (T, D)."""
    kept, shadow = [], np.zeros(weights.shape[1])
    for step, each in enumerate(weights, start=1):
        d = power_decay(step, gamma)
        shadow = d * shadow + (1 - d) * each
        kept.append(shadow)
    return np.array(kept)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_the_width_is_the_relative_standard_deviation_of_the_profile(width):
    gamma, n = exponent(width), 20_000
    assert relative_width(gamma) == pytest.approx(width, rel=1e-9)
    tau = (np.arange(n) + 0.5) / n
    p = (gamma + 1) * tau**gamma
    mean = (p * tau).mean()
    assert np.sqrt((p * (tau - mean) ** 2).mean()) == pytest.approx(width, rel=1e-4)


def test_exponents_of_the_paper():
    """Karras et al. 2024, section 3.1: widths 0.05 and 0.10 are exponents 16.97 and 6.94."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


def test_an_average_weighs_by_its_profile():
    """The weight of step k in the average after t steps is (k^(γ+1) − (k − 1)^(γ+1))/t^(γ+1)."""
    gamma, t = 3.7, 40
    found = average(np.eye(t), gamma)[-1]
    k = np.arange(1, t + 1)
    np.testing.assert_allclose(found, (k ** (gamma + 1) - (k - 1) ** (gamma + 1)) / t ** (gamma + 1))


@pytest.mark.parametrize("a, b", [((10, 6.9), (10, 17.0)), ((7, 6.9), (12, 3.0)), ((12, 3.0), (7, 6.9))])
def test_inner_products_are_integrals(a, b):
    n = 200_000
    tau = (np.arange(n) + 0.5) * 12 / n
    p, q = (np.where(tau <= t, (gamma + 1) * (tau / t) ** gamma / t, 0) for t, gamma in (a, b))
    assert inner_product(Profile(*a), Profile(*b)) == pytest.approx((p * q).sum() * 12 / n, rel=1e-4)


def test_a_kept_average_is_its_own_combination():
    kept = [Profile(step, exponent(width)) for step in (100, 200, 300) for width in (0.05, 0.1)]
    factors = combination(kept, kept[4])
    np.testing.assert_allclose(factors, np.eye(6)[4], atol=1e-6)


@pytest.mark.parametrize("width", [0.06, 0.08, 0.15])
def test_any_width_is_reconstructed(tmp_path, width):
    """Along a random walk, the reconstructed average is near the one that was computed while it ran."""
    steps = 800
    weights = 0.05 * np.random.default_rng(0).standard_normal((steps, 50)).cumsum(0)
    tracks = {each: average(weights, exponent(each)) for each in (0.05, 0.1)}
    for step in range(50, steps + 1, 50):
        write_snapshot(
            tmp_path,
            step,
            {each: {"w": torch.from_numpy(track[step - 1])} for each, track in tracks.items()},
        )
    exact = average(weights, exponent(width))
    for step in (400, None):
        found = average_of_width(tmp_path, width, step=step)["w"].numpy()
        wanted = exact[(step or steps) - 1]
        error = np.linalg.norm(found - wanted)
        nearest = min(np.linalg.norm(track[(step or steps) - 1] - wanted) for track in tracks.values())
        assert error < 0.05 * nearest and error < 0.01 * np.linalg.norm(wanted)


def test_what_cannot_be_reconstructed_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run.widths"):
        average_of_width(tmp_path, 0.1)
    write_snapshot(tmp_path, 5, {0.05: {"w": torch.ones(1)}, 0.1: {"w": torch.ones(1)}})
    with pytest.raises(ValueError, match="between 0 and 0.2887, got 0.3"):
        average_of_width(tmp_path, 0.3)
    with pytest.raises(ValueError, match="step 3: expected at least 5"):
        average_of_width(tmp_path, 0.1, step=3)


def test_a_damaged_file_is_named_and_an_old_one_is_read_with_a_warning(tmp_path):
    averages = {each: {"w": torch.full((100,), each), "b": torch.ones(3)} for each in (0.05, 0.1)}
    for step in (5, 10):
        write_snapshot(tmp_path, step, averages)
    path = snapshot_file(tmp_path, 5)
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"0000005.safetensors' is damaged \('0\.\d+/[bw]' differs from its SHA"
    ):
        average_of_width(tmp_path, 0.1)
    write_safetensors(path, read_safetensors(snapshot_file(tmp_path, 10)))
    with pytest.warns(UserWarning, match=r"0000005.safetensors' has no hashes of its averages"):
        average_of_width(tmp_path, 0.1)


def test_a_run_exports_the_average_of_any_width(tmp_path, monkeypatch):
    """The file of a width that was kept is that average; another width lies near what its EMA would be."""
    monkeypatch.chdir(tmp_path)
    ldm.save(tiny_model(), tmp_path / "model")
    write_photos(tmp_path / "photos", 8)
    options = {"steps": 8, "widths": [0.05, 0.1], "widths_every": 3, "ema_on_cpu": True}
    config = {
        "part": "fine-tune",
        "weights": "model",
        "data": {"kind": "folder", "path": "photos", "size": 32},
        "run": run("tuned", **options),
    }
    path = write(config, tmp_path / "tuned.yaml")
    open_run(path).train(until=4, progress=False)
    resumed = open_run(path)
    resumed.train(progress=False)
    files = sorted(each.name for each in (tmp_path / "runs/tuned/averages").iterdir())
    assert files == ["0000003.safetensors", "0000006.safetensors", "0000008.safetensors"]
    found = average_of_width(tmp_path / "runs/tuned", 0.1)
    for name, value in resumed.ema.widths[0.1].items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=1e-4)
    assert main(["export", str(path), "--width", "0.08"]) == 0
    exported = ldm.load(weights=tmp_path / "runs/tuned/export-0.08", dtype="float32")
    wanted = average_of_width(tmp_path / "runs/tuned", 0.08)
    state = exported.networks()["unet"].state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(state[name.removeprefix("unet.")], value, rtol=2e-3, atol=1e-4)
    assert main(["export", str(path), "--step", "6"]) == 2
