"""Every field of the peers' configurations has an entry with the peer's default; others are refused."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from transformers.configuration_utils import PretrainedConfig

from ldm.catalog.shapes import DECODERS, UNETS, UPSAMPLERS, VAES
from ldm.models.clip.towers import TextConfig, VisionConfig
from ldm.models.control.control_net import ControlNetConfig
from ldm.models.control.t2i_adapter import T2IAdapterConfig
from ldm.models.control.union import UnionConfig
from ldm.models.text.bert import BertConfig
from ldm.models.text.xlmr import XLMRConfig
from ldm.models.unclip.prior import PriorConfig
from ldm.registry.latent.writing import DIFFUSERS_PIPELINES
from ldm.registry.unclip.layouts import UNCLIP_PIPELINES
from ldm.support.strict_json import read_json
from ldm.weights.adapters.peft_config import check_config
from ldm.weights.fields.adapters import PEFT_KINDS
from ldm.weights.fields.dalle import DALLE_MINI
from ldm.weights.fields.judge import Field, conflicts, judge_fields, same, warnings_of
from ldm.weights.fields.networks import NETWORK_CLASSES
from ldm.weights.fields.pipelines import COMPONENTS, PIPELINE_OPTIONS
from ldm.weights.fields.schedulers import DISCRETE, DISCRETE_CLASSES, EDM, EDM_CLASSES, OTHER_TRAININGS
from ldm.weights.fields.texts import CLIP_PIXELS, CLIP_TOKENIZER, ENCODERS
from ldm.weights.formats.diffusers_check import CLASSES, check_component, check_processor, expected_fields
from ldm.weights.formats.diffusers_folder import Component

PEERS: dict[str, Any] = {
    **{name: getattr(diffusers, name, None) for name in NETWORK_CLASSES},
    "UnCLIPTextProjModel": UnCLIPTextProjModel,
    "StableUnCLIPImageNormalizer": StableUnCLIPImageNormalizer,
}
CONFIGS: dict[str, Any] = {
    "CLIPTextModel": transformers.CLIPTextConfig,
    "CLIPTextModelWithProjection": transformers.CLIPTextConfig,
    "CLIPVisionModel": transformers.CLIPVisionConfig,
    "CLIPVisionModelWithProjection": transformers.CLIPVisionConfig,
    "MultilingualCLIP": MCLIPConfig,
    "LDMBertModel": LDMBertConfig,
}
# Networks of each class, whose configuration is compared.
OWN: dict[str, object] = {
    "UNet2DModel": UNETS["celebahq"],
    "UNet2DConditionModel": UNETS["sdxl"],
    "T2IAdapter": T2IAdapterConfig(),
    "ControlNetModel": ControlNetConfig.of_unet(UNETS["sdxl"]),
    "ControlNetUnionModel": UnionConfig.of_unet(UNETS["sdxl"]),
    "AutoencoderKL": VAES["kl-f8"],
    "VQModel": VAES["vq-f4"],
    "AutoencoderTiny": VAES["taesd"],
    "PriorTransformer": PriorConfig(),
    "UnCLIPTextProjModel": DECODERS["karlo"],
    "StableUnCLIPImageNormalizer": None,
    "CLIPTextModel": TextConfig(embed_dim=None),
    "CLIPTextModelWithProjection": TextConfig(activation="gelu"),
    "CLIPVisionModel": VisionConfig(),
    "CLIPVisionModelWithProjection": VisionConfig(),
    "MultilingualCLIP": XLMRConfig(),
    "LDMBertModel": BertConfig(),
}
# Schedulers with betas that no folder of a model names: they invert a process, or fill in holes.
ELSEWHERE = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "RePaintScheduler")


def defaults_of(peer: Any) -> dict[str, Any]:
    """Return the arguments of a class and their defaults."""
    parameters = inspect.signature(peer.__init__).parameters.values()
    return {
        each.name: None if each.default is inspect.Parameter.empty else each.default
        for each in parameters
        if each.name not in ("self", "kwargs", "args") and each.kind is not inspect.Parameter.VAR_KEYWORD
    }


def assert_known(theirs: dict[str, Any], fields: dict[str, Field], own: dict[str, Any] | None = None) -> None:
    """Assert that a table has every field, with the peer's default where a default decides anything."""
    missing = set(theirs) - set(fields)
    assert not missing, f"no entry for {sorted(missing)}"
    for name, default in theirs.items():
        field = fields[name]
        if field.action in ("shapes", "ignored") or name == "scaling_factor":  # absent: the card's
            continue
        if name == "timestep_spacing":  # only one spacing belongs to a training
            assert default != "trailing"
            continue
        assert same((own or {}).get(name, field.default), default), name


@pytest.mark.parametrize("name", NETWORK_CLASSES)
def test_every_field_of_the_networks_of_diffusers_is_known(name: str) -> None:
    assert_known(defaults_of(PEERS[name]), dict(NETWORK_CLASSES[name]))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_field_of_the_encoders_of_transformers_is_known(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {key: value for key, value in CONFIGS[name]().to_dict().items() if not key.startswith("_")}
    theirs |= dict.fromkeys(defaults_of(PretrainedConfig))
    named = defaults_of(CONFIGS[name]) if name in ("MultilingualCLIP", "LDMBertModel") else {}
    assert_known({**dict.fromkeys(named), **theirs}, dict(ENCODERS[name]))


@pytest.mark.parametrize("name", [*DISCRETE_CLASSES, *EDM_CLASSES])
def test_every_field_of_the_schedulers_is_known(name: str) -> None:
    theirs = defaults_of(getattr(diffusers, name))
    fields = EDM if name in EDM_CLASSES else DISCRETE
    assert_known(theirs, dict(fields), dict(DISCRETE_CLASSES.get(name, {})))


def test_every_scheduler_is_known_or_belongs_to_another_training() -> None:
    known = {*DISCRETE_CLASSES, *EDM_CLASSES, *ELSEWHERE}
    for name in dir(diffusers.schedulers):
        peer = getattr(diffusers.schedulers, name)
        if not isinstance(peer, type) or name.startswith("Flax") or not name.endswith("Scheduler"):
            continue
        assert (name in known) != name.startswith(tuple(OTHER_TRAININGS)), name


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_every_field_of_the_configurations_of_peft_is_known(kind: str) -> None:
    peer = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]()
    fields = dict(PEFT_KINDS[kind])
    theirs = {each.name: getattr(peer, each.name) for each in dataclasses.fields(peer)}
    theirs |= {"peft_type": fields["peft_type"].default}  # that of the kind
    assert_known(theirs, fields)


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_a_configuration_as_peft_writes_it_is_followed(kind: str, tmp_path: Path) -> None:
    peer = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](target_modules=["to_q"])
    peer.save_pretrained(tmp_path)
    assert check_config(read_json(tmp_path / "adapter_config.json"), "it") == ()


# The fields of DalleBartConfig in dalle-mini 0.1, which is not a requirement of the tests.
DALLE_FIELDS = """
normalize_text encoder_vocab_size image_vocab_size image_length max_text_length encoder_layers
encoder_ffn_dim encoder_attention_heads decoder_layers decoder_ffn_dim decoder_attention_heads
activation_function d_model dropout attention_dropout activation_dropout init_std scale_embedding
gradient_checkpointing use_scan use_cache is_encoder_decoder forced_eos_token_id tie_word_embeddings
do_sample use_bias ln_type ln_positions use_head_scale use_cosine_attention tau_init
use_absolute_position_embeddings use_swin_position_embeddings use_deepnet_scaling use_subln_init
use_glu use_alibi sinkhorn_iters use_final_ln_encoder use_final_ln_decoder force_ln_scale
decoder_start_token_id bos_token_id pad_token_id eos_token_id min_length max_length head_scale
""".split()


def test_every_field_of_dalle_mini_is_known() -> None:
    assert set(DALLE_FIELDS) <= set(DALLE_MINI)
    theirs = dict.fromkeys(defaults_of(PretrainedConfig))
    assert set(theirs) <= set(DALLE_MINI)


def test_every_option_of_the_pipelines_is_known() -> None:
    classes = {*DIFFUSERS_PIPELINES.values(), "StableDiffusionXLInstructPix2PixPipeline"}
    for name in classes:
        options = set(defaults_of(getattr(diffusers, name)))
        assert options <= {*COMPONENTS, *PIPELINE_OPTIONS}, name
    for names in UNCLIP_PIPELINES.values():
        for name, components in names.items():
            # what is not a part: the tokenizers, and how images are prepared for CLIP
            rest = set(defaults_of(getattr(diffusers, name))) - set(components)
            rest = {each.removeprefix("prior_") for each in rest}
            assert rest <= {"tokenizer", "feature_extractor", "image_processor", "scheduler", *COMPONENTS}, (
                name
            )


def test_every_field_of_the_tokenizer_and_of_the_image_processor_is_known(tmp_path: Path) -> None:
    theirs = transformers.CLIPImageProcessor().to_dict()
    assert not set(theirs) - set(CLIP_PIXELS)
    tokenizer = {
        name: value
        for name, value in defaults_of(transformers.CLIPTokenizer).items()
        if name not in ("vocab", "merges")
    }
    assert_known(tokenizer, dict(CLIP_TOKENIZER))


def other_than(value: object) -> object:
    """Return a value of the same kind that a configuration could have instead."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list | tuple):
        return [other_than(entry) for entry in value]
    return "something_else"


def own_config(name: str) -> dict[str, Any]:
    """Return the configuration that fits a network, with the fields that shapes do not determine."""
    expected = expected_fields(OWN[name])
    return {
        key: expected.get(key, field.default)
        for key, field in CLASSES[name].items()
        if field.action == "card" and type(expected.get(key)) is not object
    } | {key: field.accepted[0] for key, field in CLASSES[name].items() if field.action == "fixed"}


def check(name: str, config: dict[str, Any]) -> tuple[str, ...]:
    component = Component(path=Path("part"), class_name=name, config=config, tensors={}, files=())
    return check_component("part", OWN[name], component)


DECIDING = [
    (name, key) for name in CLASSES for key in CLASSES[name] if CLASSES[name][key].action in ("card", "fixed")
]


@pytest.mark.parametrize(("name", "key"), DECIDING)
def test_a_field_that_decides_what_is_computed_is_compared(name: str, key: str) -> None:
    config = own_config(name)
    assert check(name, config) == ()
    wrong = other_than(config[key])
    with pytest.raises(ValueError, match=rf"'part/config.json' does not fit the part: {key} .*, expected"):
        check(name, config | {key: wrong})


def test_decoders_and_upsamplers_of_unclip_are_compared() -> None:
    for config, fields in (
        (DECODERS["karlo"], {"class_embed_type": "identity", "attention_head_dim": 64}),
        (
            DECODERS["kandinsky21"],
            {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"},
        ),
        (DECODERS["kandinsky22"], {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}),
    ):
        expected = expected_fields(config)
        assert expected.items() >= fields.items() and expected["resnet_time_scale_shift"] == "scale_shift"
    assert expected_fields(UPSAMPLERS["karlo-sr"])["resnet_time_scale_shift"] == "default"


def test_null_is_the_default_and_an_alias_is_the_same() -> None:
    base = own_config("UNet2DConditionModel")
    for fields in (
        {"class_embeddings_concat": None},
        {"act_fn": "swish"},
        {"act_fn": None},
        {"norm_eps": 1e-05},
    ):
        assert check("UNet2DConditionModel", base | fields) == ()
    heads = {"attention_head_dim": [5, 10, 20]}
    assert check("UNet2DConditionModel", base | heads) == ()


def test_what_no_table_knows_is_reported_unless_it_is_off() -> None:
    base = own_config("UNet2DConditionModel")
    off = {"a": None, "b": False, "c": "", "d": [], "e": {}, "_private": 3}
    assert check("UNet2DConditionModel", base | off) == ()
    (note,) = check("UNet2DConditionModel", base | {"new_attention": "fancy", "turn": "\x1b[31m" + "x" * 999})
    assert "new_attention fancy" in note and "\x1b" not in note and len(note) < 400


def test_the_class_of_a_component_must_be_known() -> None:
    component = Component(path=Path("unet"), class_name="MyUNet", config={"a": 1}, tensors={}, files=())
    with pytest.raises(ValueError, match="the class MyUNet of the unet.*UNet2DConditionModel"):
        check_component("unet", OWN["UNet2DModel"], component)


@pytest.mark.parametrize(
    ("value", "wanted", "equal"),
    [
        (8, [8, 8], True),
        ([8, 8], 8, True),
        ([8, 4], 8, False),
        ([], 8, False),
        ((1, 2), [1, 2], True),
        (True, 1, False),
        (1, True, False),
        (0, False, False),
        (1.0, 1, True),
        (None, None, True),
        ("silu", ["silu"], True),
        ({"a": 1}, {"a": 1}, True),
        (float("nan"), 1.0, False),
    ],
)
def test_equality_of_values(value: object, wanted: object, equal: bool) -> None:
    assert same(value, wanted) is equal


def test_pixels_of_the_image_tower() -> None:
    theirs = transformers.CLIPImageProcessor().to_dict()
    theirs["resample"] = int(theirs["resample"])
    assert check_processor(theirs, VisionConfig(), "pixels") == ()
    for change in (
        {"image_mean": [0.5, 0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0.5]},
        {"resample": 2},
        {"do_center_crop": False},
        {"rescale_factor": 1 / 127.5},
        {"size": {"shortest_edge": 256}},
        {"size": {"height": 224, "width": 256}},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            check_processor(theirs | change, VisionConfig(), "pixels")


def test_judging_without_a_card_compares_only_what_is_fixed() -> None:
    stated = {"num_attention_heads": 7, "added_emb_type": "x"}
    findings = judge_fields(stated, NETWORK_CLASSES["PriorTransformer"])
    assert conflicts(findings) == ["added_emb_type x, expected prd"]
    assert warnings_of(findings, "here") == ()
