"""The families at reduced width with random weights: written in every layout and read back bit-identical."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reduced_families
import torch
from reduced_families import NETWORKS

import ldm
from ldm.diffusion.schedule import NoiseSchedule
from ldm.registry.inspection import inspect
from ldm.registry.latent.writing import DIFFUSERS_PIPELINES
from ldm.weights.formats.safetensors import read_header, read_safetensors, write_safetensors


def assert_same(a: Any, b: Any) -> None:
    assert a.networks().keys() == b.networks().keys()
    for part, network in a.networks().items():
        theirs = b.networks()[part].state_dict()
        assert network.state_dict().keys() == theirs.keys()
        for name, tensor in network.state_dict().items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), f"{part}: {name}"
    assert a.latent_scale == b.latent_scale


@pytest.mark.parametrize("base", NETWORKS)
def test_a_model_written_in_every_layout_comes_back_bit_for_bit(base: str, tmp_path: Path) -> None:
    card = reduced_families.register(base, tmp_path)
    pipe = reduced_families.load(card.name)
    if base == "ldm-lsun-churches":
        pipe.latent_scale = 0.8127  # the file of this model states it
    options = {"vocabulary": tmp_path / "native" / "vocab.txt"} if "text2img" in base else {}
    for layout, path in (
        ("native", tmp_path / "native"),
        ("original", tmp_path / "one.safetensors"),
        ("diffusers", tmp_path / "folder"),
    ):
        if layout == "diffusers" and card.family not in DIFFUSERS_PIPELINES:
            with pytest.raises(ValueError, match="no pipeline of diffusers takes the family"):
                ldm.save(pipe, path, layout=layout)
            assert not path.exists()
            continue
        assert ldm.save(pipe, path, layout=layout) == path
        again = reduced_families.load(card.name, weights=path, **options)
        assert_same(pipe, again)
        assert again.card == card
    half = reduced_families.load(card.name, weights=tmp_path / "one.safetensors", dtype="bfloat16", **options)
    assert {p.dtype for network in half.networks().values() for p in network.parameters()} == {torch.bfloat16}
    for name, p in pipe.denoiser.net.state_dict().items():
        assert torch.equal(half.denoiser.net.state_dict()[name], p.to(torch.bfloat16))


def test_random_weights_are_the_same_every_time_and_leave_nothing_at_zero_or_one(tmp_path: Path) -> None:
    card = reduced_families.register("sdxl-base", tmp_path)
    a, b = reduced_families.load(card.name), reduced_families.load(card.name)
    assert_same(a, b)
    for part, network in a.networks().items():
        for name, p in network.named_parameters():
            assert not (p == 0).all() and not (p == 1).all(), f"{part}: {name}"
            assert p.isfinite().all() and p.float().std() > 0.01, f"{part}: {name}"
    image = a.text_to_image("a cat", progress=False).tensor
    assert image.std() > 0.01  # no black or grey square


def with_ema(path: Path, target: Path) -> Path:
    """Write a file whose UNet has averages of twice its values, in CompVis' layout."""
    state = dict(read_safetensors(path))
    averages = {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}": 2 * t
        for key, t in state.items()
        if key.startswith("model.diff")
    }
    others = {"model_ema.decay": torch.tensor(0.999), "betas": NoiseSchedule.scaled_linear().betas}
    write_safetensors(target, state | averages | others)
    return target


def test_averaged_weights_by_choice(tmp_path: Path) -> None:
    card = reduced_families.register("sd-v1-5", tmp_path)
    pipe = reduced_families.load(card.name)
    plain = ldm.save(pipe, tmp_path / "plain.safetensors", layout="original")
    both = with_ema(plain, tmp_path / "both.safetensors")
    own = pipe.denoiser.net.conv_in.weight
    for ema, factor in ((None, 2), (True, 2), (False, 1)):
        assert torch.equal(
            reduced_families.load(card.name, weights=both, ema=ema).denoiser.net.conv_in.weight, factor * own
        )
    with pytest.raises(ValueError, match="no averaged"):
        reduced_families.load(card.name, weights=plain, ema=True)


def test_a_checkpoint_is_read_by_the_restricted_reader(tmp_path: Path) -> None:
    card = reduced_families.register("sd-v1-5", tmp_path)
    pipe = reduced_families.load(card.name)
    state = dict(read_safetensors(ldm.save(pipe, tmp_path / "a.safetensors", layout="original")))
    torch.save({"state_dict": state, "global_step": 840_000}, tmp_path / "a.ckpt")
    assert_same(pipe, reduced_families.load(card.name, weights=tmp_path / "a.ckpt"))


def test_half_files_and_variants(tmp_path: Path) -> None:
    card = reduced_families.register("sd-v1-5", tmp_path)
    pipe = reduced_families.load(card.name, dtype="float16")
    assert next(pipe.vae.parameters()).dtype == torch.float32  # autoencoders overflow in float16
    ldm.save(
        reduced_families.load(card.name), tmp_path / "half.safetensors", layout="original", dtype="float16"
    )
    infos, _ = read_header(tmp_path / "half.safetensors")
    assert {info.dtype for info in infos.values()} == {torch.float16}
    folder = ldm.save(
        reduced_families.load(card.name), tmp_path / "folder", layout="diffusers", dtype="float16"
    )
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
    for options in ({"variant": "fp16"}, {}):
        assert_same(
            reduced_families.load(card.name, weights=folder, **options),
            reduced_families.load(card.name, weights=tmp_path / "half.safetensors"),
        )
    with pytest.raises(FileNotFoundError, match="no variant 'bf16'"):
        reduced_families.load(card.name, weights=folder, variant="bf16")


def test_keys_cannot_tell_eps_from_v_so_the_caller_says(tmp_path: Path) -> None:
    card = reduced_families.register("sd-v2-1", tmp_path)
    folder = ldm.save(reduced_families.load(card.name), tmp_path / "v", layout="diffusers")
    assert reduced_families.load(card.name, weights=folder).denoiser.prediction == "v"
    with pytest.raises(ValueError, match="prediction_type v_prediction, expected epsilon"):
        reduced_families.load(card.name, weights=folder, prediction="eps")
    one = ldm.save(reduced_families.load(card.name), tmp_path / "v.safetensors", layout="original")
    assert reduced_families.load(card.name, weights=one, prediction="eps").denoiser.prediction == "eps"
    state = dict(read_safetensors(one))
    torch.save({"state_dict": state, "global_step": 875_000}, tmp_path / "base.ckpt")
    with pytest.warns(UserWarning, match="global_step 875000 is that of a model that predicts eps"):
        reduced_families.load(card.name, weights=tmp_path / "base.ckpt")


def test_what_a_file_states_about_sampling_is_followed(tmp_path: Path) -> None:
    card = reduced_families.register("sd-v1-5", tmp_path)
    pipe = reduced_families.load(card.name)
    state = dict(read_safetensors(ldm.save(pipe, tmp_path / "a.safetensors", layout="original")))
    markers = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    write_safetensors(tmp_path / "v.safetensors", state | markers)
    loaded = reduced_families.load(card.name, weights=tmp_path / "v.safetensors")
    assert (pipe.denoiser.prediction, loaded.denoiser.prediction) == ("eps", "v")
    assert loaded.card.prediction == "v" and loaded.card.schedule.zero_terminal_snr
    assert float(loaded.denoiser.schedule.alphas_cumprod[-1]) == 0
    write_safetensors(tmp_path / "named.safetensors", state, {"modelspec.prediction_type": "v"})
    named = tmp_path / "named.safetensors"
    assert reduced_families.load(card.name, weights=named).denoiser.prediction == "v"
    assert reduced_families.load(card.name, weights=named, prediction="eps").denoiser.prediction == "eps"


def test_a_second_block_that_sd2_does_not_run_is_left_out(tmp_path: Path) -> None:
    card = reduced_families.register("sd-v2-1", tmp_path)
    pipe = reduced_families.load(card.name)
    state = dict(read_safetensors(ldm.save(pipe, tmp_path / "a.safetensors", layout="original")))
    prefix = "cond_stage_model.model."
    last = {
        k.replace("resblocks.1.", "resblocks.2."): torch.zeros_like(t)
        for k, t in state.items()
        if f"{prefix}transformer.resblocks.1." in k
    }
    extra = {f"{prefix}text_projection": torch.zeros(32, 32), f"{prefix}logit_scale": torch.tensor(1.0)}
    write_safetensors(tmp_path / "b.safetensors", state | last | extra)
    assert len(last) == 12
    assert_same(pipe, reduced_families.load(card.name, weights=tmp_path / "b.safetensors"))


NUMBER, PROJECTION = torch.tensor(3.0), torch.zeros(32, 32)
STRAYS = {  # by the programs that write them
    "k-diffusion": {name: torch.ones(1000) for name in ("sigmas", "log_sigmas", "denoiser.log_sigmas")},
    "generative-models": {"denoiser.sigmas": torch.ones(1000), "model_ema.num_updates": NUMBER},
    "ComfyUI": {"model_sampling.sigmas": torch.ones(1000), "model_sampling.log_sigmas": torch.ones(1000)},
    "ComfyUI, CLIP-L": {
        "cond_stage_model.text_projection": PROJECTION,
        "cond_stage_model.text_projection.weight": PROJECTION,
        "cond_stage_model.logit_scale": NUMBER,
        "cond_stage_model.transformer.logit_scale": NUMBER,
    },
    "ComfyUI, SDXL": {
        "conditioner.embedders.0.text_projection": PROJECTION,
        "conditioner.embedders.0.logit_scale": NUMBER,
        "conditioner.embedders.1.logit_scale": NUMBER,
    },
    "trainers": dict.fromkeys(("global_step", "step", "epoch", "iteration", "num_updates", "decay"), NUMBER),
}


@pytest.mark.parametrize(
    "base", ["sd-v1-5", "sd-v2-1", "sd-v2-depth", "sdxl-base", "sdxl-refiner", "ldm-celebahq"]
)
def test_keys_that_common_programs_add_are_left_out(base: str, tmp_path: Path) -> None:
    card = reduced_families.register(base, tmp_path)
    pipe = reduced_families.load(card.name)
    state = dict(read_safetensors(ldm.save(pipe, tmp_path / "a.safetensors", layout="original")))
    strays = {name: value for added in STRAYS.values() for name, value in added.items()}
    assert not strays.keys() & state.keys()
    write_safetensors(tmp_path / "b.safetensors", state | strays)
    assert_same(pipe, reduced_families.load(card.name, weights=tmp_path / "b.safetensors"))
    write_safetensors(tmp_path / "c.safetensors", state | {"cond_stage.text_projection": PROJECTION})
    with pytest.raises(ValueError, match="belong to no part of it: .*cond_stage.text_projection"):
        reduced_families.load(card.name, weights=tmp_path / "c.safetensors")


def test_sd_turbo_is_loaded_as_it_is_published(tmp_path: Path) -> None:
    """Its text tower stands below the prefix of SDXL's conditioners."""
    card = reduced_families.register("sd-turbo", tmp_path)
    pipe = reduced_families.load(card.name)
    state = read_safetensors(ldm.save(pipe, tmp_path / "a.safetensors", layout="original"))
    published = {
        key.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): value
        for key, value in state.items()
    }
    assert published.keys() != state.keys()
    write_safetensors(tmp_path / "sd_turbo.safetensors", published)
    again = reduced_families.load(card.name, weights=tmp_path / "sd_turbo.safetensors")
    assert_same(pipe, again)
    images = [each.text_to_image("a cat", steps=1, seed=0, progress=False).tensor for each in (pipe, again)]
    assert torch.equal(*images)


def test_heads_that_the_keys_do_not_show_are_checked_in_folders(tmp_path: Path) -> None:
    card = reduced_families.register("sd-v1-5", tmp_path)
    folder = ldm.save(reduced_families.load(card.name), tmp_path / "folder", layout="diffusers")
    config = folder / "unet" / "config.json"
    config.write_text(
        config.read_text(encoding="utf-8")
        .replace('"in_channels"', '"num_attention_heads": null, "in_channels"')
        .replace("4,\n    4\n", "8,\n    8\n"),
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r"attention_head_dim \[8, 8\], expected \[4, 4\]"):
        reduced_families.load(card.name, weights=folder)


def test_inspect_names_the_parts_of_what_was_written(tmp_path: Path) -> None:
    card = reduced_families.register("sd-v1-5", tmp_path)
    ldm.save(reduced_families.load(card.name), tmp_path / "folder", layout="diffusers")
    assert {part.name for part in inspect(tmp_path / "folder").parts} == {"unet", "vae", "text_encoder"}


def test_layouts_are_refused_by_name_and_where_they_do_not_fit(tmp_path: Path) -> None:
    from tiny_latent_diffusion import tiny_model

    pipe = tiny_model()
    with pytest.raises(ValueError, match="did you mean 'original'"):
        ldm.save(pipe, tmp_path / "x", layout="orginal")
    with pytest.raises(ValueError, match="published families"):
        ldm.save(pipe, tmp_path / "x", layout="diffusers")
    card = reduced_families.register("sd-v1-5", tmp_path)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        ldm.save(reduced_families.load(card.name), tmp_path / "x.ckpt", layout="original")
    with pytest.raises(ValueError, match="no place for facts: figures"):
        ldm.save(reduced_families.load(card.name), tmp_path / "x.safetensors", layout="original", figures=1)
