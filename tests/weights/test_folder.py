"""Folders in diffusers layout: as diffusers writes them, in all variants, and incomplete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import malicious_files
import pytest
import torch

from ldm.weights.formats.diffusers_folder import is_folder, read_component, read_folder
from ldm.weights.formats.safetensors import write_safetensors


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """Save a small pipeline with diffusers: plain, in fp16, and with the UNet in shards."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(block_out_channels=(32,))
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=60
        )
    )
    pipe = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=None,
        scheduler=PNDMScheduler(steps_offset=1),  # type: ignore
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # type: ignore
    path = tmp_path_factory.mktemp("folders")
    pipe.save_pretrained(path / "plain")
    pipe.save_pretrained(path / "both", safe_serialization=False)
    pipe.to(torch.float16).save_pretrained(path / "both", variant="fp16")
    pipe.save_pretrained(path / "shards")
    shutil.rmtree(path / "shards" / "unet")
    unet.to(torch.float32).save_pretrained(path / "shards" / "unet", max_shard_size="300KB")
    vae, text = vae.to(torch.float32), text.to(torch.float32)
    return path, {"unet": unet.state_dict(), "vae": vae.state_dict(), "text": text.state_dict()}


Published = tuple[Path, dict[str, dict[str, torch.Tensor]]]


def test_reads_what_diffusers_writes(published: Published) -> None:
    path, states = published
    folder = read_folder(path / "plain")
    assert folder.class_name == "StableDiffusionPipeline"
    assert folder.options["requires_safety_checker"] is False
    assert folder.schedulers["scheduler"]["steps_offset"] == 1
    assert folder.parts.keys() == {"unet", "vae", "text"}
    assert folder.parts["unet"].config["cross_attention_dim"] == 24
    assert folder.parts["text"].class_name == "CLIPTextModel"
    for key, tensor in folder.parts["unet"].tensors.items():
        assert torch.equal(
            tensor.half().float(), states["unet"][key].float()
        )  # the module has been converted to fp16
    assert folder.parts["unet"].tensors.keys() == states["unet"].keys()


def test_variants(published: Published) -> None:
    path, states = published
    plain, half = read_folder(path / "both"), read_folder(path / "both", variant="fp16")
    assert [plain.parts[name].files[0].suffix for name in ("unet", "vae")] == [
        ".bin",
        ".bin",
    ]  # transformers always writes safetensors
    assert {p.suffix for c in half.parts.values() for p in c.files} == {".safetensors"}
    assert {t.dtype for t in plain.parts["vae"].tensors.values()} == {torch.float32}
    assert {t.dtype for t in half.parts["vae"].tensors.values()} == {torch.float16}
    assert half.parts["unet"].tensors.keys() == states["unet"].keys()
    with pytest.raises(FileNotFoundError, match=r"no variant 'bf16'.*fp16"):
        read_folder(path / "both", variant="bf16")


def test_a_single_variant_is_taken_and_several_are_asked_about(published: Published, tmp_path: Path) -> None:
    vae = published[0] / "both" / "vae"
    shutil.copy(vae / "diffusion_pytorch_model.fp16.safetensors", tmp_path)
    assert read_component(tmp_path).files[0].name == "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(
        vae / "diffusion_pytorch_model.fp16.safetensors",
        tmp_path / "diffusion_pytorch_model.non_ema.safetensors",
    )
    with pytest.raises(ValueError, match="fp16, non_ema"):
        read_component(tmp_path)
    assert "non_ema" in read_component(tmp_path, variant="non_ema").files[0].name


def test_shards(published: Published) -> None:
    path, states = published
    component = read_component(path / "shards" / "unet")
    assert len(component.files) > 1
    assert component.tensors.keys() == states["unet"].keys()
    assert all(torch.equal(component.tensors[key], states["unet"][key]) for key in states["unet"])


@pytest.fixture
def shards(published: Published, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published[0] / "shards" / "unet", tmp_path / "unet"))


def test_a_missing_shard_is_named(shards: Path) -> None:
    lost = sorted(shards.glob("*-of-*"))[0]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=rf"index\.json.*1 of them absent: {lost.name}"):
        read_component(shards)


def test_shards_and_index_must_agree(shards: Path) -> None:
    index = shards / "diffusion_pytorch_model.safetensors.index.json"
    good = index.read_text(encoding="utf-8")
    content = json.loads(good)
    content["weight_map"]["not.there"] = sorted(shards.glob("*-of-*"))[0].name
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"1 missing \(not\.there\)"):
        read_component(shards)
    content = json.loads(good)
    del content["weight_map"]["conv_in.bias"]
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"1 unexpected \(conv_in\.bias\)"):
        read_component(shards)
    for name in ("../unet/x.safetensors", "/etc/passwd", "..", ".hidden"):
        index.write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
        with pytest.raises(ValueError, match="outside its folder"):
            read_component(shards)
    for text in ("{", "[]", "{}", '{"weight_map": {"a": 1}}'):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"index\.json"):
            read_component(shards)


def test_variant_of_an_index(shards: Path) -> None:
    index = shards / "diffusion_pytorch_model.safetensors.index.json"
    for name in (
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ):
        index = index.rename(shards / name)
        assert len(read_component(shards, variant="fp16").files) > 1


def test_missing_pieces_are_named(published: Published, tmp_path: Path) -> None:
    path = Path(shutil.copytree(published[0] / "plain", tmp_path / "p"))
    with pytest.raises(ValueError, match=r"no part 'textt'.*text"):
        read_folder(path, parts=["textt"])
    shutil.rmtree(path / "text_encoder")
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        read_folder(path)
    assert read_folder(path, parts=["vae"]).parts.keys() == {"vae"}
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        read_folder(path, parts=["vae"])
    (path / "model_index.json").unlink()
    assert not is_folder(path)
    with pytest.raises(FileNotFoundError, match="model_index"):
        read_folder(path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_folder(tmp_path / "nowhere")


def test_a_pickle_in_a_folder_is_read_with_the_same_care(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    malicious_files.canary_ckpt(tmp_path / "diffusion_pytorch_model.bin", mark)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin.*mkdir"):
        read_component(tmp_path)
    assert not mark.exists()
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", {"x": torch.ones(1)})
    assert read_component(tmp_path).tensors["x"].item() == 1  # safetensors take precedence
