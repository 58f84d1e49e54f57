"""What a single file states about itself: marker keys, and metadata of safetensors.

| key | states |
|---|---|
| `v_pred` | the network predicts v |
| `ztsnr` | the schedule ends at a signal-to-noise ratio of zero |
| `edm_mean`, `edm_std` | EDM with the noise levels of Playground 2.5, and the statistics of the latents |
| `edm_vpred.sigma_max`, `edm_vpred.sigma_min` | EDM with data of standard deviation 1, as CosXL |
| `scale_factor` | the scale of the latents |
| `alphas_cumprod`, `betas` | the schedule, which is compared with the card's |

Metadata state the prediction (`modelspec.prediction_type`, `modelspec.predict_key`, `ss_v_parameterization`,
and `modelspec.architecture` of Stable Diffusion 2) and the zero terminal SNR (`ss_zero_terminal_snr`). The
family that they name is compared with that of the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.interfaces import Prediction
from ldm.support.scalars import finite_number
from ldm.support.text import shown
from ldm.weights.fields.judge import named
from ldm.weights.stated import Stated, edm_statement, positive_number

Values = Mapping[str, int | float | str]
PLAYGROUND = (0.002, 80.0, 0.5)  # noise levels and standard deviation of the data of Playground 2.5
COSXL = (0.002, 120.0, 1.0)
PREDICTION_WORDS: dict[str, Prediction | None] = {
    "epsilon": "eps",
    "v": "v",
    "v_prediction": "v",
    "sample": "x0",
}
TRUTH: dict[str, Prediction | None] = {"true": "v", "1": "v", "false": "eps", "0": "eps", "none": None}
# Metadata that state the prediction: the values and what they state. Other values are errors.
PREDICTION_METADATA = {
    "modelspec.prediction_type": PREDICTION_WORDS,
    "modelspec.predict_key": PREDICTION_WORDS,
    "ss_v_parameterization": TRUTH,
}
# Architectures that state it too; all others leave it open.
ARCHITECTURE_PREDICTIONS: dict[str, Prediction] = {
    "stable-diffusion-v2-512": "eps",
    "stable-diffusion-v2-768-v": "v",
}
# Metadata that name the architecture: beginnings of values, and beginnings of the families that they stand
# for. The first beginning that fits counts.
FAMILY_METADATA = {
    "modelspec.architecture": {
        "stable-diffusion-v1": ("sd1", "instruct-pix2pix"),
        "stable-diffusion-v2": ("sd2", "sd-x4"),
        "stable-diffusion-xl-v1-refiner": ("sdxl-refiner",),
        "stable-diffusion-xl": ("sdxl",),
    },
    "ss_base_model_version": {
        "sd_v1": ("sd1", "instruct-pix2pix"),
        "sd_v2": ("sd2", "sd-x4"),
        "sdxl": ("sdxl",),
    },
}
FAMILY_METADATA["ss_v2"] = {"True": ("sd2", "sd-x4"), "true": ("sd2", "sd-x4")}


MOST_CHANNELS = 256  # of a latent; published models have up to 16


class Marker(NamedTuple):
    """One statement of a file: where it stands, its value, and what it means for loading."""

    name: str
    value: str
    meaning: str


def stated_sampling(state: Mapping[str, Tensor], values: Values, *, asked: bool = False) -> Stated:
    """Return what a file states about its use, by marker keys and by metadata.

    Args:
        state: The tensors.
        values: Metadata, or what else a checkpoint holds beside tensors.
        asked: Whether the user states the prediction, so that the file's counts no more. Default: False.

    Raises:
        ValueError: If two statements contradict each other, or a value is unknown.
    """
    edm = edm_of(state)
    zero = "ztsnr" in state or str(values.get("ss_zero_terminal_snr")).lower() in ("true", "1")
    if edm is not None:
        if zero:
            raise ValueError(
                "the file states an EDM schedule and zero terminal SNR, which exclude each other"
            )
        return edm
    return Stated(None if asked else stated_prediction(state, values), zero)


def stated_prediction(state: Mapping[str, Tensor], values: Values) -> Prediction | None:
    """Return the prediction that a file states; None if it states none.

    Raises:
        ValueError: If two statements contradict each other, or a value is unknown.
    """
    found: dict[str, Prediction] = {"the key v_pred": "v"} if "v_pred" in state else {}
    for name, choices in PREDICTION_METADATA.items():
        if name not in values:
            continue
        value = str(values[name])
        if value.lower() not in choices:
            names = ", ".join(map(repr, choices))
            raise ValueError(f"{name} {shown(value)}: expected one of {names}; pass prediction= to decide it")
        if (prediction := choices[value.lower()]) is not None:
            found[f"{name} {shown(value)}"] = prediction
    architecture = str(values.get("modelspec.architecture", ""))
    for start, prediction in ARCHITECTURE_PREDICTIONS.items():
        if architecture == start:
            found[f"modelspec.architecture {shown(architecture)}"] = prediction
    if len(set(found.values())) > 1:
        raise ValueError(f"{' and '.join(found)} contradict each other; pass prediction= to decide it")
    return next(iter(found.values()), None)


def edm_of(state: Mapping[str, Tensor]) -> Stated | None:
    """Return the statement of a file with the markers of EDM; None for other files.

    Raises:
        ValueError: If the markers are incomplete or not finite numbers.
    """
    if "edm_vpred.sigma_max" in state:
        low, high, data = COSXL
        low = number_of(state, "edm_vpred.sigma_min") if "edm_vpred.sigma_min" in state else low
        high = number_of(state, "edm_vpred.sigma_max")
        return edm_statement((low, high, data), spacing="exponential", negated=False)
    there = [name for name in ("edm_mean", "edm_std") if name in state]
    if not there:
        return None
    if len(there) == 1:
        raise ValueError(f"the file has the key {there[0]}, and of edm_mean and edm_std not the other")
    mean, std = (
        tuple(number(name, entry) for entry in channel_numbers(state, name))
        for name, number in (("edm_mean", finite_number), ("edm_std", positive_number))
    )
    # the latents are scaled to the standard deviation of EDM's data, and the library's to 1
    return edm_statement(PLAYGROUND)._replace(latent_mean=mean, latent_std=std, latent_scale=1.0)


def number_of(state: Mapping[str, Tensor], name: str) -> float:
    """Return the positive number in a tensor of one entry."""
    if state[name].numel() != 1:
        raise ValueError(f"{name}: expected one number, got shape {tuple(state[name].shape)}")
    return positive_number(name, channel_numbers(state, name)[0])


def channel_numbers(state: Mapping[str, Tensor], name: str) -> list[float]:
    """Return the real numbers in a tensor with an entry for each channel of a latent."""
    tensor = state[name]
    if tensor.numel() > MOST_CHANNELS or tensor.is_complex():
        raise ValueError(
            f"{name}: expected at most {MOST_CHANNELS} real numbers, got shape {tuple(tensor.shape)} of"
            f" {tensor.dtype}"
        )
    numbers: list[float] = tensor.flatten().double().tolist()
    return numbers


def family_notes(family: str, values: Values) -> tuple[str, ...]:
    """Return a warning for each metadata entry that names another family than the keys do."""
    notes = []
    for name, families in FAMILY_METADATA.items():
        value = str(values.get(name, ""))
        fits = next((those for start, those in families.items() if value.startswith(start)), None)
        if fits is not None and not family.startswith(fits):
            notes.append(
                f"its metadata state {name} {named(value)}, its keys are those of {family}, which count"
            )
    return tuple(notes)


def markers(state: Mapping[str, Tensor], values: Values) -> list[Marker]:
    """Return the statements of a file and what is done with each, for a report."""
    found = []
    for key, meaning in KEY_MEANINGS.items():
        if key in state:
            tensor = state[key]
            value = str(tensor.item()) if tensor.numel() == 1 else f"shape {tuple(tensor.shape)}"
            found.append(Marker(key, value, meaning))
    for name, meaning in METADATA_MEANINGS.items():
        if name in values:
            found.append(Marker(name, named(str(values[name])), meaning))
    return found


FOLLOWED, COMPARED = "followed", "compared with the keys"
KEY_MEANINGS = {
    "v_pred": "followed: the network predicts v",
    "ztsnr": "followed: zero terminal SNR",
    "edm_mean": "followed: EDM, and the mean of the latents",
    "edm_std": "followed: the standard deviation of the latents",
    "edm_vpred.sigma_max": "followed: EDM, and its largest noise level",
    "edm_vpred.sigma_min": "followed: the smallest noise level",
    "scale_factor": "followed: the scale of the latents",
    "alphas_cumprod": "compared with the card's schedule",
    "betas": "compared with the card's schedule",
    "model_sampling.sigmas": "ignored: the card states the schedule",
}
METADATA_MEANINGS = {
    **dict.fromkeys(PREDICTION_METADATA, "followed: the prediction"),
    "ss_zero_terminal_snr": "followed: zero terminal SNR",
    "modelspec.architecture": "compared with the keys; followed where it states the prediction",
    "ss_base_model_version": COMPARED,
    "ss_v2": COMPARED,
    "modelspec.resolution": "ignored: the card and the call state the size",
    "global_step": "compared with the prediction of Stable Diffusion 2",
}
