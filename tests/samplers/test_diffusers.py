"""Trajectories and grids equal those of diffusers' schedulers.

Some cases are left out because diffusers is wrong there:

- DDIM and DDPM with spacings whose step is not T//N (linspace; trailing where N does not divide T):
  ``prev_timestep = t − T//N`` is then not the next timestep of the grid. For N = 3, trailing: t = 999, 666,
  332, but 999 − 333 = 666 and 666 − 333 = 333, not 332.
- DDPM with the large variance and trailing: it adds noise unless t is 0, so noise of standard deviation
  sqrt(beta) is added to the finished sample (t = T/N − 1 there).
- One step of Euler and similar on linspace, karras or exponential: np.linspace(0, 999, 1) is [0], so it
starts
  (and takes sigma_max) at clean data.
- UniPC bh1 to sigma 0: B(h) = −inf there, and −inf·0 is nan. It is compared with the last step to sigma_min.
- KDPM2 and its ancestral version on karras: t is rounded at every other evaluation only. The functions of
  k-diffusion, from which they derive, are compared instead.

Where a grid is spaced in sigma, DPM-Solver, DEIS and UniPC pass integer t to the network: rounded for karras
and uniform lambda, rounded down for exponential; the test does the same. DEIS then ends at sigma_min and
makes a last step of length 0, so its N steps are N − 1 here. The tables and states of diffusers are float32,
so the tolerance is 1e-5 relative. Where a difference of its float32 squares loses digits (below), its own
formulas are evaluated in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.diffusion.grid import TimeGrid
from ldm.diffusion.interfaces import Denoised
from ldm.diffusion.schedule import NoiseSchedule, broadcast
from ldm.samplers import SAMPLERS
from ldm.samplers.conventions import CONVENTIONS, get_convention

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE = torch.randn(120, 2, 4, generator=torch.Generator().manual_seed(5))
FIRST = {"set_alpha_to_one": False}
STEPS = [1, 5, 10, 20, 50]
# all samplers and spacings that both libraries have: DDIM, DDPM, PNDM, Euler, Euler ancestral, Heun, KDPM2,
# KDPM2 ancestral, LMS, DPMSolverSDE, DPMSolverMultistep (2M, 2M SDE by midpoint and heun, third order), UniPC
# (order 1 to 3, bh1 and bh2), DEIS (order 1 to 3), LCM, TCD
DPM = {"solver_order": 2, "algorithm_type": "dpmsolver++"}
SDE = {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}
SIGMAS = {"karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}


def eps(x: Tensor, t: Tensor) -> Tensor:
    """Return the prediction of a stub network: smooth, nonlinear, dependent on t."""
    return 0.6 * torch.sin(1.3 * x + 0.002 * broadcast(torch.as_tensor(t), x)) + 0.4 * x


def run_ldm(
    name: str,
    schedule: NoiseSchedule,
    grid: TimeGrid,
    x: Tensor,
    *,
    rounding: Callable[[Tensor], Tensor],
    **options: Any,
) -> Tensor:
    """Return the result of a sampler whose network gets t rounded; draw k of its noise is NOISE[k]."""

    def denoise(x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = schedule.alpha_sigma_like(t, x)
        e = eps(x, rounding(t))
        return Denoised((x - sigma * e) / alpha, e)

    return SAMPLERS[name](denoise, x, grid, noise=lambda k, like: NOISE[k].to(like.dtype), **options)


def run_diffusers(
    scheduler: Any, steps: int, x: Tensor, grid: TimeGrid, monkeypatch: pytest.MonkeyPatch, **kwargs: Any
) -> Tensor:
    """Return the result of a scheduler, whose random numbers are NOISE[0], NOISE[1], … in order."""
    order = iter(NOISE)
    module = __import__(type(scheduler).__module__, fromlist=["_"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(order))
    scheduler.set_timesteps(steps)
    if "DEIS" in type(scheduler).__name__ or "SDES" in type(scheduler).__name__:
        # DEIS of third order: the terms of its closed-form integrals cancel up to h³, which leaves an error
        # of 3e-4 in float32 at 50 steps. The SDE's sigma_down² = sigma'² − sigma_up² is sigma'⁴/sigma²: where
        # sigma'/sigma is 0.02, float32 has a relative error of 6e-8/4e-4
        scheduler.sigmas = scheduler.sigmas.double()
    if "KDPM2Ancestral" in type(scheduler).__name__:
        set_float64_tables(scheduler)
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = lambda *_: next(order)
    # Euler and similar schedulers hold x/alpha
    ve = "Discrete" in type(scheduler).__name__ or "SDES" in type(scheduler).__name__
    x = x / float(grid.alpha[0]) if ve else x
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(eps(model_input, t), t, x, return_dict=False, **kwargs)[0]
    return x


def set_float64_tables(scheduler: Any) -> None:
    """Compute KDPM2Ancestral's tables by its own formulas in float64.

    sigma_down² = sigma'² − sigma_up² cancels, as above, and t depends on it.
    """
    sigma = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]]).double()  # N + 1, the last 0
    after = sigma.roll(-1)
    after[-1] = 0
    up = (after**2 * (sigma**2 - after**2) / sigma**2).sqrt()
    down = (after**2 - up**2).sqrt()
    down[-1] = 0
    middle = sigma.log().lerp(down.log(), 0.5).exp()
    middle[-2:] = 0
    for name, value in (
        ("sigmas", sigma),
        ("sigmas_interpol", middle),
        ("sigmas_up", up),
        ("sigmas_down", down),
    ):
        setattr(scheduler, name, torch.cat([value[:1], value[1:].repeat_interleave(2), value[-1:]]))
    logs = scheduler.log_sigmas.double().numpy()
    scheduler.timesteps = scheduler.timesteps.double()
    scheduler.timesteps[1::2] = torch.tensor(
        [float(scheduler._sigma_to_t(s, logs)) for s in middle[:-2].numpy()], dtype=torch.float64
    )


# name, scheduler, its options, spacing, options of TimeGrid.make, of the sampler, of the scheduler's step
Case = tuple[str, str, dict[str, Any], str, dict[str, Any], dict[str, Any], dict[str, Any]]
CASES: list[Case] = []
for eta in (0.0, 1.0):
    both = {"eta": eta}
    CASES.append(
        (
            "ddim",
            "DDIMScheduler",
            {"steps_offset": 1, **FIRST},
            "leading",
            {"offset": 1, "final": "first"},
            both,
            both,
        )
    )
    CASES.append(("ddim", "DDIMScheduler", {}, "trailing", {}, both, both))
for kind in ("small", "large"):
    for spacing in ("leading", "trailing") if kind == "small" else ("leading",):
        CASES.append(
            ("ddpm", "DDPMScheduler", {"variance_type": f"fixed_{kind}"}, spacing, {}, {"variance": kind}, {})
        )
PLMS = {"skip_prk_steps": True}
CASES.append(
    (
        "plms",
        "PNDMScheduler",
        {**PLMS, "steps_offset": 1, **FIRST},
        "leading",
        {"offset": 1, "final": "first"},
        {},
        {},
    )
)
CASES.append(("plms", "PNDMScheduler", {**PLMS, "set_alpha_to_one": True}, "trailing", {}, {}, {}))
DISCRETE = {
    "euler": "Euler",
    "euler_a": "EulerAncestral",
    "heun": "Heun",
    "dpm2": "KDPM2",
    "dpm2_a": "KDPM2Ancestral",
    "lms": "LMS",
}
for name, peer in DISCRETE.items():
    CASES.append((name, f"{peer}DiscreteScheduler", {"steps_offset": 1}, "leading", {"offset": 1}, {}, {}))
    CASES.append((name, f"{peer}DiscreteScheduler", {}, "linspace", {"integer": False}, {}, {}))
    CASES.append((name, f"{peer}DiscreteScheduler", {}, "trailing", {}, {}, {}))
    if name in ("euler", "heun", "lms"):
        CASES += [(name, f"{peer}DiscreteScheduler", SIGMAS[s], s, {}, {}, {}) for s in SIGMAS]
    if name in ("dpm2", "dpm2_a"):
        CASES.append((name, f"{peer}DiscreteScheduler", SIGMAS["exponential"], "exponential", {}, {}, {}))
SDE_PEER = "DPMSolverSDEScheduler"
CASES.append(("dpmpp_sde", SDE_PEER, {"steps_offset": 1}, "leading", {"offset": 1}, {}, {}))
CASES.append(("dpmpp_sde", SDE_PEER, {}, "linspace", {"integer": False}, {}, {}))
CASES.append(("dpmpp_sde", SDE_PEER, {}, "trailing", {}, {}, {}))
CASES += [("dpmpp_sde", SDE_PEER, SIGMAS[s], s, {}, {}, {}) for s in SIGMAS]
for name, peer, scheduler, here in (
    ("dpmpp_2m", "DPMSolverMultistepScheduler", DPM, {}),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", SDE, {}),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {**SDE, "solver_type": "heun"}, {"solver": "heun"}),
    # as in k-diffusion, the second difference has half of its weight: (e^(−h) + h − 1)/h² − ½ is phi_3, but
    # the integral of s² is 2·phi_3
    (
        "dpmpp_3m_sde",
        "DPMSolverMultistepScheduler",
        {
            "solver_order": 3,
            "algorithm_type": "dpmsolver++",
            "solver_type": "heun",
            "lower_order_final": False,
        },
        {"eta": 0.0, "curvature": "published"},
    ),
    *[
        (
            "unipc",
            "UniPCMultistepScheduler",
            {"solver_order": p, "solver_type": b},
            {"order": p, "variant": b},
        )
        for p in (1, 2, 3)
        for b in ("bh1", "bh2")
    ],
):
    if scheduler.get("solver_type") == "bh1":
        last = {**scheduler, "final_sigmas_type": "sigma_min"}
        CASES.append(
            (
                name,
                peer,
                {**last, "steps_offset": 1},
                "leading",
                {"drop_last": True, "offset": 1, "final": "first"},
                here,
                {},
            )
        )
        CASES.append((name, peer, last, "trailing", {"final": "first"}, here, {}))
        continue
    CASES.append(
        (name, peer, {**scheduler, "timestep_spacing": "linspace"}, "linspace", {"drop_last": True}, here, {})
    )
    CASES.append(
        (name, peer, {**scheduler, "steps_offset": 1}, "leading", {"drop_last": True, "offset": 1}, here, {})
    )
    CASES.append((name, peer, scheduler, "trailing", {}, here, {}))
    CASES += [(name, peer, {**scheduler, **SIGMAS[s]}, s, {}, here, {}) for s in SIGMAS]
    if "DPMSolver" in peer:
        CASES.append((name, peer, {**scheduler, "use_lu_lambdas": True}, "lambda", {}, here, {}))
for order in (1, 2, 3):
    here = {"order": order, "lower_order_final": False}
    peer_options = {"solver_order": order, "lower_order_final": False}
    CASES.append(("deis", "DEISMultistepScheduler", peer_options, "trailing", {"final": "first"}, here, {}))
    last = {"final": "first", "drop_last": True}
    CASES.append(
        (
            "deis",
            "DEISMultistepScheduler",
            {**peer_options, "steps_offset": 1},
            "leading",
            {"offset": 1, **last},
            here,
            {},
        )
    )
    CASES.append(("deis", "DEISMultistepScheduler", peer_options, "linspace", last, here, {}))
    CASES += [
        ("deis", "DEISMultistepScheduler", {**peer_options, **SIGMAS[s]}, s, {"final": "none"}, here, {})
        for s in SIGMAS
    ]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[3]}-{len(c[2])}")
def test_trajectory(case: Case, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, peer, options, spacing, grid_options, here, step_options = case
    in_sigma = spacing in (*SIGMAS, "lambda")
    if steps == 1 and spacing in ("linspace", *SIGMAS) and ("Discrete" in peer or peer == SDE_PEER):
        pytest.skip("the scheduler starts at clean data: see above")
    if steps == 1 and name == "deis" and in_sigma:
        pytest.skip("the scheduler's only step has length 0: see above")
    named = {} if in_sigma else {"timestep_spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = {"clip_sample": False} if peer in ("DDIMScheduler", "DDPMScheduler") else {}
        scheduler = getattr(diffusers, peer)(**{**SD, **plain, **named, **options})
    schedule = NoiseSchedule(scheduler.alphas_cumprod)
    grid = TimeGrid.make(schedule, steps - (name == "deis" and in_sigma), spacing=spacing, **grid_options)
    if name == "dpm2_a" and spacing == "linspace":
        # diffusers interpolates sigma linearly between table entries, which is (log sigma'/sigma)²/8 = 1e-5
        # above the log-linear value at t = 52.6; its midpoints depend on it
        scheduler.set_timesteps(steps)
        rho = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]]).double()
        # their float32 may round the last level to below the schedule's smallest, where the step is Euler's
        rho[-2] = max(float(rho[-2]), float(schedule.log_ratio[0].exp()))
        alpha = 1 / (1 + rho**2).sqrt()
        grid = TimeGrid(t=grid.t, alpha=alpha, sigma=rho * alpha, schedule=schedule)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    rounding: Callable[[Tensor], Tensor] = lambda t: t  # noqa: E731
    if in_sigma and "Multistep" in peer:
        rounding = torch.floor if spacing == "exponential" else torch.round
    expected = run_diffusers(scheduler, steps, x, grid, monkeypatch, **step_options)
    actual = run_ldm(name, schedule, grid, x, rounding=rounding, **here)
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < 1e-5, error


@pytest.mark.parametrize("steps", [1, 5, 10, 20, 50])
@pytest.mark.parametrize(
    ("sampler", "peer", "options"),
    [
        ("ddim", "DDIMScheduler", FIRST),
        ("euler", "EulerDiscreteScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("unipc", "UniPCMultistepScheduler", {}),
        ("deis", "DEISMultistepScheduler", {}),
        ("ddpm", "DDPMScheduler", {}),
        ("plms", "PNDMScheduler", {"skip_prk_steps": True, **FIRST}),
        ("euler_a", "EulerAncestralDiscreteScheduler", {}),
        ("lms", "LMSDiscreteScheduler", {}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", SDE),
        ("dpmpp_3m_sde", "DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("heun", "HeunDiscreteScheduler", {}),  # lists each timestep twice
        ("dpm2", "KDPM2DiscreteScheduler", {}),  # lists midpoints too
        ("dpmpp_sde", "DPMSolverSDEScheduler", {}),
    ],
)
def test_convention_equals_the_scheduler_s_grid(
    sampler: str, peer: str, options: dict[str, Any], steps: int
) -> None:
    """Timesteps and sigmas of "diffusers" are those of the scheduler as Stable Diffusion configures it."""
    scheduler = getattr(diffusers, peer)(**SD, steps_offset=1, timestep_spacing="leading", **options)
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule(scheduler.alphas_cumprod)
    grid = get_convention("diffusers").grid(schedule, steps, sampler)
    times = (
        scheduler.timesteps[::2]
        if sampler in ("dpm2", "dpmpp_sde")
        else scheduler.timesteps.unique_consecutive()
    )
    assert grid.t.tolist() == [float(t) for t in times]
    if hasattr(scheduler, "sigmas"):
        # diffusers computes in float32
        torch.testing.assert_close(
            grid.ratio, scheduler.sigmas.unique_consecutive().double(), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize(("sampler", "peer"), [("lcm", "LCMScheduler"), ("tcd", "TCDScheduler")])
def test_convention_equals_the_grid_of_distilled_models(sampler: str, peer: str) -> None:
    scheduler = getattr(diffusers, peer)(**SD)
    schedule = NoiseSchedule(scheduler.alphas_cumprod)
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        assert get_convention("diffusers").grid(schedule, steps, sampler).t.tolist() == [
            float(t) for t in scheduler.timesteps
        ], steps


def test_conventions_against_the_programs_formulas() -> None:
    import numpy as np

    schedule = NoiseSchedule.scaled_linear()
    for n in (3, 20, 30):
        # generate_roughly_equally_spaced_steps of generative-models
        sgm = (np.linspace(999, 0, n, endpoint=False).astype(int)).tolist()
        assert CONVENTIONS["sgm"].grid(schedule, n, "euler").t.tolist() == sgm
        # DiscreteSchedule.get_sigmas of k-diffusion
        k = CONVENTIONS["k"].grid(schedule, n, "euler")
        np.testing.assert_allclose(k.t.numpy(), np.linspace(999, 0, n), atol=1e-9)
        assert CONVENTIONS["k"].start_scale(k) == float(k.sigma[0]) < 1
        # make_ddim_timesteps "uniform" of CompVis, where it has n entries
        compvis = CONVENTIONS["compvis"].grid(schedule, n, "ddim")
        assert compvis.t.tolist() == [t + 1 for t in range(0, 1000, 1000 // n)][:n][::-1]
        assert float(compvis.alpha[-1] ** 2) == pytest.approx(float(schedule.alphas_cumprod[0]))
    karras = CONVENTIONS["diffusers"].grid(schedule, 10, "dpmpp_2m", spacing="karras")
    assert karras.t.tolist() == TimeGrid.make(schedule, 10, spacing="karras").t.tolist()
    with pytest.raises(ValueError, match="did you mean 'diffusers'"):
        get_convention("difusers")
    with pytest.raises(ValueError, match="did you mean 'euler'"):
        CONVENTIONS["k"].grid(schedule, 10, "eulr")


def test_align_your_steps_against_diffusers_tables() -> None:
    from diffusers.schedulers import AysSchedules

    schedule = NoiseSchedule.scaled_linear()
    for spacing, key in (("ays_sd1", "StableDiffusionTimesteps"), ("ays_sdxl", "StableDiffusionXLTimesteps")):
        grid = TimeGrid.make(schedule, 10, spacing=spacing)
        # diffusers stores the levels as integer timesteps, which differ by up to 2
        assert float((grid.t - torch.tensor(AysSchedules[key], dtype=torch.float64)).abs().max()) < 2
        assert len(TimeGrid.make(schedule, 25, spacing=spacing)) == 25


@pytest.mark.parametrize("steps", [*STEPS, 4, 8])
@pytest.mark.parametrize(
    ("name", "peer", "here"), [("lcm", "LCMScheduler", {}), ("tcd", "TCDScheduler", {"eta": 0.3})]
)
def test_consistency_samplers(
    name: str, peer: str, here: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the convention's grid; TCD's last step ends at alpha_bar[0] (prev_timestep = 0) in diffusers."""
    scheduler = getattr(diffusers, peer)(**SD, clip_sample=False)
    schedule = NoiseSchedule(scheduler.alphas_cumprod)
    grid = get_convention("diffusers").grid(schedule, steps, name)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    expected = run_diffusers(scheduler, steps, x, grid, monkeypatch, **here)
    actual = run_ldm(name, schedule, grid, x, rounding=lambda t: t, **here)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5
