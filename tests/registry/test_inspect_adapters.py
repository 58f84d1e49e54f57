"""What `inspect` reports of adapters, from their headers and tensors alone."""

from __future__ import annotations

import json
from pathlib import Path

import malicious_files
import pytest
import torch
from adapter_files import written
from torch import Tensor

from ldm.cli.commands import run_command_line
from ldm.registry.inspection import inspect

ATTENTION = "transformer_blocks_0_attn2_to_k"


def lora(stem: str, context: int, out: int, rank: int = 4, alpha: float = 2.0) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_down.weight": torch.randn(rank, context),
        f"{stem}.lora_up.weight": torch.randn(out, rank),
        f"{stem}.alpha": torch.tensor(alpha),
    }


def sd1() -> dict[str, Tensor]:
    return {
        **lora(f"lora_unet_down_blocks_0_attentions_0_{ATTENTION}", 768, 320),
        **lora(f"lora_unet_mid_block_attentions_0_{ATTENTION}", 768, 1280, rank=8),
        **lora("lora_te_text_model_encoder_layers_3_mlp_fc1", 768, 3072, alpha=0.0),
        "lora_unet_nowhere.alpha": torch.tensor(1.0),
    }


def test_a_lora(tmp_path: Path) -> None:
    tags = {"10_cat": {"cat": 12, "sitting": 3}, "5_dog": {"cat": 1}}
    metadata = {
        "ss_tag_frequency": json.dumps(tags),
        "ss_network_dim": "4",
        "modelspec.trigger_phrase": "zorb",
    }
    path = written(tmp_path / "style.safetensors", sd1(), metadata)
    report = inspect(path, nan=True)
    assert report.made_for == "Stable Diffusion 1" and report.bad == ()
    (match,) = report.matches
    assert match.card == "sd-v1-5" and match.kinds == {"LoRA": 3}
    assert match.modules == {"unet": 2, "text": 1} and match.unused == ("lora_unet_nowhere.alpha",)
    found = {(each.part, each.block): (each.ranks, each.alphas) for each in match.blocks}
    assert found == {
        ("unet", "IN01"): ((4,), (2.0,)),
        ("unet", "M00"): ((8,), (2.0,)),
        ("text", "BASE"): ((4,), (4.0,)),  # an alpha of 0 counts as the rank
    }
    text = report.text()
    for part in (
        "made for  Stable Diffusion 1",
        "trigger words: zorb",
        "cat (13), sitting (3)",
        "rank 8, alpha 2",
    ):
        assert part in text


def test_other_families_and_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = lora("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, 640)
    path = written(tmp_path / "xl.safetensors", state)
    report = inspect(path)
    assert report.made_for == "Stable Diffusion XL" and report.matches[0].blocks[0].block == "IN04"
    assert run_command_line(["inspect", str(path), "--model", "sd-v1-5"]) == 0
    assert "made for Stable Diffusion XL, " in " ".join(capsys.readouterr().out.split())
    flux = lora("lora_unet_double_blocks_0_img_attn_qkv", 8, 24)
    report = inspect(written(tmp_path / "flux.safetensors", flux))
    assert report.made_for == "Flux" and not report.matches and "changes no module" in report.problems[0]


def test_a_textual_inversion(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": torch.randn(3, 1024)}, "name": "x"}, tmp_path / "thing.pt")
    report = inspect(tmp_path / "thing.pt")
    assert report.matches[0].card == "sd-v2-1" and report.matches[0].words == ("thing (3 vectors)",)
    assert "nothing unsafe" in report.text()


def test_hostile_files_are_not_executed(tmp_path: Path) -> None:
    malicious_files.canary_ckpt(tmp_path / "evil.pt", tmp_path / "mark")
    assert inspect(tmp_path / "evil.pt").unsafe and not (tmp_path / "mark").exists()
    for text in ("{", "[" * 100_000, '{"a": 3, "b": {"c": "d"}}', "[1]"):
        path = written(tmp_path / "tags.safetensors", sd1(), {"ss_tag_frequency": text})
        assert inspect(path, digest=False).matches


def test_a_configuration_of_peft_is_shown(tmp_path: Path) -> None:
    stem = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    state = {f"{stem}.lora_A.weight": torch.randn(4, 768), f"{stem}.lora_B.weight": torch.randn(1280, 4)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "brand_new": 7}
    for name, changes in {"good": {}, "bad": {"init_lora_weights": "pissa"}}.items():
        (tmp_path / name).mkdir()
        written(tmp_path / name / "adapter_model.safetensors", state)
        text = json.dumps({**config, **changes})
        (tmp_path / name / "adapter_config.json").write_text(text, encoding="utf-8")
    good, bad = (inspect(tmp_path / name) for name in ("good", "bad"))
    assert "lora_alpha = 8 (followed: divided by the rank" in good.text() and not good.problems
    assert "use_rslora = True (followed" in good.text() and "brand_new = 7 (unknown" in good.text()
    assert "init_lora_weights pissa, expected True" in bad.text() and not bad.matches
