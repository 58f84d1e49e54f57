"""Conventions: grids, first states, image-to-image and noise; through the pipeline and the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_latent_diffusion import tiny_model

import ldm
from ldm.__main__ import main
from ldm.analysis.oracle import gaussian
from ldm.analysis.plan import evaluations
from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.noise import brownian_noise, initial_noise, keyed_noise
from ldm.diffusion.schedule import NoiseSchedule
from ldm.images.files import read_recipe
from ldm.samplers import SAMPLERS
from ldm.samplers.conventions import CONVENTIONS, Convention, get_convention

SCHEDULE = NoiseSchedule.scaled_linear()
# numbers of steps that divide, nearly divide or do not divide 1000
NUMBERS = [*range(1, 41), 50, 90, 100, 101, 125, 250, 333, 334, 499, 500, 501, 899, 900, 901, 998, 999, 1000]


def check(grid: TimeGrid, n: int) -> None:
    t, levels = grid.t.numpy(), grid.ratio.numpy()
    assert len(grid) == n and 0 <= t.min() and t.max() <= 999
    assert (np.diff(t) < 0).all() and (np.diff(levels) < 0).all()


@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_sampler_has_a_grid_or_a_number_of_steps_that_works(name: str) -> None:
    rules, kinds = CONVENTIONS[name], {}
    for sampler in SAMPLERS:  # samplers with the same options have the same grid
        kinds[json.dumps(dict(rules.grids.get(sampler, rules.grids["*"])), sort_keys=True)] = sampler
    for sampler in kinds.values():
        for n in NUMBERS:
            try:
                check(rules.grid(SCHEDULE, n, sampler), n)
            except ValueError as error:
                works = int(str(error).rsplit(" ", 1)[1])
                check(rules.grid(SCHEDULE, works, sampler), works)
                assert n > (50 if "'lcm'" in str(error) else 100), error  # no smaller number is refused


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_in_every_convention(name: str, sampler: str) -> None:
    """With the grid, options, first state and noise of the convention."""
    rules, data, seeds = CONVENTIONS[name], gaussian(dims=3), [5, 6]
    grid, options = rules.grid(SCHEDULE, 6, sampler), rules.options.get(sampler, {})
    _, x = rules.begin(grid, initial_noise(seeds, (3,), dtype=torch.float64))
    out = SAMPLERS[sampler](
        data.denoise(SCHEDULE), x, grid, noise=rules.noise(seeds, grid, sampler, **options), **options
    )
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_one_is_exactly_text_to_image(name: str, sampler: str) -> None:
    """Image-to-image at strength 1 starts from pure noise, so the result does not depend on the image."""
    rules, data, seeds = CONVENTIONS[name], gaussian(dims=3), [5, 6]
    eps = initial_noise(seeds, (3,), dtype=torch.float64)

    def run(image: torch.Tensor | None) -> torch.Tensor:
        grid, x = rules.begin(rules.grid(SCHEDULE, 6, sampler), eps, image, 1.0)
        return SAMPLERS[sampler](data.denoise(SCHEDULE), x, grid, noise=rules.noise(seeds, grid, sampler))

    text = run(None)
    for image in (torch.zeros(2, 3, dtype=torch.float64), torch.full((2, 3), 9.0, dtype=torch.float64)):
        assert torch.equal(run(image), text)


def test_begin_noises_the_image_to_the_first_step() -> None:
    rules, grid = CONVENTIONS["k"], CONVENTIONS["k"].grid(SCHEDULE, 20, "euler")
    eps, image = torch.randn(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    for strength, n in ((0.75, 15), (0.5, 10), (0.01, 1)):
        rest, x = rules.begin(grid, eps, image, strength)
        assert rest.t.tolist() == grid.t[-n:].tolist()
        torch.testing.assert_close(x, SCHEDULE.add_noise(image, rest.t[0], eps), rtol=0, atol=1e-12)
    assert torch.equal(rules.begin(grid, eps)[1], float(grid.sigma[0]) * eps)
    for wrong, message in (
        ((eps, None, 0.5), "needs an image"),
        ((eps, image, 1.5), "strength must lie"),
        ((eps, image[:1], 0.5), "same shape"),
    ):
        with pytest.raises(ValueError, match=message):
            rules.begin(grid, *wrong)


def test_noise_is_brownian_where_the_program_has_it() -> None:
    like = torch.empty(1, 4, dtype=torch.float64)
    cases = (
        ("k", "dpmpp_2m_sde", True),
        ("k", "euler_a", False),
        ("diffusers", "dpmpp_2m_sde", False),
        ("sgm", "dpmpp_sde", False),
    )
    for name, sampler, path in cases:
        grid = CONVENTIONS[name].grid(SCHEDULE, 5, sampler)
        expected = (brownian_noise([9], grid) if path else keyed_noise([9]))(2, like)
        assert torch.equal(CONVENTIONS[name].noise([9], grid, sampler)(2, like), expected)
    grid = CONVENTIONS["k"].grid(SCHEDULE, 5, "dpmpp_sde")
    assert torch.equal(
        CONVENTIONS["k"].noise([9], grid, "dpmpp_sde", r=0.3)(2, like),
        brownian_noise([9], grid, inner=0.3)(2, like),
    )


def test_a_convention_by_name_by_fields_or_as_it_is() -> None:
    own = Convention(grids={"*": {"spacing": "karras"}}, brownian=("dpmpp_sde",))
    assert get_convention("sgm") is CONVENTIONS["sgm"] and get_convention(own) is own
    assert get_convention({"grids": {"*": {"spacing": "karras"}}, "brownian": ["dpmpp_sde"]}) == own
    with pytest.raises(ValueError, match="did you mean 'compvis'"):
        get_convention("comvis")
    with pytest.raises(ValueError, match="did you mean 'grids'"):
        get_convention({"grid": {}})


@pytest.fixture(scope="module")
def pipe():
    return tiny_model()


def run(pipe, **options):
    return pipe.text_to_image("cat", progress=False, **{"steps": 4, **options})


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize("spacing", [None, "lambda"])
def test_the_pipeline_follows_a_convention(pipe, name, spacing):
    """The pipeline equals its parts put together by hand: grid, first state, rounding of t, noise."""
    rules, schedule, changes = (
        CONVENTIONS[name],
        pipe.denoiser.schedule,
        {} if spacing is None else {"spacing": spacing},
    )
    grid = rules.grid(schedule, 4, "dpmpp_2m_sde", **changes)
    seen = []
    hook = pipe.denoiser.net.register_forward_hook(
        lambda net, inputs, output: seen.append(float(inputs[1][0]))
    )
    images = run(pipe, convention=name, spacing=spacing, sampler="dpmpp_2m_sde", guidance=1.0)
    hook.remove()
    assert seen == pytest.approx((grid.t.round() if rules.quantize else grid.t).tolist())
    denoiser = ldm.Denoiser(pipe.denoiser.net, schedule, "v", quantize=rules.quantize)
    _, x = rules.begin(grid, initial_noise([0], (4, 8, 8)))
    with torch.no_grad():
        x = SAMPLERS["dpmpp_2m_sde"](
            denoiser.bind(pipe.text(["cat"])), x, grid, noise=rules.noise([0], grid, "dpmpp_2m_sde")
        )
        assert torch.equal(images.tensor, pipe.decode(x))
    assert images.recipe["convention"] == name and images.recipe.get("spacing") == spacing


def test_a_grid_of_timesteps_and_options_that_contradict_it(pipe):
    times = [999, 700.5, 300, 20]
    grid = TimeGrid.explicit(pipe.denoiser.schedule, times)
    images = run(pipe, grid=times)
    assert torch.equal(images.tensor, run(pipe, grid=grid).tensor) and images.recipe["grid"]["t"] == times
    written = json.loads(json.dumps(images.recipe["grid"]))
    assert torch.equal(images.tensor, run(pipe, grid=written).tensor)
    for wrong in ({"steps": 5}, {"spacing": "karras"}):
        with pytest.raises(ValueError, match="grid states all of its 4 steps"):
            run(pipe, grid=grid, **wrong)
    with pytest.raises(ValueError, match="written as t, alpha and sigma"):
        run(pipe, grid={"t": times})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "difusers"}, "did you mean 'diffusers'"),
        ({"spacing": "karas"}, "did you mean 'karras'"),
        # drop_last adds a node: 900 nodes one step apart reach 900, a tenth from the end; 500 nodes two steps
        # apart are further from 701
        ({"convention": "diffusers", "steps": 700}, "nearest number of steps that works is 899"),
    ],
)
def test_wrong_names_raise_with_the_nearest(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    ldm.save(tiny_model(), tmp_path / "assets" / "emoji-ldm")
    monkeypatch.setattr("ldm.catalog.lookup.ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)


NAMED = [
    ["--convention", "k", "--sampler", "dpmpp_sde"],
    ["--convention", "sgm"],
    ["--spacing", "lambda", "--steps", "7"],
]


@pytest.mark.parametrize("options", NAMED)
def test_the_command_line_records_and_replays_conventions(installed, options, capsys):
    assert main(["cat", "-o", "a.png", *options]) == 0 and main(["replay", "a.png"]) == 0
    recipe = read_recipe("a.png")
    assert recipe == read_recipe("a-replay.png") and recipe[options[0][2:]] == options[1]
    assert (np.asarray(Image.open("a.png")) == np.asarray(Image.open("a-replay.png"))).all()


def test_an_image_on_an_explicit_grid_is_replayed(installed):
    images = ldm.load("emoji-ldm", dtype="float32").text_to_image("cat", grid=[999, 500, 100], progress=False)
    images.save("a.png")
    assert main(["replay", "a.png"]) == 0
    assert (np.asarray(Image.open("a.png")) == np.asarray(Image.open("a-replay.png"))).all()


def test_ldm_grid_prints_a_convention(installed, capsys):
    assert main(["grid", "--convention", "compvis", "--sampler", "dpmpp_2m", "--steps", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dpmpp_2m, lower_order_final True: 5 steps, 5 evaluations"
    assert (
        lines[1].split() == ["step", "t", "alpha-bar", "sigma", "sigma/alpha", "lambda"]
        and len(lines) == 2 + 6
    )
    assert main(["grid", "--convention", "compvis", "--steps", "700", "--sampler", "ddim"]) == 2
    assert "nearest number of steps that works is 500" in capsys.readouterr().err
    for option, wrong, meant in (
        ("--convention", "kk", "k"),
        ("--spacing", "linspac", "linspace"),
        ("--sampler", "hein", "heun"),
    ):
        assert main(["grid", option, wrong]) == 2 and f"did you mean '{meant}'" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "dpm_adaptive"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_network_is_called_as_often_as_announced(pipe, installed, sampler, guidance, capsys):
    """`ldm grid` announces the number of the network's calls; guidance runs both conditions in one batch."""
    for steps in (1, 2, 5):
        calls = []
        hook = pipe.denoiser.net.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        run(pipe, steps=steps, sampler=sampler, guidance=guidance)
        hook.remove()
        announced = evaluations(pipe.card.grids().grid(pipe.denoiser.schedule, steps, sampler), sampler)
        assert len(calls) == announced
        assert main(["grid", "--sampler", sampler, "--steps", str(steps)]) == 0
        assert (
            f"{steps} step{'s' * (steps != 1)}, {announced} evaluation{'s' * (announced != 1)}"
            in capsys.readouterr().out
        )
