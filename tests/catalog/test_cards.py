"""Cards of the published models: parameter counts and conventions; cards that a user registers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import ldm
from ldm.catalog.cards import AutoencoderCard, ModelCard
from ldm.catalog.families import FAMILIES
from ldm.catalog.lookup import REGISTERED, find_card, find_model, known_cards, read_card
from ldm.catalog.published import AUTOENCODERS, CARDS, MODELS
from ldm.support.config import build, to_dict
from ldm.weights.parts import build_network, shapes_of

KL8, L, H, G = 83_653_863, 123_060_480, 340_387_840, 694_659_840
VQ4, VQ8 = 55_322_782, 67_717_295
SD1, SD2 = 859_520_964, 865_910_724
BERT_640 = 186_154_682 - 30_522 * 641  # the published counts, without the unused projection to the vocabulary
COUNTS: dict[str, dict[str, int]] = {
    **{
        name: {"unet": SD1, "vae": KL8, "text": L}
        for name in ("sd-v1-1", "sd-v1-2", "sd-v1-3", "sd-v1-4", "sd-v1-5")
    },
    "sd-v1-5-inpainting": {"unet": 859_535_364, "vae": KL8, "text": L},
    "instruct-pix2pix": {"unet": 859_532_484, "vae": KL8, "text": L},
    "lcm-sd-v1-5": {"unet": 859_602_884, "vae": KL8, "text": L},
    **{
        name: {"unet": SD2, "vae": KL8, "text": H}
        for name in ("sd-v2-base", "sd-v2", "sd-v2-1-base", "sd-v2-1", "sd-turbo")
    },
    "sd-v2-inpainting": {"unet": 865_925_124, "vae": KL8, "text": H},
    "sd-v2-depth": {"unet": 865_913_604, "vae": KL8, "text": H},
    "sd-x4-upscaler": {"unet": 473_398_020, "vae": 55_325_927, "text": H},
    **{
        name: {"unet": 2_567_463_684, "vae": KL8, "text": L, "text2": G}
        for name in ("sdxl-base", "sdxl-turbo")
    },
    "sdxl-inpainting": {"unet": 2_567_478_084, "vae": KL8, "text": L, "text2": G},
    "sdxl-refiner": {"unet": 2_259_526_660, "vae": KL8, "text2": G},
    "lcm-sdxl": {"unet": 2_567_545_604, "vae": KL8, "text": L, "text2": G},
    "ldm-text2img-large": {"unet": 872_300_484, "vae": KL8, "text": 542_895_360},
    "ldm-text2img256": {"unet": 403_623_939, "vae": VQ4, "text": BERT_640},
    **{name: {"unet": 274_056_163, "vae": VQ4} for name in ("ldm-celebahq", "ldm-ffhq", "ldm-lsun-beds")},
    "ldm-lsun-churches": {"unet": 294_966_916, "vae": KL8},
    "ldm-cin256": {"unet": 394_984_196, "vae": VQ8, "class": 512_000},
    "ldm-cin256-v2": {"unet": 400_920_579, "vae": VQ4, "class": 512_512},
    "ldm-inpainting-big": {"unet": 387_245_827, "vae": 53_219_486},
    "ldm-bsr-sr": {"unet": 113_622_563, "vae": VQ4},
    "kl-f4": {"vae": 55_312_063},
    "kl-f8": {"vae": KL8},
    "kl-f16": {"vae": 69_610_963},
    "kl-f32": {"vae": 103_880_131},
    "vq-f4": {"vae": VQ4},
    "vq-f4-noattn": {"vae": 53_219_486},
    "vq-f8": {"vae": VQ8},
    "vq-f8-n256": {"vae": 67_652_783},
    "vq-f16": {"vae": 69_593_371},
    "vqgan-imagenet-f16-16384": {
        "vae": 46_709_891 + 29_298_176 + 65_792
    },  # detokenizer, encoder, convolution
}


def test_every_network_of_every_card_has_the_published_count() -> None:
    assert set(COUNTS) | {"taesd", "taesdxl"} == set(CARDS)
    counted: dict[object, int] = {}
    for name, expected in COUNTS.items():
        card = CARDS[name]
        configs = {"vae": card.config()} if isinstance(card, AutoencoderCard) else card.networks.configs()
        for config in configs.values():
            if config not in counted:
                counted[config] = sum(math.prod(shape) for shape in shapes_of(build_network(config)).values())
        assert {part: counted[config] for part, config in configs.items()} == expected, name


@pytest.mark.parametrize("card", MODELS, ids=lambda card: card.name)
def test_conventions(card: ModelCard) -> None:
    schedule = card.schedule.make()
    assert len(schedule) == 1000
    assert len(card.grids().grid(schedule, card.defaults.steps, card.defaults.sampler)) == card.defaults.steps
    for sampler in ("ddim", "euler", "dpmpp_2m", "plms"):  # another sampler gets its own grid
        assert len(card.grids().grid(schedule, 20, sampler)) == 20
    assert card.family in FAMILIES and not FAMILIES[card.family].refusal
    assert card.hub is None or card.hub.sha256 is None or re.fullmatch("[0-9a-f]{64}", card.hub.sha256)
    assert (
        build(ModelCard, yaml.safe_load(yaml.safe_dump(to_dict(card))) | {"convention": card.convention})
        == card
    )


def test_what_tells_models_of_one_family_apart() -> None:
    def stated(name: str) -> tuple[object, ...]:
        card = find_model(name)
        return (
            card.prediction,
            card.schedule.beta_end,
            card.latent_scale,
            card.text.pad,
            card.text.layer,
            card.text.final_norm,
            card.defaults.height,
        )

    assert stated("sd-v1-5") == ("eps", 0.012, 0.18215, 49407, -1, True, 512)
    assert stated("sd-v2-1") == (
        "v",
        0.012,
        0.18215,
        0,
        -1,
        True,
        768,
    )  # 23 blocks: the penultimate layer of the tower
    assert stated("sd-v2-1-base") == ("eps", 0.012, 0.18215, 0, -1, True, 512)
    assert stated("sdxl-base") == ("eps", 0.012, 0.13025, 49407, -2, False, 1024)
    assert stated("sd-x4-upscaler")[:3] == ("v", 0.02, 0.08333)
    assert stated("ldm-celebahq")[:3] == ("eps", 0.0195, 1.0)
    assert stated("ldm-lsun-churches")[:3] == ("eps", 0.0155, None)  # its file states the scale
    card = find_model("sdxl-base")
    assert card.text2 is not None and (
        card.text2.layer,
        card.text2.final_norm,
        card.text2.pad,
        card.text2.pooled,
    ) == (-2, False, 0, True)
    assert card.zero_negative and not find_model("sdxl-refiner").zero_negative
    grids = {name: find_model(name).grids() for name in ("sd-v1-5", "sd-turbo", "ldm-bsr-sr")}
    schedule = card.schedule.make()
    assert grids["sd-v1-5"].grid(schedule, 50, "ddim").t[:2].tolist() == [981, 961]
    assert grids["sd-turbo"].grid(schedule, 1, "euler_a").t.tolist() == [999]
    assert grids["ldm-bsr-sr"].options["ddim"] == {"eta": 1.0}


def test_names() -> None:
    assert {card.name for card in (*MODELS, *AUTOENCODERS)} <= set(ldm.list_models())
    with pytest.raises(ValueError, match="unknown model 'sd-v15'; did you mean 'sd-v1-5'"):
        find_card("sd-v15")
    with pytest.raises(ValueError, match="'rdm768' .*is a family of files that is known"):
        find_card("rdm768")
    with pytest.raises(ValueError, match="autoencoder alone"):
        find_model("taesd")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    before = dict(REGISTERED)
    yield tmp_path / "own.yaml"
    REGISTERED.clear()
    REGISTERED.update(before)


def test_a_registered_card(own: Path) -> None:
    schedule = "{kind: scaled_linear, beta_start: 1e-3, beta_end: 0.01}"
    own.write_text(
        f"base: sd-v2-base\nname: my-model\nsummary: mine\nprediction: v\nschedule: {schedule}\n",
        encoding="utf-8",
    )
    card = ldm.register(own)
    assert (card.name, card.prediction, card.schedule.beta_end, card.family, card.hub) == (
        "my-model",
        "v",
        0.01,
        "sd2",
        None,
    )
    assert "my-model" in ldm.list_models() and find_model("my-model") == card
    own.write_text(own.read_text(encoding="utf-8").replace("0.01", "0.02"), encoding="utf-8")
    assert ldm.register(own).schedule.beta_end == 0.02  # registered cards may be replaced


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: sd-v1-5\nname: sd-v1-4\n", "'sd-v1-4' is taken"),
        ("base: sd-v1-5\nname: emoji-ldm\n", "'emoji-ldm' is taken"),
        ("base: sd-v1-6\nname: x\n", "did you mean 'sd-v1-5'"),
        ("base: sd-v1-5\nname: x\npredicts: v\n", "unknown key 'predicts'"),
        ("base: sd-v1-5\nname: x\nprediction: w\n", "prediction: 'w'"),
        ("base: sd-v1-5\nname: x\nfamily: rdm768\n", "known but not supported"),
        ("base: sd-v1-5\nname: x\nfamily: sd9\n", "did you mean 'sd"),
        (
            "base: sd-v1-5\nname: x\nnetworks: {unet: sd11, vae: kl-f8}\n",
            "unet: unknown shape 'sd11'; did you mean 'sd1'",
        ),
        ("base: sd-v1-5\nname: x\nnetworks: null\n", "must state its networks"),
        ("base: sd-v1-5\nname: x\nparts: {vea: ../y}\n", "parts: 'vea'; did you mean 'vae'"),
        ("name: x\n", "missing key"),
    ],
)
def test_wrong_cards_are_refused(own: Path, text: str, message: str) -> None:
    own.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ldm.register(own)
    assert "x" not in known_cards()


def test_a_card_names_its_file_in_errors(own: Path) -> None:
    own.write_text("base: sd-v1-5\nname: x\nsteps: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.yaml.*unknown key 'steps'"):
        read_card(own)
