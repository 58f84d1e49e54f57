"""Names of modules in adapter files: counts at full size, both layouts, blocks, families."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import nn

from ldm.catalog.lookup import find_card
from ldm.registry.latent.writing import diffusers_description
from ldm.weights.adapters.blocks import block_weights
from ldm.weights.adapters.leaves import grouped, split_key
from ldm.weights.adapters.matching import candidates
from ldm.weights.adapters.places import Places
from ldm.weights.keymap import file_shapes
from ldm.weights.parts import build_network, part_table, shapes_of

TRANSFORMERS, CONVOLUTIONS = ("Transformer2DModel",), ("ResnetBlock2D", "Downsample2D", "Upsample2D")
TOWER = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")


@cache
def networks(name: str) -> dict[str, nn.Module]:
    """Return the full-size UNet and text towers of a published model, without data."""
    card: Any = find_card(name)[0]
    configs = card.networks.configs()
    return {part: build_network(configs[part]) for part in ("unet", "text", "text2") if part in configs}


@cache
def places(name: str) -> dict[str, Places]:
    return {part: Places(part, network) for part, network in networks(name).items()}


def peer(network: nn.Module) -> nn.Module:
    """Return the network of diffusers or transformers of the same shape, without data."""
    name, config = diffusers_description(network, 1.0)
    with torch.device("meta"):
        if hasattr(diffusers, name):
            return getattr(diffusers, name).from_config(config)
        return getattr(transformers, name)(transformers.CLIPTextConfig(**config))


def trained_by_kohya(network: nn.Module, inside: tuple[str, ...]) -> list[str]:
    """Return the paths that kohya's trainer changes: linear layers and convolutions inside some classes."""
    found = []
    for name, module in network.named_modules():
        if type(module).__name__ not in inside:
            continue
        for inner, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found.append(f"{name}.{inner}".rstrip("."))
    return found


@pytest.mark.parametrize(
    ("model", "part", "inside", "prefix", "count"),
    [
        ("sd-v1-5", "unet", TRANSFORMERS, "lora_unet_", 192),
        ("sd-v1-5", "unet", TRANSFORMERS + CONVOLUTIONS, "lora_unet_", 278),
        ("sd-v1-5", "text", TOWER, "lora_te_", 72),
        ("sd-v2-1", "unet", TRANSFORMERS, "lora_unet_", 192),
        ("sd-v2-1", "text", TOWER, "lora_te_", 23 * 6),
        ("sdxl-base", "unet", TRANSFORMERS, "lora_unet_", 722),
        ("sdxl-base", "text", TOWER, "lora_te1_", 72),
        ("sdxl-base", "text2", TOWER, "lora_te2_", 192),
    ],
)
def test_every_module_that_kohya_trains_has_a_place(
    model: str, part: str, inside: tuple[str, ...], prefix: str, count: int
) -> None:
    """The stems are made of the names of diffusers and transformers, not of ours."""
    paths = trained_by_kohya(peer(networks(model)[part]), inside)
    if part != "unet":
        paths = [path if path.startswith("text_model.") else f"text_model.{path}" for path in paths]
    found = [next(candidates(prefix + path.replace(".", "_"), places(model))) for path in paths]
    assert len(found) == count
    targets = {match.place.sites["weight"].name for match in found if match.place}
    assert len(targets) == count  # all different
    dotted = {"unet": "unet", "text": "text_encoder", "text2": "text_encoder_2"}[part]
    for path in paths:
        match = next(candidates(f"{dotted}.{path}", places(model)))
        assert match.place is not None and match.place.path == path and match.place.part == part


@pytest.mark.parametrize(("model", "count"), [("sd-v1-5", 192), ("sdxl-base", 722)])
def test_stems_of_the_original_layout(model: str, count: int) -> None:
    unet = networks(model)["unet"]
    sizes = file_shapes(part_table(unet, "original", ()), shapes_of(unet))
    stems = [
        name.removesuffix(".weight")
        for name, shape in sizes.items()
        if len(shape) > 1 and (".transformer_blocks." in name or re.search(r"\.1\.proj_(in|out)\.", name))
    ]
    found = [next(candidates("lora_unet_" + stem.replace(".", "_"), places(model))) for stem in stems]
    assert len({match.place.sites["weight"].step.ours for match in found if match.place}) == count


def test_stems_of_sdxl_by_hand() -> None:
    """Some stems of published SDXL files and the modules of diffusers that they stand for."""
    for stem, path in {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0"
        ".attn1.to_q",
        "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "middle_block_1_transformer_blocks_9_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.9.ff"
        ".net.0.proj",
        "output_blocks_0_1_transformer_blocks_3_attn2_to_out_0": "up_blocks.0.attentions.0"
        ".transformer_blocks.3.attn2.to_out.0",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
        "label_emb_0_2": "add_embedding.linear_2",
        "out_2": "conv_out",
    }.items():
        match = next(candidates(f"lora_unet_{stem}", places("sdxl-base")))
        assert match.place is not None
        assert match.place.sites["weight"].ours == (f"{path}.weight",)


def test_blocks_follow_the_index_of_block_weights() -> None:
    """The index of SD 1's modules by the web UI's rule, which reads diffusers' names."""
    for place in places("sd-v1-5")["unet"].dotted.values():
        match = re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", place.path
        )
        if match is None:
            continue
        i, j = int(match[2]), int(match[4])
        j = 2 if match[3] in ("downsamplers", "upsamplers") else j
        expected = f"IN{1 + 3 * i + j:02d}" if match[1] == "down" else f"OUT{3 * i + j:02d}"
        assert place.block == expected, place.path
    blocks = Counter(place.block for place in places("sdxl-base")["unet"].dotted.values())
    names = {f"IN{i:02d}" for i in range(9)} | {f"OUT{i:02d}" for i in range(9)}
    assert set(blocks) == names | {"M00", "OUT"}
    assert {place.block for place in places("sdxl-base")["text"].dotted.values()} == {"BASE"}


def test_block_weights() -> None:
    assert block_weights(None) is None and block_weights("ALL") is None
    assert block_weights("INS") == {"BASE": 1.0, "IN01": 1.0, "IN02": 1.0}
    seventeen = block_weights([i / 16 for i in range(17)])
    assert seventeen is not None and seventeen["BASE"] == 0 and seventeen["OUT11"] == 1
    twelve = block_weights([1.0] * 12)
    assert twelve is not None and list(twelve) == [
        *("BASE", "IN04", "IN05", "IN07", "IN08", "M00"),
        *(f"OUT{i:02d}" for i in range(6)),
    ]
    with pytest.raises(ValueError, match="unknown preset 'MIDDLE'; did you mean 'MIDD'"):
        block_weights("MIDDLE")


def test_modules_that_a_model_never_reads() -> None:
    """SD 2's last layer, and the projection of a tower without one, have no effect and are no error."""
    last = next(candidates("lora_te_text_model_encoder_layers_23_mlp_fc1", places("sd-v2-1")))
    assert last.place is None
    projection = next(candidates("lora_te1_text_projection", places("sdxl-base")))
    assert projection.place is None
    second = next(candidates("lora_te2_text_projection", places("sdxl-base")))
    assert second.place is not None and second.place.sites["weight"].shape == (1280, 1280)
    assert not list(candidates("lora_te_text_model_encoder_layers_12_mlp_fc1x", places("sdxl-base")))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lora_unet_x.lora_down.weight", ("lora_unet_x", "lora_down.weight")),
        ("unet.a.b.lora_A.weight", ("unet.a.b", "lora_down.weight")),
        ("unet.a.b.lora_A.default_0.weight", ("unet.a.b", "lora_down.weight")),
        ("unet.a.b.lora.up.weight", ("unet.a.b", "lora_up.weight")),
        ("unet.a.processor.to_q_lora.down.weight", ("unet.a.processor.to_q_lora", "lora_down.weight")),
        ("a.q_proj.lora_linear_layer.up.weight", ("a.q_proj", "lora_up.weight")),
        ("a.lora_magnitude_vector.default", ("a", "lora_magnitude_vector")),
        ("a.lora_magnitude_vector.weight", ("a", "lora_magnitude_vector")),
        ("a.lora_embedding_A.default", ("a", "lora_embedding_A")),
        ("a.b", None),
    ],
)
def test_keys(key: str, expected: tuple[str, str] | None) -> None:
    assert split_key(key) == expected


def test_groups_keep_the_keys_of_the_file() -> None:
    tensors = {
        "m.lora_A.weight": torch.zeros(1, 2),
        "m.lora_B.weight": torch.zeros(2, 1),
        "x": torch.zeros(1),
    }
    groups, others = grouped(tensors)
    assert others == ["x"] and groups[0].keys == {
        "lora_down.weight": "m.lora_A.weight",
        "lora_up.weight": "m.lora_B.weight",
    }
