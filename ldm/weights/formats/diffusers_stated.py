"""What the schedulers, autoencoders and tokenizers of diffusers folders state, in the terms of a card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from ldm.catalog.cards import DiffusionCard, ScheduleCard
from ldm.diffusion.interfaces import Prediction
from ldm.diffusion.schedule import ScheduleName
from ldm.models.text.bpe import all_symbols
from ldm.support.config import nearest
from ldm.support.scalars import finite_number, whole_number
from ldm.support.strict_json import read_json
from ldm.weights.fields.judge import (
    ANY,
    Config,
    Fields,
    Finding,
    conflicts,
    judge_fields,
    named,
    same,
    warnings_of,
)
from ldm.weights.fields.schedulers import DISCRETE, DISCRETE_CLASSES, EDM, EDM_CLASSES, OTHER_TRAININGS
from ldm.weights.fields.texts import CLIP_TOKENIZER
from ldm.weights.formats.diffusers_config import PREDICTION_TYPES, training_facts
from ldm.weights.stated import Stated, edm_statement, positive_number

BETA_SCHEDULES: dict[str, ScheduleName] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}
PREDICTIONS_OF_TYPES = {name: prediction for prediction, name in PREDICTION_TYPES.items()}
# The fields that a scheduler of an unknown class must state to be read as one with a table of betas.
DECISIVE = ("num_train_timesteps", "beta_schedule", "prediction_type")
VOCABULARY_BYTES = 1 << 24
MOST_TIMESTEPS = 1_000_000
UNLIMITED = 100_000  # transformers writes a huge length for a tokenizer without one
TEXT_START, TEXT_END = "<|startoftext|>", "<|endoftext|>"  # in the vocabulary of transformers


def scheduler_fields(stated: Config) -> tuple[Fields, dict[str, Any]]:
    """Return the table of a scheduler's class, and its configuration with the defaults of the class.

    Raises:
        ValueError: If the class is not known and does not state how the network was trained.
    """
    name = str(stated.get("_class_name"))
    given = {key: value for key, value in stated.items() if value is not None}
    if name in EDM_CLASSES:
        return EDM, given
    other = next((what for start, what in OTHER_TRAININGS.items() if name.startswith(start)), None)
    if name not in DISCRETE_CLASSES and (other or not all(key in given for key in DECISIVE)):
        raise ValueError(
            f"scheduler class {named(name)}, whose way of training is {other or 'not known'};"
            f" {nearest(name, (*DISCRETE_CLASSES, *EDM_CLASSES))}"
        )
    return DISCRETE, {**DISCRETE_CLASSES.get(name, {}), **given}


def scheduler_findings(stated: Config, expected: Mapping[str, object] | None = None) -> list[Finding]:
    """Return what is done with each field of a scheduler's configuration; see `judge_fields`."""
    fields, config = scheduler_fields(stated)
    return judge_fields(config, fields, expected)


def scheduler_warnings(stated: Config, card: DiffusionCard, where: str) -> tuple[str, ...]:
    """Return warnings about the sampling that a scheduler states and the card does not.

    Args:
        stated: The configuration.
        card: The card of the stage that it belongs to.
        where: The configuration, for messages.

    Raises:
        ValueError: If a field states another network than this library computes.
    """
    clip = getattr(card, "clip_x0", None)
    grids = card.grids().grids
    own = str(grids.get(card.defaults.sampler, grids["*"]).get("spacing"))
    spacing = stated.get("timestep_spacing")
    # only "trailing" belongs to a training: the other spacings are habits of samplers
    differs = spacing is not None and (own == "trailing") != (spacing == "trailing")
    expected = {
        "clip_sample": clip is not None,
        "clip_sample_range": ANY if clip is None else clip,
        "timestep_spacing": own if differs else ANY,
    }
    findings = scheduler_findings(stated, expected)
    if wrong := conflicts(findings):
        raise ValueError(f"{where} states another network than is computed: {'; '.join(wrong)}")
    name = str(stated.get("_class_name"))
    known = name in DISCRETE_CLASSES or name in EDM_CLASSES
    unknown = () if known else (f"{where}: the class {named(name)} is not known; its training is followed",)
    return (*unknown, *warnings_of(findings, where))


def stated_training(stated: Config, card: DiffusionCard) -> Stated:
    """Return how a scheduler states that the network was trained.

    Args:
        stated: The configuration.
        card: The card, whose betas the stated ones must be.

    Raises:
        ValueError: If it states a training that no card can state.
    """
    fields, given = scheduler_fields(stated)
    config = {name: given.get(name, field.default) for name, field in fields.items()}
    prediction = PREDICTIONS_OF_TYPES.get(str(config["prediction_type"]))
    timesteps = whole_number("num_train_timesteps", config["num_train_timesteps"], least=1)
    if timesteps > MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps {timesteps}, expected at most {MOST_TIMESTEPS}")
    if fields is EDM:
        return edm_training(config, timesteps, prediction)
    if prediction is None:
        raise ValueError(wrong_choice("prediction_type", config, PREDICTIONS_OF_TYPES))
    zero = config["rescale_betas_zero_snr"]
    if not isinstance(zero, bool):
        raise ValueError(f"rescale_betas_zero_snr: expected true or false, got {named(zero)}")
    if config["trained_betas"] is not None:
        schedule = betas_of_card(config["trained_betas"], card.schedule)
        return Stated(prediction, schedule.zero_terminal_snr, schedule)
    kind = BETA_SCHEDULES.get(str(config["beta_schedule"]))
    if kind is None:
        raise ValueError(wrong_choice("beta_schedule", config, BETA_SCHEDULES))
    schedule = ScheduleCard(kind=kind, timesteps=timesteps, zero_terminal_snr=zero)
    if kind != "cosine":
        start, end = (positive_number(name, config[name]) for name in ("beta_start", "beta_end"))
        schedule = ScheduleCard(
            kind=kind, timesteps=timesteps, beta_start=start, beta_end=end, zero_terminal_snr=zero
        )
    schedule.make()  # raises where no schedule has these betas
    return Stated(prediction, zero, schedule)


def edm_training(config: Config, timesteps: int, prediction: Prediction | None) -> Stated:
    """Return the training that a scheduler of EDM states; see `stated_training`."""
    if prediction not in ("eps", "v"):
        raise ValueError(wrong_choice("prediction_type", config, ("epsilon", "v_prediction")))
    spacing = str(config["sigma_schedule"])
    if spacing not in ("karras", "exponential"):
        raise ValueError(wrong_choice("sigma_schedule", config, ("karras", "exponential")))
    low, high, data = (
        positive_number(name, config[name]) for name in ("sigma_min", "sigma_max", "sigma_data")
    )
    rho = positive_number("rho", config["rho"])
    stated = edm_statement(
        (low, high, data), timesteps=timesteps, spacing=spacing, negated=prediction == "eps"
    )
    assert stated.schedule is not None
    stated.schedule.make()  # raises where no schedule has these levels
    return stated._replace(rho=None if rho == 7.0 or spacing != "karras" else rho)


def wrong_choice(name: str, config: Config, choices: object) -> str:
    """Return the message about a field whose value is none of the choices."""
    return f"{name} {named(config[name])}, expected one of {', '.join(map(str, cast(Any, choices)))}"


def betas_of_card(trained: object, schedule: ScheduleCard) -> ScheduleCard:
    """Return the card's schedule if a scheduler lists its betas; ValueError if they are others."""
    betas = schedule.make().betas
    listed = isinstance(trained, list) and all(
        isinstance(beta, int | float) and not isinstance(beta, bool) for beta in trained
    )
    if listed and len(cast(list[float], trained)) == len(betas):
        if torch.allclose(torch.tensor(trained, dtype=torch.float64, device="cpu"), betas, rtol=1e-4, atol=0):
            return schedule
    raise ValueError(f"trained_betas {named(trained)}, expected those of the card's schedule")


def training_conflicts(stated: Config, facts: Mapping[str, Any]) -> list[str]:
    """Return where a scheduler states another training than a card; see `training_facts` for the facts."""
    fields, config = scheduler_fields(stated)
    if fields is EDM:
        return [f"scheduler class {named(stated.get('_class_name'))}, expected one with betas"]
    found = []
    for name, wanted in {"rescale_betas_zero_snr": False, **facts}.items():
        value = config.get(name, fields[name].default)
        if not same(value, wanted):
            found.append(f"{name} {named(value)}, expected {named(wanted)}")
    return found


def check_training(stated: Config, card: DiffusionCard) -> list[str]:
    """Return where a scheduler states another training than a card; its own betas are compared, too."""
    facts = training_facts(card)
    if stated.get("trained_betas") is None:
        return training_conflicts(stated, facts)
    betas_of_card(stated["trained_betas"], card.schedule)
    return training_conflicts(stated, {"prediction_type": facts["prediction_type"]})


def latent_statement(config: Config, channels: int, *, sigma_data: float | None = None) -> Stated:
    """Return the scale and the statistics of the latents that an autoencoder's config.json states.

    Args:
        config: The content of config.json.
        channels: Channels of the latents.
        sigma_data: Standard deviation of the data that EDM noises; the latents of this library have 1.

    Raises:
        ValueError: If an entry is no finite number, or a shift and means are stated together.
    """
    stated = Stated()
    if config.get("scaling_factor") is not None:
        scale = positive_number("scaling_factor", config["scaling_factor"])
        stated = stated._replace(latent_scale=scale / (sigma_data or 1.0))
    elif sigma_data is not None:
        raise ValueError(
            "scaling_factor: expected the scale of the latents beside an EDM schedule, it is absent"
        )
    mean, std = (numbers_of(config, name, channels) for name in ("latents_mean", "latents_std"))
    if bool(mean) != bool(std):
        raise ValueError("latents_mean and latents_std: expected both or none of them")
    if any(not value > 0 for value in std):
        raise ValueError(f"latents_std: expected positive numbers, got {named(std)}")
    shift = config.get("shift_factor")
    shift = 0.0 if shift is None else finite_number("shift_factor", shift)
    if shift and mean:
        raise ValueError("shift_factor and latents_mean: expected one of them, both are stated")
    return stated._replace(latent_mean=(shift,) * channels if shift else mean, latent_std=std)


def numbers_of(config: Config, name: str, channels: int) -> tuple[float, ...]:
    """Return a number for each channel from a configuration; none if the field is absent or null."""
    values = config.get(name)
    if values is None:
        return ()
    if not isinstance(values, list) or len(values) != channels:
        raise ValueError(f"{name}: expected {channels} numbers, one for each channel, got {named(values)}")
    return tuple(finite_number(name, value) for value in values)


def tokenizer_statement(folder: Path, length: int | None) -> tuple[int | None, tuple[str, ...]]:
    """Return the padding token that the files of CLIP's tokenizer state, and warnings about unknown fields.

    Args:
        folder: The folder of the tokenizer; nothing is read if it is absent.
        length: Number of tokens that texts are padded to; None if the card leaves it open.

    Raises:
        ValueError: If the tokenizer is not CLIP's, or splits texts otherwise.
    """
    path = folder / "tokenizer_config.json"
    stated = dict(read_json(path)) if path.is_file() else {}
    special = folder / "special_tokens_map.json"
    if special.is_file() and "added_tokens_decoder" not in stated:  # then it takes precedence
        stated |= read_json(special)
    if not stated:
        return None, ()
    stated = {key: value.get("content") if key.endswith("_token") and isinstance(value, dict) else value
              for key, value in stated.items()}  # fmt: skip
    limit = stated.get("model_max_length")
    open_ended = limit is None or (isinstance(limit, int | float) and limit >= UNLIMITED)
    expected = {"model_max_length": ANY if open_ended or length is None else length}
    findings = judge_fields(stated, CLIP_TOKENIZER, expected)
    if wrong := conflicts(findings):
        raise ValueError(f"{str(folder)!r} is another tokenizer than CLIP's: {'; '.join(wrong)}")
    check_vocabulary(folder)
    pad = str(stated.get("pad_token") or TEXT_END)
    ids = {TEXT_START: 49406, TEXT_END: 49407}
    if pad not in ids:
        ids = {symbol: i for i, symbol in enumerate(all_symbols())}
    if pad not in ids:
        raise ValueError(f"{str(folder)!r}: pad_token {named(pad)} is not a token of CLIP's vocabulary")
    return ids[pad], warnings_of(findings, f"{str(path)!r}")


def check_vocabulary(folder: Path) -> None:
    """Raise ValueError if a tokenizer's vocabulary is not that of CLIP, which texts are split by.

    It is that of vocab.json, or else of tokenizer.json; without either nothing is compared.
    """
    path = next(
        (folder / name for name in ("vocab.json", "tokenizer.json") if (folder / name).is_file()), None
    )
    if path is None:
        return
    found = read_json(path, most=VOCABULARY_BYTES)
    if path.name == "tokenizer.json":
        model = found.get("model")
        found = model.get("vocab", {}) if isinstance(model, dict) else {}
    wanted = {symbol: i for i, symbol in enumerate([*all_symbols()[:-2], TEXT_START, TEXT_END])}
    if found != wanted:
        wrong = next((each for each in wanted if found.get(each) != wanted[each]), "one that CLIP's lacks")
        raise ValueError(f"{str(path)!r} is another vocabulary than CLIP's: its token {named(wrong)} differs")
