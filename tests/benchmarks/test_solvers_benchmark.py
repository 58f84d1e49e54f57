"""Test the benchmark of the solvers: its rules and tables on small inputs, and one complete run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import solver_images
import solver_oracle
import solver_plot
import solvers
import torch
from tiny_latent_diffusion import tiny_model


@pytest.fixture
def tiny(monkeypatch):
    pipe = tiny_model()
    monkeypatch.setattr("ldm.load", lambda name, dtype=None: pipe, raising=False)
    return pipe


def bench(pipe, **options):
    return solver_images.Bench(
        pipe, ["cat", "a red apple"], 2, **{"batch": 3, "guidance": None, "reference_steps": 60, **options}
    )


def test_distance_is_the_mean_of_the_rms_of_each_image():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.cat([torch.full((1, 3, 4, 4), 1 / 255), torch.full((1, 3, 4, 4), 3 / 255)])
    mean, error = solver_images.distance(a, b)
    # standard deviation sqrt(2), divided by sqrt(2 images)
    assert mean == pytest.approx(2, rel=1e-5) and error == pytest.approx(1, rel=1e-5)


def test_the_number_of_steps_fills_the_budget(tiny):
    b = bench(tiny)
    assert b.steps_within(10, "ddim", None) == (10, 10)
    assert b.steps_within(10, "heun", None) == (5, 9)  # 2·5 − 1
    assert b.steps_within(10, "plms", None) == (9, 10)
    assert b.steps_within(700, "ddim", "leading") == (500, 500)


@pytest.mark.parametrize("kind", ["flow", "path"])
def test_distances_to_the_reference_fall_with_more_steps(tiny, kind):
    """Every sampler of a family approaches the family's reference; the reference has distance 0 to itself."""
    b = bench(tiny, batch=4)
    # With trailing spacing, the first step under the cosine schedule goes from sigma/alpha = 8,000 to 12.
    # Heun averages in the slope at its end, and dpm2_a uses the slope at its middle, which is at 12 as well:
    # the error of eps there is multiplied by 8,000.
    calm = {"spacing": "karras", "sigma_max": 80.0}
    b.rules = dataclasses.replace(b.rules, grids={**b.rules.grids, "heun": calm, "dpm2_a": calm})
    reference = b.reference(kind)
    for sampler in solver_images.FLOW if kind == "flow" else solver_images.PATH:
        rows = solver_images.curve(b, sampler, [4, 40], reference, kind=kind)
        assert rows[-1]["distance"] < 0.6 * rows[0]["distance"] or rows[-1]["distance"] < 0.05, rows
    itself = b.make(solver_images.REFERENCE[kind], 60, "trailing")[0]
    assert solver_images.distance(itself, reference)[0] == 0


def test_the_number_of_evaluations_is_the_announced_one(tiny):
    b = bench(tiny, batch=4)
    reference = b.reference("flow")
    for sampler in ("heun", "plms", "dpmpp_sde"):
        (row,) = solver_images.curve(b, sampler, [9], reference, kind="flow")
        assert row["evaluations"] == b.steps_within(9, sampler, None)[1]


def row(sampler, evaluations, distance, spacing=None):
    return {
        "sampler": sampler,
        "spacing": spacing,
        "steps": evaluations,
        "evaluations": evaluations,
        "distance": distance,
        "error": 0.1,
    }


def test_the_recommendation_has_the_fewest_evaluations_then_the_least_distance():
    rows = {
        "flow": [
            row("ddim", 20, 3.9),
            row("heun", 19, 4.1),
            row("unipc", 10, 3.5),
            row("dpmpp_2m", 10, 3.2),
            row("dpm_adaptive", 6, 1.0),
        ],
        "spacing": [row("dpmpp_2m", 10, 2.9, "karras")],
        "path": [row("euler_a", 5, 0.1)],
    }
    chosen = solver_images.recommend(rows, 4.0)
    assert (chosen["sampler"], chosen["spacing"], chosen["evaluations"]) == ("dpmpp_2m", "karras", 10)
    assert solver_images.recommend(rows, 0.5) is None


def test_tables_and_names():
    text = solver_images.table(
        [row("ddim", 5, 9.0), row("ddim", 10, 4.0), row("heun", 9, 3.0)], [5, 10], "sampler"
    ).splitlines()
    assert text[2] == "| ddim | 9.00 | 4.00 |" and text[3] == "| heun | – | 3.00 (9) |"
    curves = solver_plot.merged(
        [row("ddim", 5, 9.0), row("euler", 5, 9.0000001), row("heun", 9, 3.0)], "sampler"
    )
    assert list(curves) == ["ddim = euler", "heun"]
    heights = solver_plot.spread([0.0, 0.01, 0.02, 3.0], 0.5)
    assert all(b - a >= 0.5 - 1e-6 for a, b in zip(heights, heights[1:], strict=False)) and heights[
        3
    ] == pytest.approx(3.0, abs=0.2)


def test_the_rows_of_the_oracle():
    (ddim,) = solver_oracle.deterministic_rows("scaled_linear", (20, 40, 80), ["ddim"])
    assert ddim["slopes"]["karras"][0] == pytest.approx(1, abs=0.15)
    assert all(error > 0 for errors in ddim["errors"].values() for error in errors)
    assert "| ddim | 1 |" in solver_oracle.deterministic_table([ddim], (20, 40, 80))
    (refused,) = solver_oracle.deterministic_rows("scaled_linear", (20, 640), ["euler"])
    assert refused["errors"]["leading"][1] is None  # leading spacing cannot have 640 steps
    rows = solver_oracle.stochastic_rows(500, ["dpmpp_2m_sde"])
    assert len(rows) == 2 and all(item["largest_score"] < 4 for item in rows)
    assert "dpmpp_2m_sde, solver heun" in solver_oracle.stochastic_table(rows)


def test_a_complete_run_prints_tables_and_writes_files(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report, plot = tmp_path / "solvers.json", tmp_path / "solvers.png"
    arguments = (
        "--samplers ddim dpmpp_2m euler_a --oracle-steps 20 40 --samples 200 --budgets 3 6 --spacings lambda"
        " --prompts cat"
    )
    solvers.main([*arguments.split(), "--reference-steps", "30", "--json", str(report), "--plot", str(plot)])
    out, written = capsys.readouterr().out, json.loads(report.read_text(encoding="utf-8"))
    assert "Fewest evaluations" in out and "| ddim |" in out
    rows = written["images"]["emoji-ldm"]["rows"]
    assert {item["sampler"] for item in rows["flow"]} == {"ddim", "dpmpp_2m"} and {
        item["spacing"] for item in rows["spacing"]
    } == {"lambda"}
    assert (
        written["oracle"]["deterministic"]
        and written["oracle"]["stochastic"]
        and written["settings"]["budgets"] == [3, 6]
    )
    assert plot.read_bytes().startswith(b"\x89PNG") and {p.name for p in tmp_path.iterdir()} == {
        "solvers.json",
        "solvers.png",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samplers", "ddin"], "did you mean 'ddim'"),
        (["--spacings", "karas"], "unknown spacing 'karas'"),
        (["--budgets", "0"], "must be positive"),
        (["--oracle-steps", "40", "20"], "must be ascending"),
        (["--json", "nowhere/a.json"], "no such folder"),
        (["--part", "oracle", "--plot", "a.png"], "second part"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        solvers.parse(arguments)
    assert message in capsys.readouterr().err
