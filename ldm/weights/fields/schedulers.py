"""The fields of the schedulers of diffusers.

A scheduler's configuration mixes two things: how the network was trained, which is followed or compared, and
how its own sampler runs. Samplers are chosen by the card and the call here, so of these fields only those
that change what the network is taken for are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping

from ldm.weights.fields.judge import Fields, fixed, followed, ignored, sampling

OPTION = "it is an option of the sampler, which the card and the call choose"
ITS_GRID = "the card and the call choose the grid"
NO_CLAMP = "the card's `clip_x0` clamps x0, and nothing does in latent diffusion models"
FIFTY_STEPS = "the spacing `lcm` takes 50 timesteps and the boundary conditions a scaling of 10"
TRAINED = "how the network was trained"

# The training of a network with a table of betas.
BETAS: Fields = {
    "num_train_timesteps": followed(1000, TRAINED),
    "beta_schedule": followed("linear", TRAINED),
    "beta_start": followed(0.0001, TRAINED),
    "beta_end": followed(0.02, TRAINED),
    "trained_betas": followed(None, "compared with the betas of the schedule"),
    "prediction_type": followed("epsilon", TRAINED),
    "rescale_betas_zero_snr": followed(False, TRAINED),
    "timestep_type": fixed("discrete"),
    "use_flow_sigmas": fixed(False),
    "predict_epsilon": fixed(None, True),
    "snr_shift_scale": fixed(None, 1.0),
}
SAMPLERS_ONLY: Fields = {
    "clip_sample": sampling(False, NO_CLAMP),
    "clip_sample_range": sampling(1.0, NO_CLAMP),
    "thresholding": sampling(False, NO_CLAMP),
    "timestep_spacing": sampling(None, "pass spacing= for it"),
    "original_inference_steps": sampling(50, FIFTY_STEPS),
    "timestep_scaling": sampling(10.0, FIFTY_STEPS),
    **dict.fromkeys(
        ("dynamic_thresholding_ratio", "sample_max_value"), ignored(None, "only `thresholding` reads it")
    ),
    **dict.fromkeys(
        (
            *(
                "steps_offset",
                "set_alpha_to_one",
                "final_sigmas_type",
                "skip_prk_steps",
                "sigma_min",
                "sigma_max",
            ),
            *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
            *("interpolation_type", "lambda_min_clipped", "rho"),
        ),
        ignored(None, ITS_GRID),
    ),
    **dict.fromkeys(
        (
            *("solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final"),
            *(
                "predict_x0",
                "disable_corrector",
                "solver_p",
                "predictor_order",
                "corrector_order",
                "tau_func",
            ),
            *("noise_sampler_seed", "timestep_values", "tensor_format"),
        ),
        ignored(None, OPTION),
    ),
    **dict.fromkeys(
        ("flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"),
        ignored(None, "only `use_flow_sigmas` reads it"),
    ),
    "variance_type": ignored(
        None,
        "the channels of the network determine whether it predicts a variance; which fixed one is an option",
    ),
}
DISCRETE: Fields = {**BETAS, **SAMPLERS_ONLY}
EDM: Fields = {
    **SAMPLERS_ONLY,
    "sigma_min": followed(0.002, TRAINED),
    "sigma_max": followed(80.0, TRAINED),
    "sigma_data": followed(0.5, TRAINED),
    "num_train_timesteps": followed(1000, "the entries of the schedule's table"),
    "prediction_type": followed("epsilon", TRAINED),
    "sigma_schedule": followed("karras", "the spacing of the grid"),
    "rho": followed(7.0, "the exponent of the grid's spacing"),
    "beta_schedule": ignored(None, "the class does not read it"),
    "beta_start": ignored(None, "the class does not read it"),
    "beta_end": ignored(None, "the class does not read it"),
    "trained_betas": ignored(None, "the class does not read it"),
    "rescale_betas_zero_snr": ignored(None, "the class does not read it"),
}

# Class: the defaults of fields that are not those of the table.
KARRAS = {"beta_start": 0.00085, "beta_end": 0.012}
CONSISTENCY = {**KARRAS, "beta_schedule": "scaled_linear"}
DISCRETE_CLASSES: dict[str, Mapping[str, object]] = {
    **dict.fromkeys(
        ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
        {"clip_sample": True},
    ),
    **dict.fromkeys(
        (
            *(
                "PNDMScheduler",
                "LMSDiscreteScheduler",
                "EulerDiscreteScheduler",
                "EulerAncestralDiscreteScheduler",
            ),
            *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
            *("UniPCMultistepScheduler", "SASolverScheduler"),
        ),
        {},
    ),
    **dict.fromkeys(
        (
            *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
            "DPMSolverSDEScheduler",
        ),
        KARRAS,
    ),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), CONSISTENCY),
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True},
}
# Beginnings of the classes of other ways of training, whatever fields their configurations state.
OTHER_TRAININGS = {
    "Flow": "flow matching",
    "Piflow": "flow matching",
    "LTX": "flow matching",
    "Helios": "flow matching",
    "MiniMax": "flow matching",
    "SCM": "trigonometric flow matching",
    "ScoreSde": "stochastic differential equations without a table of betas",
    "KarrasVe": "stochastic differential equations without a table of betas",
    "CMStochastic": "consistency training",
    "ConsistencyDecoder": "consistency training",
    "CosineDPMSolver": "a continuous cosine schedule",
    "IPNDM": "a continuous cosine schedule",
    "DDPMWuerstchen": "a continuous cosine schedule",
    "CogVideoX": "a shifted schedule",
    **dict.fromkeys(
        ("VQDiffusion", "Amused", "DiscreteDDIM", "BlockRefinement", "EntropyBound", "RFD4"),
        "discrete diffusion",
    ),
}
EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
