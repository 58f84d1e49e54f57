"""Published shapes: their published parameter counts, and the names and shapes of the original files."""

from __future__ import annotations

import math

import original_keys
import pytest
import torch

from ldm.catalog.shapes import BERTS, LABEL_SHAPES, UNETS, VAES
from ldm.models.labels import LabelConditioner
from ldm.models.meta import on_meta
from ldm.models.text.bert import LDMBert
from ldm.models.tiny import AutoencoderTiny, TinyConfig
from ldm.models.unet import UNet
from ldm.models.vae import AutoencoderKL, VAEConfig
from ldm.models.vq import VQConfig, VQModel
from ldm.support.config import build, to_dict
from ldm.weights.keymap import file_shapes
from ldm.weights.rules.bert import bert_table
from ldm.weights.rules.unet import unet_table
from ldm.weights.rules.vae import vae_table

# name: number of parameters, and of tensors in the original layout if known
UNET_COUNTS = {
    "sd1": (859_520_964, 686),
    "sd1-inpaint": (859_535_364, 686),
    "instruct-pix2pix": (859_532_484, 686),
    "sd1-lcm": (859_602_884, 687),
    "sd2": (865_910_724, 686),
    "sd2-inpaint": (865_925_124, 686),
    "sd2-depth": (865_913_604, 686),
    "unclip-h": (870_173_124, 690),
    "unclip-l": (869_517_764, 690),
    "x4": (473_398_020, 687),
    "sdxl": (2_567_463_684, 1680),
    "sdxl-inpaint": (2_567_478_084, 1680),
    "sdxl-lcm": (2_567_545_604, 1681),
    "sdxl-refiner": (2_259_526_660, 1220),
    "text2img-large": (872_300_484, 686),
    "text2img256": (403_623_939, None),
    "cin256": (394_984_196, None),
    "cin256-v2": (400_920_579, None),
    "layout2img": (246_277_379, None),
    "rdm": (1_335_480_400, None),
    "celebahq": (274_056_163, 368),
    "ffhq": (274_056_163, 368),
    "lsun_beds": (274_056_163, 368),
    "lsun_churches": (294_966_916, 520),
    "inpainting_big": (387_245_827, 416),
    "bsr_sr": (113_622_563, 306),
    "semantic": (215_229_315, None),
}
VAE_COUNTS = {
    "kl-f4": (55_312_063, 204),
    "kl-f8": (83_653_863, 248),
    "kl-f16": (69_610_963, 342),
    "kl-f32": (103_880_131, 436),
    "x4": (55_325_927, 204),
    "vq-f4": (55_322_782, 205),
    "vq-f4-noattn": (53_219_486, 185),
    "vq-f8": (67_717_295, 299),
    "vq-f8-n256": (67_652_783, 299),
    "vq-f16": (69_593_371, 343),
    "vqgan-imagenet-f16-16384": (76_073_859, 343),
}
BERT_COUNTS = {
    "text2img-large": (581_994_042, 422),
    "text2img256": (186_154_682, 422),
    "layout2img": (58_858_496, 214),
}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def size(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def vae_of(config: VAEConfig | VQConfig | TinyConfig) -> torch.nn.Module:
    kind = {VAEConfig: AutoencoderKL, VQConfig: VQModel, TinyConfig: AutoencoderTiny}[type(config)]
    return kind(config)


def test_every_row_is_counted():
    assert UNETS.keys() == UNET_COUNTS.keys()
    assert VAES.keys() == VAE_COUNTS.keys() | {"taesd", "taesdxl"}
    assert BERTS.keys() == BERT_COUNTS.keys()


@pytest.mark.parametrize("name", UNETS)
def test_unets_have_the_published_parameters(name):
    config = UNETS[name]
    with on_meta():
        ours = shapes_of(UNet(config))
    split = {"heads": config.heads, "head_dim": config.head_dim} if config.attention == "block" else {}
    original = file_shapes(unet_table(ours, **split), ours)
    parameters, keys = UNET_COUNTS[name]
    assert size(ours) == size(original) == parameters
    assert keys is None or len(original) == keys


@pytest.mark.parametrize(
    "name", [name for name in UNETS if not name.endswith("-lcm") and name not in ("ffhq", "lsun_beds")]
)
def test_unets_have_the_original_keys(name):
    config = UNETS[name]
    with on_meta():
        ours = shapes_of(UNet(config))
    split = {"heads": config.heads, "head_dim": config.head_dim} if config.attention == "block" else {}
    expected = original_keys.unet(original_keys.UNETS[name][0])
    assert file_shapes(unet_table(ours, **split), ours) == expected


@pytest.mark.parametrize("name", VAE_COUNTS)
def test_first_stages_have_the_published_parameters(name):
    with on_meta():
        ours = shapes_of(vae_of(VAES[name]))
    original = file_shapes(vae_table(ours), ours)
    assert (size(ours), len(ours)) == (size(original), len(original)) == VAE_COUNTS[name]


@pytest.mark.parametrize("name", BERTS)
def test_text_encoders_have_the_published_parameters(name):
    config = BERTS[name]
    with on_meta():
        ours = shapes_of(LDMBert(config))
    logits = config.vocabulary * (config.width + 1)  # in the file, unused
    assert (size(ours) + logits, len(file_shapes(bert_table(ours), ours)) + 2) == BERT_COUNTS[name]


def test_labels_are_one_token_a_class():
    with on_meta():
        shapes = {name: shapes_of(LabelConditioner(config)) for name, config in LABEL_SHAPES.items()}
    assert shapes == {
        "cin256": {"embedding.weight": (1000, 512)},
        "cin256-v2": {"embedding.weight": (1001, 512)},
    }
    config = LABEL_SHAPES["cin256-v2"]
    model = LabelConditioner(config)
    cond = model([3, 1000])
    assert (
        cond.context is not None
        and cond.context.shape == (2, 1, 512)
        and torch.equal(cond.context[1, 0], model.embedding.weight[1000])
    )
    with pytest.raises(ValueError, match="class 1001: expected 0 to 1000"):
        model([1001])


@pytest.mark.parametrize("config", [*UNETS.values(), *VAES.values(), *BERTS.values()])
def test_shapes_survive_as_plain_mappings(config):
    assert build(type(config), to_dict(config)) == config
