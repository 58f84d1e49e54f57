"""Adapters whose numbers, shapes or containers are damaged are refused with the file's name and a reason."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from described_files import described, place_described
from kinds_of_adapters import KEYS, KINDS, PEFT, small_networks, small_places
from torch import Tensor

from ldm.weights.adapters.blocks import SD_ATTENTION, block_weights
from ldm.weights.adapters.files import read_adapter
from ldm.weights.adapters.matching import match_adapter, match_places
from ldm.weights.formats.safetensors import write_safetensors

WITH_ALPHA = [kind for kind, shapes in KINDS.items() if any(key.endswith(".alpha") for key in shapes)]


def tensors_of(kind: str) -> dict[str, Tensor]:
    return {name: torch.full(shape, 0.1) for name, shape in KINDS[kind].items()}


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        match_places(read_adapter(path), small_places(), model="small")
    assert str(path) in str(caught.value) and len(str(caught.value)) < 3000


def written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    write_safetensors(path, tensors, metadata)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_of_every_kind_are_matched(kind: str, tmp_path: Path) -> None:
    path = place_described(described(KINDS[kind]), tmp_path)
    assert match_places(read_adapter(path), small_places(), model="small").edits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", WITH_ALPHA)
def test_an_alpha_that_is_not_finite_is_refused(kind: str, value: float, tmp_path: Path) -> None:
    state = {
        name: torch.tensor(value) if name.endswith(".alpha") else tensor
        for name, tensor in tensors_of(kind).items()
    }
    refused(written(tmp_path / "a.safetensors", state), "alpha: expected a finite number, got (nan|-?inf)")


def test_several_alphas_of_a_module_are_refused(tmp_path: Path) -> None:
    state = {**tensors_of("LoRA"), f"{KEYS}.alpha": torch.ones(2)}
    refused(
        written(tmp_path / "a.safetensors", state), r"alpha: expected a finite number, got the shape \(2,\)"
    )
    state = {**tensors_of("(IA)³"), f"{KEYS}.on_input": torch.tensor(float("nan"))}
    refused(written(tmp_path / "b.safetensors", state), "on_input: expected a finite number, got nan")


@pytest.mark.parametrize(
    ("kind", "leaf", "shape"),
    [
        ("LoHa", "hada_w1_b", (0, 16)),
        ("LoHa", "hada_w1_a", (32, 4, 5)),
        ("LoHa", "hada_w2_b", (4,)),
        ("LoHa with cores", "hada_t1", (4,)),
        ("LoHa with cores", "hada_w1_b", (4, 32, 2)),
        ("LoKr", "lokr_w2_b", ()),
        ("LoKr", "lokr_w2_a", (8, 2, 3)),
        ("LoKr with a core", "lokr_w2_b", (2, 8, 2)),
        ("GLoRA", "a1.weight", ()),
        ("GLoRA", "a1.weight", (32, 4, 3)),
        ("GLoRA", "b2.weight", (5, 32)),
        ("OFT", "oft_blocks", (4, 8, 0)),
        ("OFT", "oft_blocks", (0, 0, 0)),
        ("BOFT", "oft_blocks", (2, 4, 8, 0)),
        ("LoRA", "lora_down.weight", (0, 16)),
        ("LoRA", "lora_down.weight", ()),
        ("DoRA", "dora_scale", (0,)),
        ("LoRA with a core", "lora_mid.weight", (4,)),
        ("full", "diff", (0, 16)),
    ],
)
def test_tensors_of_impossible_shapes_are_refused(
    kind: str, leaf: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    state = tensors_of(kind)
    name = next(name for name in state if name.endswith(f".{leaf}"))
    refused(
        written(tmp_path / "a.safetensors", {**state, name: torch.full(shape, 0.1)}), "does not fit 'small'"
    )


def test_cores_of_glora_fit_their_factors(tmp_path: Path) -> None:
    stem = next(iter(KINDS["GLoRA"])).removesuffix(".a1.weight")
    for shape in ((4,), (4, 5), (5, 4)):
        state = {**tensors_of("GLoRA"), f"{stem}.bm.weight": torch.ones(shape)}
        refused(written(tmp_path / "a.safetensors", state), "does not fit 'small'")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool])
def test_numbers_that_are_not_floating_point_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    name = f"{KEYS}.lora_up.weight"
    state = {**tensors_of("LoRA"), name: torch.ones(32, 4, dtype=dtype)}
    refused(
        written(tmp_path / "a.safetensors", state),
        f"lora_up.weight: expected floating-point numbers, got {dtype}",
    )


def test_an_alpha_may_be_a_whole_number(tmp_path: Path) -> None:
    state = {**tensors_of("LoRA"), f"{KEYS}.alpha": torch.tensor(4)}
    assert match_places(
        read_adapter(written(tmp_path / "a.safetensors", state)), small_places(), model="small"
    ).edits


@pytest.mark.parametrize("shape", [(), (2, 3, 16), (0, 16)])
def test_learned_vectors_of_another_shape_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    state = {**tensors_of("LoRA"), "bundle_emb.thing.string_to_param.*": torch.zeros(shape)}
    refused(written(tmp_path / "a.safetensors", state), "expected vectors of floating-point numbers")


def test_leaves_of_two_kinds_are_named(tmp_path: Path) -> None:
    """Peft's rotation beside a LoRA of the same module."""
    state = {**tensors_of("LoRA"), f"{KEYS}.oft_R.weight": torch.ones(2, 28)}
    refused(written(tmp_path / "a.safetensors", state), "1 unexpected .*oft_R.weight")


def test_messages_are_short(tmp_path: Path) -> None:
    long = {"modelspec.architecture": "x" * 500_000 + "\x1b"}
    state = {"nowhere.lora_up.weight": torch.ones(2, 2)}
    refused(written(tmp_path / "a.safetensors", state, long), "made for 'xxx")
    keys = {f"{'k' * 900}{i}.alpha": torch.ones(1) for i in range(9)}
    refused(written(tmp_path / "b.safetensors", tensors_of("LoRA") | keys), "9 unexpected")


def pickled(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def test_lists_that_a_pickle_shares_are_counted(tmp_path: Path) -> None:
    inner: Any = [0] * 60
    for _ in range(6):
        inner = [inner] * 60
    path = tmp_path / "shared.pt"
    path.write_bytes(pickled({"emb_params": torch.ones(2, 16), "more": inner}))
    begin = time.process_time()
    with pytest.raises(ValueError, match="shared.pt.*too many values"):
        read_adapter(path)
    assert path.stat().st_size < 10_000 and time.process_time() - begin < 1


@pytest.mark.parametrize("key", ["k" * 2000, ("a", "b")])
def test_keys_of_pickles_are_short_texts(key: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.pt"
    path.write_bytes(pickled({"emb_params": torch.ones(2, 16), "more": {key: {"x": 1}}}))
    with pytest.raises(ValueError, match="keys.pt.*key"):
        read_adapter(path)


def configured(folder: Path, kind: str = "LORA", **fields: Any) -> Path:
    """Return a folder of peft with an adapter of a kind and a configuration."""
    config = {"peft_type": kind, "r": 4, "lora_alpha": 8, **fields}
    return place_described(described(PEFT[kind], "peft", config=config), folder)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("LORA", {"init_lora_weights": "pissa"}, "init_lora_weights pissa, expected True"),
        ("LORA", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
        ("LORA", {"init_lora_weights": "olora"}, "init_lora_weights olora"),
        ("LORA", {"fan_in_fan_out": True}, "fan_in_fan_out True, expected False"),
        ("LORA", {"bias": "all"}, "bias all, expected none"),
        ("LORA", {"use_qalora": True}, "use_qalora True"),
        ("LORA", {"layer_replication": [[0, 1]]}, "layer_replication"),
        ("LORA", {"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ("LORA", {"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
        ("LORA", {"alpha_pattern": [1]}, "expected a mapping"),
        ("OFT", {"coft": True}, "coft True, expected False"),
        ("OFT", {"use_cayley_neumann": "no"}, "use_cayley_neumann: expected true or false"),
        ("IA3", {"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ("LORA", {"peft_type": "VERA"}, "peft_type 'VERA'"),
        ("LORA", {"peft_type": 3}, "peft_type 3"),
    ],
)
def test_what_a_configuration_asks_for_is_followed_or_refused(
    kind: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(configured(tmp_path, kind, **fields), message)


def test_components_of_a_configuration_are_judged_alone(tmp_path: Path) -> None:
    shapes = {f"unet.{name.removeprefix('base_model.model.')}": shape for name, shape in PEFT["LORA"].items()}
    config = {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.init_lora_weights": "corda"}
    stated = {"lora_adapter_metadata": json.dumps(config)}
    path = place_described(described(shapes, metadata=stated), tmp_path)
    refused(path, "for text_encoder cannot be followed: init_lora_weights corda")


def test_unknown_fields_of_a_configuration_are_warned_of(tmp_path: Path) -> None:
    file = read_adapter(configured(tmp_path, brand_new_scaling=7, not_used=False))
    with pytest.warns(UserWarning, match="not known here and not followed: brand_new_scaling 7$"):
        match_adapter(file, small_networks(), model="small")


@pytest.mark.parametrize("convert", [np.float32, np.asarray, torch.tensor])
def test_block_weights_of_numpy_and_torch_are_numbers(convert: Callable[[float], Any]) -> None:
    found = block_weights({"IN01": convert(0.5), "M00": convert(1.0)})
    assert found == {"IN01": 0.5, "M00": 1.0} and all(type(value) is float for value in found.values())
    assert block_weights(np.full(len(SD_ATTENTION), 0.5)) == dict.fromkeys(SD_ATTENTION, 0.5)  # type: ignore[arg-type]
    for wrong in (convert(float("nan")), "x", True, [1]):
        with pytest.raises(ValueError, match="blocks: IN01: expected a finite number"):
            block_weights({"IN01": wrong})
    with pytest.raises(ValueError, match="blocks: expected factors or the name of a preset"):
        block_weights(5)  # type: ignore[arg-type]
