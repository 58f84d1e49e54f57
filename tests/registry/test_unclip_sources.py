"""Files of unCLIP models: single files, priors, and folders that are incomplete or of another model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers_unclip_pipelines as peers
import pytest
import reduced_unclip_families
import torch
from packaging.version import Version
from tiny_unclip import tiny_kandinsky21, tiny_karlo, tiny_stable

import ldm
from ldm.__main__ import main
from ldm.conditioning.image_embedding import ImageEmbedding
from ldm.pipelines.stages.prior import PriorStage
from ldm.pipelines.unclip import UnCLIP
from ldm.registry.inspection import inspect
from ldm.weights.formats.safetensors import read_safetensors, write_safetensors
from ldm.weights.parts import to_layout

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write Karlo in diffusers layout."""
    path = tmp_path_factory.mktemp("karlo")
    peers.karlo(tiny_karlo(), path).save_pretrained(path / "karlo")
    return path / "karlo"


@pytest.fixture
def karlo(folder: Path, tmp_path: Path) -> tuple[UnCLIP, Path]:
    """Return the model and a copy of its folder."""
    return tiny_karlo(), Path(shutil.copytree(folder, tmp_path / "karlo"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def without(path: Path, *names: str) -> None:
    write_safetensors(
        path, {key: tensor.clone() for key, tensor in read_safetensors(path).items() if key not in names}
    )


def test_a_folder_is_read_exactly(karlo: tuple[UnCLIP, Path]) -> None:
    pipe, path = karlo
    again, before = peers.load_folder(pipe, path), pipe.state_dict()
    after = again.state_dict()
    assert all(torch.equal(before[key], value) for key, value in after.items())
    assert {key.split(".")[0] for key in before.keys() - after.keys()} == {
        "clip"
    } and again.clip.vision is None  # this pipeline has no image tower
    assert "prior/" + WEIGHTS in again.origin
    with pytest.raises(ValueError, match="no vision tower"):
        again.variations(torch.rand(1, 3, 16, 16))


def test_statistics_missing_from_a_folder_of_karlo(karlo: tuple[UnCLIP, Path]) -> None:
    pipe, path = karlo
    without(path / "prior" / WEIGHTS, "clip_mean", "clip_std")
    with pytest.raises(
        ValueError, match=r"does not hold their mean and standard deviation: expected ViT-L-14_stats\.th"
    ):
        peers.load_folder(pipe, path)


def test_folders_that_lack_something_or_say_something_else(karlo: tuple[UnCLIP, Path]) -> None:
    pipe, path = karlo
    edit(path / "prior" / "config.json", num_attention_heads=2, attention_head_dim=16)
    with pytest.raises(ValueError, match="does not fit the prior: num_attention_heads 2, expected 4"):
        peers.load_folder(pipe, path)
    edit(path / "prior" / "config.json", num_attention_heads=4, attention_head_dim=8)
    edit(path / "decoder_scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(
        ValueError,
        match="another training of the decoder than 'tiny-karlo.*prediction_type sample, expected epsilon",
    ):
        peers.load_folder(pipe, path)
    edit(path / "decoder_scheduler" / "scheduler_config.json", prediction_type="epsilon")
    without(path / "text_proj" / WEIGHTS, "embedding_proj.bias")
    with pytest.raises(ValueError, match="missing.*embedding_proj.bias"):
        peers.load_folder(pipe, path)
    shutil.rmtree(path / "super_res_last")
    with pytest.raises((FileNotFoundError, ValueError), match="super_res_last|embedding_proj"):
        peers.load_folder(pipe, path)
    edit(path / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(
        ValueError, match="a folder of StableDiffusionPipeline, which holds no part of 'tiny-karlo-v1-alpha'"
    ):
        peers.load_folder(pipe, path)


def test_a_pipelines_folder_without_its_prior(tmp_path: Path) -> None:
    """Kandinsky's decoder alone: the error names what is missing."""
    card = reduced_unclip_families.register("kandinsky-2-2", tmp_path)
    pipe = reduced_unclip_families.load(card.name)
    peers.kandinsky22(pipe).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="expected a text tower, a vision tower, or both"):
        reduced_unclip_families.load(card.name, weights=tmp_path / "decoder")


def single_file(pipe: UnCLIP, path: Path) -> Path:
    """Write Stable unCLIP as its authors publish it, without the statistics of the augmentation."""
    unet, vae = (
        to_layout(network, "original") for network in (pipe.decoder.denoiser.net, pipe.decoder.space.vae)
    )
    words = to_layout(pipe.decoder.text.tower, "original", hugging_face=False)
    vision = {
        f"visual.{key}": value
        for key, value in to_layout(pipe.clip.vision, "original", hugging_face=False).items()
    }
    prefixes = {
        "model.diffusion_model.": unet,
        "first_stage_model.": vae,
        "cond_stage_model.model.": words,
        "embedder.model.": vision,
    }
    state = {prefix + key: value for prefix, part in prefixes.items() for key, value in part.items()}
    write_safetensors(
        path,
        {**state, "noise_augmentor.betas": torch.zeros(3), "embedder.model.logit_scale": torch.zeros(())},
    )
    return path


def test_a_single_file_of_stable_unclip_needs_its_statistics(tmp_path: Path) -> None:
    pipe = tiny_stable()
    name, path = peers.card_of(pipe), single_file(pipe, tmp_path / "sd21-unclip-l.safetensors")
    with pytest.raises(
        ValueError, match=r"statistics of CLIP's image embeddings are missing: expected ViT-L-14_stats\.th in"
    ):
        reduced_unclip_families.load(name, weights=path)
    torch.save(
        (pipe.decoder.augmentation.mean[0], pipe.decoder.augmentation.std[0]), tmp_path / "ViT-L-14_stats.th"
    )
    again, before = reduced_unclip_families.load(name, weights=path), pipe.state_dict()
    assert again.prior is None and all(
        torch.equal(before[key], value) for key, value in again.state_dict().items()
    )
    images = again.variations(torch.rand(1, 3, 32, 32), n=1, progress=False)
    assert images.tensor.shape == (1, 3, 32, 32)
    torch.save(
        (pipe.decoder.augmentation.mean[0], -pipe.decoder.augmentation.std[0]), tmp_path / "ViT-L-14_stats.th"
    )
    with pytest.raises(ValueError, match="expected positive standard deviations"):
        reduced_unclip_families.load(name, weights=path)


def originals(pipe: UnCLIP, folder: Path) -> Path:
    """Write Karlo or Kandinsky 2.1 as their authors publish them, with CLIP as a file of tensors."""
    folder.mkdir()

    def layout(part: str, prefix: str) -> dict[str, torch.Tensor]:
        state = to_layout(pipe.networks()[part], "original", hugging_face=False)
        return {
            f"{prefix}{key}": value.clone()
            for key, value in state.items()
            if not key.startswith(("clip_mean", "clip_std"))
        }

    write_safetensors(
        folder / "ViT-L-14.safetensors",
        {**layout("text", ""), **layout("vision", "visual."), "logit_scale": torch.zeros(())},
    )
    torch.save({"state_dict": layout("prior", "model."), "global_step": 3}, folder / "prior-ckpt-step=1.ckpt")
    torch.save(
        (pipe.prior.net.clip_mean[0].clone(), pipe.prior.net.clip_std[0].clone()),
        folder / "ViT-L-14_stats.th",
    )
    if pipe.upsamplers:
        torch.save({"state_dict": layout("decoder", "model.")}, folder / "decoder-ckpt-step=1.ckpt")
        both = {**layout("upsampler", "model_first_steps."), **layout("upsampler-last", "model_last_step.")}
        torch.save({"state_dict": both}, folder / "improved-sr-ckpt-step=1.2M.ckpt")
    else:
        torch.save(layout("decoder", ""), folder / "decoder_fp16.ckpt")
        torch.save(layout("vae", ""), folder / "movq_final.ckpt")
        for part in peers.kandinsky_text_parts(pipe).values():
            part.save_pretrained(folder / "text_encoder")
    return folder


@pytest.mark.parametrize("make", [tiny_karlo, tiny_kandinsky21])
def test_the_authors_own_files_are_read_exactly(make: Any, tmp_path: Path) -> None:
    pipe = make()
    path, before = originals(pipe, tmp_path / "files"), pipe.state_dict()
    again = peers.load_folder(pipe, path).state_dict()
    assert again.keys() == before.keys() and all(
        torch.equal(before[key], value) for key, value in again.items()
    )
    (path / "ViT-L-14_stats.th").rename(tmp_path / "stats.th")
    with pytest.raises(
        ValueError, match=r"statistics of CLIP's image embeddings are missing: expected ViT-L-14_stats\.th in"
    ):
        peers.load_folder(pipe, path)
    (tmp_path / "stats.th").rename(path / "ViT-L-14_stats.th")
    decoder = next(path.glob("decoder*"))
    shutil.copy(decoder, path / "decoder-other.ckpt")
    with pytest.raises(
        ValueError, match=r"expected one file decoder\*\.ckpt with the decoder of .* found decoder"
    ):
        peers.load_folder(pipe, path)
    (path / "decoder-other.ckpt").unlink()
    next(path.glob("*sr*" if pipe.upsamplers else "movq*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected one file .*found none"):
        peers.load_folder(pipe, path)


def dalle2_file(stage: PriorStage, path: Path) -> Path:
    """Write a prior as DALLE2-pytorch's trainer does, with other values beside its tensors."""
    state = {f"net.{key}": value.clone() for key, value in to_layout(stage.net, "original").items()}
    state |= {"noise_scheduler.betas": torch.zeros(1000), "clip.visual.proj": torch.zeros(2)}
    trained = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    torch.save(
        {
            "model": trained,
            "ema_model": state,
            "version": Version("1.10.0"),
            "step": 7,
            "optimizer": {"state": {}},
        },
        path,
    )
    return path


def test_a_prior_of_dalle2_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = reduced_unclip_families.register_prior(tmp_path)
    stage = reduced_unclip_families.load(card.name)
    path = dalle2_file(stage, tmp_path / "latest.pth")
    again = reduced_unclip_families.load(card.name, weights=path)
    assert isinstance(again, PriorStage)
    assert all(
        torch.equal(a, b)
        for a, b in zip(stage.state_dict().values(), again.state_dict().values(), strict=True)
    )  # the averaged weights
    assert main(["inspect", str(path)]) == 0
    assert "DALLE2-pytorch prior" in (out := capsys.readouterr().out) and f"loads as  {card.name}" in out
    with pytest.raises(ValueError, match="no prior of DALLE2-pytorch"):
        torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
        reduced_unclip_families.load(card.name, weights=tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        reduced_unclip_families.load(card.name, weights=tmp_path / "nowhere.pth")


def test_a_prior_of_another_source_is_combined_knowingly_or_not_at_all(tmp_path: Path) -> None:
    """Its embeddings have length 1: a decoder of embeddings with CLIP's length refuses them."""
    stage, karlo = (
        reduced_unclip_families.load(reduced_unclip_families.register_prior(tmp_path).name),
        tiny_karlo(),
    )
    pipe = UnCLIP(clip=karlo.clip, prior=stage, decoder=karlo.decoder, card=karlo.card)
    made = pipe.imagine("a cat", prior_steps=3, candidates=2, progress=False)
    assert made.length == "unit" and made.vector.isfinite().all()
    with pytest.raises(
        ValueError, match="the decoder reads embeddings as long as .* makes them, got ones of length 1"
    ):
        pipe.text_to_image("a cat", n=1, steps=2, prior_steps=2, progress=False)
    longer = ImageEmbedding(vector=5 * made.unit().vector, clip=made.clip)
    assert pipe.text_to_image("a cat", n=1, steps=2, embedding=longer, progress=False).tensor.shape == (
        1,
        3,
        16,
        16,
    )
    stranger = PriorStage(stage.net, stage.card, clip="laion/ViT-L-14")
    with pytest.raises(ValueError, match="its prior on those of 'laion/ViT-L-14'"):
        UnCLIP(clip=karlo.clip, prior=stranger, decoder=karlo.decoder, card=karlo.card)


def test_inspect_tells_parts_of_published_models(folder: Path, tmp_path: Path) -> None:
    report = inspect(folder, digest=False)
    assert report.found is not None and report.found.name == "karlo-prior" and not report.problems
    state = {
        f"model.{key}": value
        for key, value in to_layout(tiny_karlo().prior.net, "original").items()
        if "clip_" not in key
    }
    write_safetensors(tmp_path / "prior.safetensors", state)
    report = inspect(tmp_path / "prior.safetensors", digest=False)
    assert report.found.name == "karlo-prior" and not report.problems and report.parts[0].name == "prior"
    assert set(report.fits) >= {"karlo-v1-alpha, kandinsky-2-1, kandinsky-2-1-inpaint"}
    assert replace(report, fits={}).text()


def test_random_weights_at_reduced_width_are_the_same_every_time(tmp_path: Path) -> None:
    name = reduced_unclip_families.register("kandinsky-2-1", tmp_path).name
    a, b = (reduced_unclip_families.load(name).state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in a) and ldm.list_models().count(name) == 1
