"""Bundling of a card and of tiny exports with random weights, in the form that training writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reduced_unclip_families import load
from tiny_latent_diffusion import tiny_model
from tiny_unclip import TEXT, VISION, E, random_network

import ldm
from ldm.__main__ import main
from ldm.catalog.lookup import ASSETS
from ldm.conditioning.conditioner import TextConditioner
from ldm.models.text.bpe import Tokenizer
from ldm.models.unclip.autoregressive import AutoregressiveConfig
from ldm.models.unclip.decoder import DecoderConfig, ImageConditionConfig
from ldm.models.unclip.prior import PriorConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig
from ldm.registry.bundling import gather
from ldm.support.config import read_yaml, to_dict
from ldm.weights.formats.ldm_folder import EMOJI_TEXT, about_part, read_network, write_part, write_text

LENGTH = 16
SETTINGS = {"schedule": "cosine", "timesteps": 1000, "drop": 0.1}
CARD = ASSETS / "emoji-unclip" / "card.yaml"
UNET = UNetConfig(
    in_channels=4,
    out_channels=4,
    channels=(32, 64),
    depth=(0, 1),
    blocks=1,
    heads=None,
    head_dim=16,
    context_dim=24,
    embedded=True,
    scale_shift=True,
)
SR = UNetConfig(
    in_channels=6,
    out_channels=3,
    channels=(32, 32),
    depth=(0, 0),
    mid_depth=0,
    blocks=1,
    heads=1,
    context_dim=None,
    attention="block",
)
AUTOREGRESSIVE = AutoregressiveConfig(
    embed_dim=E,
    text_dim=E,
    length=LENGTH,
    width=32,
    layers=1,
    heads=4,
    head_dim=8,
    components=6,
    buckets=8,
    similarities=4,
)


def exports(place: Path, *, autoregressive: bool = False) -> tuple[dict[str, str], str]:
    """Write the parts; return their folders, and the name of their CLIP."""
    write_part(place / "clip", "vision", random_network(VISION, 2), VISION)
    clip = f"emoji-clip/{read_yaml(place / 'clip' / 'vision.yaml')['sha256'][:12]}"
    write_text(
        place / "text",
        TextConditioner(random_network(TEXT, 1), Tokenizer(), EMOJI_TEXT),
        words=["cat", "red", "apple"],
        clip=clip,
    )
    prior: Any = PriorConfig(embed_dim=E, text_dim=E, length=LENGTH, width=32, layers=1, heads=4, head_dim=8)
    prior = AUTOREGRESSIVE if autoregressive else prior
    write_part(
        place / "prior",
        "prior",
        random_network(prior, 3),
        prior,
        clip=clip,
        diffusion={**SETTINGS, "prediction": "x0"},
    )
    condition = ImageConditionConfig(embed_dim=E, text_dim=E, pooled_dim=E)
    decoder = DecoderConfig(unet=UNET, condition=condition)
    write_part(
        place / "decoder",
        "decoder",
        random_network(decoder, 4),
        decoder,
        clip=clip,
        diffusion={**SETTINGS, "prediction": "v"},
    )
    vae = VAEConfig(channels=(32, 64), blocks=1)
    write_part(place / "vae", "vae", random_network(vae, 5), vae, latent_scale=0.5)
    write_part(
        place / "upsampler",
        "upsampler",
        random_network(SR, 6),
        SR,
        factor=2,
        residual=0.06,
        diffusion={**SETTINGS, "prediction": "v"},
    )
    return {part: str(place / part) for part in ("text", "prior", "decoder", "upsampler")} | {
        "vision": str(place / "clip")
    }, clip


def config(place: Path, **changes: Any) -> Path:
    """Write small exports, and a file with the card of emoji-unclip and their folders."""
    folders, clip = exports(place, autoregressive="similarity" in changes.get("prior", {}))
    card = read_yaml(CARD) | {
        "clip": clip,
        "exports": folders,
        "parts": {"vae": "../vae"},
        "name": "tiny",
        "text": {**TEXTS, "length": LENGTH},
    }
    card["decoder"]["prediction"] = "v"
    for stage, side in (("decoder", 16), ("prior", 16)):
        card[stage] = {
            **card[stage],
            "defaults": {**card[stage]["defaults"], "steps": 3, "height": side, "width": side},
        }
    card["upsamplers"] = [
        {
            **card["upsamplers"][0],
            "defaults": {**card["upsamplers"][0]["defaults"], "steps": 2, "height": 32, "width": 32},
        }
    ]
    path = place / "card.yaml"
    path.write_text(yaml.safe_dump({**card, **changes}), encoding="utf-8")
    return path


TEXTS = {"pad": 0, "masked": True, "pooled": True}


def test_the_parts_that_emoji_unclip_shares_are_those_of_its_card() -> None:
    card, vision = read_yaml(CARD), about_part(ASSETS / "emoji-clip", "vision")
    assert card["clip"] == f"emoji-clip/{vision['sha256'][:12]}" and card["parts"] == {
        "vision": "../emoji-clip",
        **dict.fromkeys(("vae", "layout"), "../emoji-ldm"),
    }
    tower, _ = read_network(ASSETS / "emoji-clip", "vision")
    vae, about = read_network(ASSETS / "emoji-ldm", "vae")
    assert tower.config.embed_dim == 256 and vae.config.factor * 16 == 128 and about["latent_scale"] > 0


def test_a_bundled_unclip_model_generates_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["assemble", str(config(tmp_path)), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    pipe = load(None, weights=tmp_path / "model")
    assert pipe.card.name == "tiny" and pipe.decoder.space.scale == 0.5
    images = pipe.text_to_image("red apple", n=2, progress=False)
    assert images.tensor.shape == (2, 3, 32, 32) and images.tensor.std() > 0.005
    with pytest.warns(UserWarning, match="tiny has never seen 'zeppelin'"):
        pipe.text_to_image("red zeppelin", n=1, upsample=False, progress=False)
    again = pipe.reconstruct(torch.rand(1, 3, 16, 16), steps=2, progress=False)
    assert again.tensor.shape == (1, 3, 16, 16)
    assert main(["a red apple", "--weights", str(tmp_path / "model"), "-o", str(tmp_path / "grid.png")]) == 0
    assert main(["replay", str(tmp_path / "grid.png"), "--weights", str(tmp_path / "model")]) == 0
    assert (tmp_path / "grid.png").read_bytes()[-4000:] == (tmp_path / "grid-replay.png").read_bytes()[-4000:]
    assert main(["inspect", str(tmp_path / "model")]) == 0 and "vae" in capsys.readouterr().out
    random = ldm.load(None, weights=tmp_path / "model", dtype="bfloat16").text_to_image(
        "cat", n=1, progress=False
    )
    assert random.tensor.isfinite().all()


def test_a_bundle_with_an_autoregressive_prior(tmp_path: Path) -> None:
    main(
        [
            "assemble",
            str(config(tmp_path, prior={"similarity": 0.4, "temperature": 1.0})),
            str(tmp_path / "model"),
        ]
    )
    pipe = load(None, weights=tmp_path / "model")
    both = pipe.imagine("red apple", n=2, seed=5, progress=False).vector
    alone = pipe.imagine("red apple", seed=6, progress=False).vector
    assert torch.allclose(both[1], alone[0], atol=1e-4) and not torch.allclose(both[0], both[1], atol=1e-2)
    assert torch.allclose(
        pipe.prior.net.codes.decode(pipe.prior.net.codes.encode(both)), both, atol=1e-5
    )  # each is one of its codes
    text = pipe.clip.text_embedding(["red apple"]).vector[0]
    scores = [
        float(pipe.imagine("red apple", candidates=k, progress=False).vector[0] @ text) for k in (1, 5, 20)
    ]
    assert scores[0] <= scores[1] <= scores[2] and scores[2] > scores[0]
    likeliest = [
        pipe.imagine("red apple", seed=s, prior_temperature=0, progress=False).vector for s in (1, 2)
    ]
    assert torch.allclose(*likeliest, atol=1e-5)
    images = pipe.text_to_image("red apple", n=1, prior_similarity=0.9, progress=False)
    assert (
        images.recipe["prior_similarity"] == 0.9
        and images.recipe["replayable"]
        and images.tensor.shape == (1, 3, 32, 32)
    )
    ldm.save(pipe, tmp_path / "saved")
    again = load(None, weights=tmp_path / "saved")
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipe.state_dict().values(), again.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="the prior has no option 'steps'; .*similarity"):
        pipe.imagine("cat", prior_steps=3)
    with pytest.raises(ValueError, match="has no guidance"):
        pipe.imagine("cat", negative="dog")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"clip": "emoji-clip/000000000000"},
            ValueError,
            "trained on 'emoji-clip/.*the card uses 'emoji-clip/000000000000'|named by the hash of its image",
        ),
        ({"exports": {"decoders": "x"}}, ValueError, "exports: 'decoders'; did you mean 'decoder'"),
        ({"exports": {"decoder": "nowhere"}}, FileNotFoundError, "no decoder in 'nowhere'"),
        ({"prior": {"similarity": 0.4}, "exports": None}, ValueError, "exports: expected a mapping"),
        ({"exports": {"decoder": 5}}, ValueError, "exports: expected a mapping of parts to folders, got"),
        ({"exports": ["x" * 5000]}, ValueError, r"exports: expected a mapping.{,400}$"),
        ({"parts": {}}, ValueError, "makes 4 channels, pixels, as there is no autoencoder"),
        ({"family": "latent"}, ValueError, "unknown key|missing key"),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_leave_no_file(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gather(config(tmp_path, **change), tmp_path / "model")
    assert not [*(tmp_path / "model").glob("*")]


def test_another_schedule_prediction_or_enlargement_is_refused(tmp_path: Path) -> None:
    path = config(tmp_path)
    card = yaml.safe_load(path.read_text(encoding="utf-8"))
    for stage, field, value, message in (
        (
            "decoder",
            "prediction",
            "eps",
            "decoder: it was trained with prediction 'v', but the card states 'eps'",
        ),
        (
            "prior",
            "schedule",
            {"kind": "linear", "beta_start": 1e-4, "beta_end": 0.02},
            "prior: it was trained with schedule 'cosine'",
        ),
    ):
        path.write_text(yaml.safe_dump({**card, stage: {**card[stage], field: value}}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            gather(path, tmp_path / "model")
    defaults = {**card["upsamplers"][0]["defaults"], "height": 64}
    path.write_text(
        yaml.safe_dump({**card, "upsamplers": [{**card["upsamplers"][0], "defaults": defaults}]}),
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="enlarge 2 times, but the card enlarges from 16 to 64"):
        gather(path, tmp_path / "model")
    path.write_text(
        yaml.safe_dump({**card, "upsamplers": [{**card["upsamplers"][0], "residual": None}]}),
        encoding="utf-8",
    )
    with pytest.raises(
        ValueError, match="upsampler: it was trained with residual 0.06, but the card states None"
    ):
        gather(path, tmp_path / "model")


def latent_config(place: Path, **changes: Any) -> Path:
    """Write the parts of a tiny latent diffusion model, and a file with its card and their folders."""
    pipe = tiny_model("tiny")
    write_part(place / "vae", "vae", pipe.vae, pipe.vae.config, latent_scale=pipe.latent_scale)
    net = pipe.denoiser.net
    write_part(place / "unet", "unet", net, net.config, diffusion={**SETTINGS, "prediction": "v"})
    assert isinstance(pipe.text, TextConditioner)
    write_text(place / "text", pipe.text, words=sorted(pipe.text.known_words or ()))
    folders = {"vae": "vae", "unet": "unet", "text": "text", "draft": "text"}
    exports = {part: str(place / folder) for part, folder in folders.items()}
    path = place / "card.yaml"
    path.write_text(yaml.safe_dump({**to_dict(pipe.card), "exports": exports, **changes}), encoding="utf-8")
    return path


def test_a_bundled_latent_diffusion_model_generates_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["assemble", str(latent_config(tmp_path)), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    pipe = ldm.load(weights=tmp_path / "model")
    assert pipe.card.name == "tiny" and pipe.latent_scale == 0.5 and pipe.text.draft is not None
    assert pipe.text_to_image("red apple", progress=False).tensor.shape == (1, 3, 32, 32)


def test_latent_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    exports = yaml.safe_load(latent_config(tmp_path).read_text(encoding="utf-8"))["exports"]
    without_draft = {part: folder for part, folder in exports.items() if part != "draft"}
    for changes, message in (
        ({"prediction": "eps"}, "unet: it was trained with prediction 'v', but the card states 'eps'"),
        ({"exports": without_draft}, "it reads 8 channels, but the latent has 4 and the draft 0"),
        (
            {"exports": {**exports, "prior": "x"}},
            "exports: 'prior'; Choices: draft, layout, text, unet, vae",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gather(latent_config(tmp_path, **changes), tmp_path / "model")
        assert not [*(tmp_path / "model").glob("*")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", ["model", "unet"])
def test_a_failed_bundle_leaves_models_and_exports_as_they_were(tmp_path: Path, target: str) -> None:
    """The folder holds a good model, or it is that of one of the exports."""
    config = latent_config(tmp_path / "parts")
    folder = gather(config, tmp_path / "model") if target == "model" else tmp_path / "parts" / target
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    exports = read_yaml(config)["exports"]
    for changes in (
        {"prediction": "eps"},
        {"exports": {**exports, "vae": str(tmp_path / "nowhere")}},
        {"exports": {part: source for part, source in exports.items() if part != "draft"}},
        {"defaults": {"sampler": "none"}},
    ):
        wrong = latent_config(tmp_path / "parts", **changes)
        before = contents(tmp_path)
        with pytest.raises((ValueError, FileNotFoundError)):
            gather(wrong, folder)
        assert contents(tmp_path) == before


def test_a_model_may_be_bundled_into_the_folder_of_an_export(tmp_path: Path) -> None:
    config = latent_config(tmp_path / "parts")
    folder = tmp_path / "parts" / "unet"
    before = contents(folder)
    gather(config, folder)
    assert before.items() <= contents(folder).items()
    assert (
        ldm.load(weights=folder).text_to_image("red apple", steps=1, progress=False).tensor.isfinite().all()
    )
    others = {name: contents(tmp_path / "parts" / name) for name in ("vae", "text")}
    assert all(others.values())
