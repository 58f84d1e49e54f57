"""Adapters of pipelines: parity with diffusers and peft, strengths, removal, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import (
    ATTENTION,
    COMPONENTS,
    KOHYA,
    KOHYA_XL,
    TEXT,
    add_lora,
    hugging_face,
    kohya_lora,
    lora_tensors,
    peers,
    same_bits,
    targets,
    weights_of,
    written,
)
from diffusers_pipelines import random_pipeline
from malicious_files import canary_ckpt
from torch import Tensor, nn

import ldm
from ldm.images.files import read_recipe
from ldm.pipelines.adapters import DefaultsChanged, UnusedKeys
from ldm.registry.replaying import replay
from ldm.weights.parts import to_layout

STRENGTHS = (1.0, 0.6, 0.0, -0.5)
BAR = 1e-5  # of the RMS
CALL: dict[str, Any] = {"steps": 2, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return random_pipeline("sd-v1-5", "reduced", tmp_path_factory.mktemp("sd"))[0]


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return random_pipeline("sdxl-base", "reduced", tmp_path_factory.mktemp("xl"))[0]


@pytest.fixture(params=["sd", "xl"])
def pipe(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return a pipeline, from which all adapters are removed afterwards."""
    made = request.getfixturevalue(request.param)
    before = weights_of(made)
    yield made
    for each in made.adapters.list():
        made.adapters.remove(each.name)
    assert same_bits(made, before)


def prefixes(pipe: Any) -> dict[str, str]:
    return KOHYA_XL if "text2" in pipe.networks() else KOHYA


def rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def file_of(pipe: Any, folder: Path, name: str = "style", **options: Any) -> tuple[Path, dict[str, Tensor]]:
    state = kohya_lora(peers(pipe), prefixes(pipe), **options)
    return written(folder / f"{name}.safetensors", state), state


def outputs(networks: dict[str, nn.Module], cross: int, pooled: int | None) -> dict[str, Tensor]:
    """Return what networks of diffusers and transformers make of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, cross, generator=generator)
    ids = torch.tensor([[49406, 320, 736, 49407]])
    added = (
        {}
        if pooled is None
        else {"text_embeds": torch.randn(2, pooled, generator=generator), "time_ids": torch.zeros(2, 6)}
    )
    with torch.no_grad():
        return {
            part: network(x, torch.tensor([7, 500]), context, added_cond_kwargs=added).sample
            if part == "unet"
            else network(ids).last_hidden_state
            for part, network in networks.items()
        }


def all_outputs(pipe: Any, networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    return outputs(networks, pipe.text.width, 24 if "text2" in networks else None)


def test_merged_weights_are_those_of_the_definition(pipe: Any, tmp_path: Path) -> None:
    path, state = file_of(pipe, tmp_path)
    theirs = peers(pipe)
    add_lora(theirs, state, prefixes(pipe))
    loaded = pipe.adapters.load(path)
    assert sum(loaded.adapter.modules.values()) == len(state) / 3 and loaded.adapter.unused == ()
    for part, network in theirs.items():
        ours = to_layout(pipe.networks()[part], "diffusers")
        for name, wanted in network.state_dict().items():
            got = ours[name if part == "unet" else hugging_face(name)]
            assert rms(got - wanted) <= BAR * rms(wanted), name


@pytest.mark.parametrize("generation", ["newest", "middle", "oldest", "kohya"])
def test_loras_of_peft_in_all_spellings(pipe: Any, tmp_path: Path, generation: str) -> None:
    """The networks with peft's own layers compute what ours do, merged and on the fly, at every strength."""
    theirs = peers(pipe)
    path = peft_file(theirs, tmp_path, generation)
    for merge in (True, False):
        pipe.adapters.load(path, name="lora", merge=merge)
        for strength in STRENGTHS:
            pipe.adapters.set("lora", strength)
            for network in theirs.values():
                scale_lora(network, strength)
            wanted = all_outputs(pipe, theirs)
            got = our_outputs(pipe)
            for part in theirs:
                bar = BAR * rms(wanted[part])
                assert rms(got[part] - wanted[part]) < bar, (part, merge, strength)
        pipe.adapters.remove("lora")


def our_outputs(pipe: Any) -> dict[str, Tensor]:
    """Return what a pipeline's own networks make of the inputs of `outputs`."""
    from ldm.diffusion.cond import Cond

    networks, found = pipe.networks(), {}

    def unet(x: Tensor, t: Tensor, context: Tensor, added_cond_kwargs: dict[str, Tensor]) -> Any:
        pooled = None
        if added_cond_kwargs:
            times = pipe_times(x)
            pooled = torch.cat([added_cond_kwargs["text_embeds"], times], dim=1)
        return type("Out", (), {"sample": networks["unet"](x, t, Cond(context=context, pooled=pooled))})

    def tower(part: str) -> Any:
        layer = -1

        def run(ids: Tensor) -> Any:
            out = networks[part](ids, layer=layer, final_norm=True, pooled=False)
            return type("Out", (), {"last_hidden_state": out.tokens})

        return run

    parts = [part for part in COMPONENTS if part in networks]
    callables: Any = {part: unet if part == "unet" else tower(part) for part in parts}
    found = outputs(callables, pipe.text.width, 24 if "text2" in networks else None)
    return found


def pipe_times(x: Tensor) -> Tensor:
    """Return the embeddings of six zeros, as SDXL's vector condition has them."""
    half = torch.cat([torch.ones(128), torch.zeros(128)])
    return half.repeat(len(x), 6)


def peft_file(networks: dict[str, nn.Module], folder: Path, generation: str) -> Path:
    """Add peft's LoRA layers to networks, and write them with diffusers in the spelling of a generation."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, inject_adapter_in_model

    state: dict[str, Tensor] = {}
    for part, network in networks.items():
        # old files have no alpha: it is the rank
        alpha = 4 if generation in ("middle", "oldest") else 6
        modules = list(ATTENTION if part == "unet" else TEXT)
        if generation == "oldest":
            modules = [name for name in modules if name.startswith(("to_", "q_", "k_", "v_", "out_"))]
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=modules, init_lora_weights=False)
        torch.manual_seed(2)
        inject_adapter_in_model(config, network)
        network.requires_grad_(False).eval()
        own = {name: value for name, value in network.state_dict().items() if ".lora_" in name}
        if part != "unet":
            own = {hugging_face(name): value for name, value in own.items()}
        if generation != "newest":  # where the adapter's name, "default", stays inside the keys
            own = {name.replace(".default.", "."): value for name, value in own.items()}
        if generation == "kohya":
            state |= in_kohya_names(own, KOHYA_XL if "text2" in networks else KOHYA, part, alpha)
            continue
        if generation != "newest":
            own = convert_state_dict_to_diffusers(own)
            own = {old_name(name) if generation == "oldest" else name: v for name, v in own.items()}
        state |= {f"{COMPONENTS[part]}.{name}": value for name, value in own.items()}
    metadata = {"unet.r": 4, "unet.lora_alpha": 6}
    metadata |= {f"text_encoder{i}.{k}": v for i in ("", "_2") for k, v in (("r", 4), ("lora_alpha", 6))}
    text = {"lora_adapter_metadata": json.dumps(metadata)} if generation == "newest" else None
    return written(folder / "pytorch_lora_weights.safetensors", state, text)


def in_kohya_names(own: dict[str, Tensor], names: dict[str, str], part: str, alpha: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, value in own.items():
        path, _, leaf = name.replace("lora_A", "lora_down").replace("lora_B", "lora_up").partition(".lora_")
        stem = names[part] + path.replace(".", "_")
        state[f"{stem}.lora_{leaf}"] = value
        state[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return state


def old_name(name: str) -> str:
    """Return a key as diffusers 0.13 to 0.20 wrote it."""
    for new, old in (
        ("to_out.0", "to_out"),
        ("out_proj", "to_out"),
        *((f"{x}_proj", f"to_{x}") for x in "qkv"),
    ):
        name = name.replace(f".{new}.", f".{old}.")
    place, _, leaf = name.rpartition(".lora.") if ".lora." in name else name.rpartition(".lora_linear_layer.")
    before, _, last = place.rpartition(".")
    inner = "processor." if "attn1" in before or "attn2" in before else ""
    return f"{before}.{inner}{last}_lora.{leaf}"


def scale_lora(network: nn.Module, strength: float) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", strength)


def test_removal_restores_every_bit(pipe: Any, tmp_path: Path) -> None:
    first, second = file_of(pipe, tmp_path, "a")[0], file_of(pipe, tmp_path, "b", rank=2)[0]
    before = weights_of(pipe)
    for i in range(5):
        pipe.adapters.load(first, merge=i % 2 == 0)
        pipe.adapters.load(second, strength=0.3)
        pipe.adapters.set("a", -0.7, text_strength=0.2)
        pipe.adapters.remove("a")
        assert not same_bits(pipe, before)
        pipe.adapters.remove("b")
        assert same_bits(pipe, before)
    pipe.adapters.load(first, strength=0.0)
    assert same_bits(pipe, before)


def test_adapters_add_up_in_any_order(sd: Any, tmp_path: Path) -> None:
    first, second = file_of(sd, tmp_path, "a")[0], file_of(sd, tmp_path, "b", rank=2)[0]
    found = []
    for order in ((first, second), (second, first)):
        for path in order:
            sd.adapters.load(path)
        found.append(sd.text_to_image("a cat", **CALL).tensor)
        for each in sd.adapters.list():
            sd.adapters.remove(each.name)
    assert rms(found[0] - found[1]) < BAR * rms(found[0])


def test_strengths_of_parts_and_blocks(sd: Any, tmp_path: Path) -> None:
    path, _ = file_of(sd, tmp_path)
    before = weights_of(sd)

    def changed() -> set[str]:
        now = sd.state_dict()
        return {name for name in now if not torch.equal(now[name], before[name])}

    sd.adapters.load(path, name="unet alone", text_strength=0.0)
    assert changed() and all(name.startswith("denoiser.net.") for name in changed())
    sd.adapters.set("unet alone", 0.0, text_strength=1.0)
    assert changed() and all(name.startswith("text.") for name in changed())
    sd.adapters.set("unet alone", 1.0, text_strength=0.0, blocks={"IN01": 1, "OUT03": 0.5})
    assert changed() and all(".down_blocks.0." in name or ".up_blocks.1." in name for name in changed())
    with pytest.raises(ValueError, match="unknown block 'IN99'"):
        sd.adapters.set("unet alone", blocks={"IN99": 1})
    with pytest.raises(ValueError, match="expected 12, 17, 20, 26 factors, got 3"):
        sd.adapters.set("unet alone", blocks=[1, 0, 1])
    sd.adapters.remove("unet alone")


def test_optimised_pipelines(sd: Any, tmp_path: Path) -> None:
    path, _ = file_of(sd, tmp_path)
    plain = sd.text_to_image("a cat", **CALL).tensor
    sd.adapters.load(path)
    wanted = sd.text_to_image("a cat", **CALL).tensor
    sd.adapters.remove("style")
    fast = ldm.optimize(copy.deepcopy(sd), kernels=False)
    fast.text_to_image("a cat", **CALL)  # the packed weights are made
    for merge in (True, False):
        fast.adapters.load(path, merge=merge)
        got = fast.text_to_image("a cat", **CALL).tensor
        assert (got - wanted).abs().max() < 1e-4 < (got - plain).abs().max()
        fast.adapters.remove("style")
        assert (fast.text_to_image("a cat", **CALL).tensor - plain).abs().max() < 1e-4


def test_bfloat16_is_rounded_once(sd: Any, tmp_path: Path) -> None:
    path, _ = file_of(sd, tmp_path)
    half = copy.deepcopy(sd).to(torch.bfloat16)
    wide = copy.deepcopy(half).float()
    half.adapters.load(path)
    wide.adapters.load(path)
    for name, value in wide.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.to(torch.bfloat16)), name


def test_copies_and_conversions(sd: Any, tmp_path: Path) -> None:
    path, _ = file_of(sd, tmp_path)
    before = weights_of(sd)
    sd.adapters.load(path)
    other = copy.deepcopy(sd)
    sd.adapters.remove("style")
    assert same_bits(sd, before) and not same_bits(other, before)
    other.to(torch.bfloat16).adapters.remove("style")
    assert all(torch.equal(value, before[name].to(value.dtype)) for name, value in other.state_dict().items())


def test_weights_that_were_trained_since_are_not_lost(sd: Any, tmp_path: Path) -> None:
    path, _ = file_of(sd, tmp_path)
    other = copy.deepcopy(sd)
    other.adapters.load(path)
    with torch.no_grad():
        for p in other.denoiser.net.parameters():
            p += 1
    before = weights_of(other)
    with pytest.raises(ValueError, match="were changed after an adapter was merged"):
        other.adapters.remove("style")
    assert same_bits(other, before) and "style" in other.adapters
    other.adapters.fuse()
    assert same_bits(other, before) and len(other.adapters) == 0


def refused(pipe: Any, path: Path, match: str, **options: Any) -> None:
    before = weights_of(pipe)
    with pytest.raises(ValueError, match=match):
        pipe.adapters.load(path, **options)
    assert same_bits(pipe, before) and len(pipe.adapters) == 0


def test_what_is_refused(sd: Any, xl: Any, tmp_path: Path) -> None:
    wide = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.zeros(
            2, 2048
        ),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.zeros(
            32, 2
        ),
    }
    refused(sd, written(tmp_path / "xl.safetensors", wide), "made for Stable Diffusion XL")
    towers = kohya_lora({"text2": peers(xl)["text2"]}, KOHYA_XL)
    refused(sd, written(tmp_path / "te2.safetensors", towers), "made for Stable Diffusion XL")
    single = kohya_lora({"text": peers(sd)["text"]}, KOHYA)
    refused(xl, written(tmp_path / "te.safetensors", single), "changes no module of")
    flux = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(2, 8),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.zeros(24, 2),
    }
    refused(sd, written(tmp_path / "flux.safetensors", flux), "made for Flux, changes no module")
    refused(
        sd,
        written(tmp_path / "other.safetensors", {"x": torch.zeros(2, 2, 2)}),
        "unknown family.*its keys: x",
    )
    _, state = file_of(sd, tmp_path)
    name = next(iter(state))
    nan = state | {name: torch.full_like(state[name], float("nan"))}
    refused(sd, written(tmp_path / "nan.safetensors", nan), "NaN or infinity in the changes of 1 tensors")
    half = {key: value for key, value in state.items() if "lora_up" not in key or "attn1_to_q" not in key}
    refused(sd, written(tmp_path / "half.safetensors", half), "unexpected .*lora_down")
    twice = state | {name.replace("lora_down", "lora_A"): state[name]}
    refused(sd, written(tmp_path / "twice.safetensors", twice), "both state the lora_down")
    for value in (float("nan"), float("inf"), True):
        refused(
            sd,
            written(tmp_path / "style.safetensors", state),
            "strength: expected a finite number",
            strength=value,
        )


@pytest.mark.parametrize("convert", [np.float32, np.asarray, torch.tensor])
def test_strengths_of_numpy_and_torch_are_numbers(sd: Any, tmp_path: Path, convert: Any) -> None:
    _, state = file_of(sd, tmp_path)
    path = written(tmp_path / "style.safetensors", state)
    loaded = sd.adapters.load(path, strength=convert(0.5), blocks={"IN01": convert(0.25)})
    try:
        assert (loaded.strength, loaded.text_strength, loaded.blocks) == (0.5, 0.5, {"IN01": 0.25})
        sd.adapters.set("style", convert(2.0), text_strength=convert(0.125))
        (entry,) = sd.adapters.entries()
        assert (
            json.dumps([entry.strength, entry.text_strength, entry.blocks]) == '[2.0, 0.125, {"IN01": 0.25}]'
        )
    finally:
        sd.adapters.remove("style")


def test_unused_keys_are_named(sd: Any, tmp_path: Path) -> None:
    _, state = file_of(sd, tmp_path)
    path = written(tmp_path / "more.safetensors", state | {"lora_unet_nowhere.alpha": torch.tensor(1.0)})
    refused(sd, path, "1 unexpected .lora_unet_nowhere.alpha.; strict=False")
    with pytest.warns(UnusedKeys, match="lora_unet_nowhere.alpha"):
        loaded = sd.adapters.load(path, strict=False)
    assert loaded.adapter.unused == ("lora_unet_nowhere.alpha",)
    sd.adapters.remove("more")


def test_hostile_pickles_are_refused(sd: Any, tmp_path: Path) -> None:
    canary_ckpt(tmp_path / "evil.pt", tmp_path / "executed")
    refused(sd, tmp_path / "evil.pt", "is refused")
    assert not (tmp_path / "executed").exists()


def test_pickled_adapters(sd: Any, tmp_path: Path) -> None:
    _, state = file_of(sd, tmp_path)
    torch.save(state, tmp_path / "old.bin")
    assert sum(sd.adapters.load(tmp_path / "old.bin").adapter.modules.values()) == len(state) / 3
    sd.adapters.remove("old")


def test_names(sd: Any, tmp_path: Path) -> None:
    path, _ = file_of(sd, tmp_path)
    sd.adapters.load(path)
    with pytest.raises(ValueError, match="an adapter 'style' is loaded"):
        sd.adapters.load(path)
    with pytest.raises(ValueError, match="no adapter is called 'stile'; did you mean 'style'"):
        sd.adapters.set("stile", 1.0)
    assert [each.name for each in sd.adapters.list()] == ["style"] and "style: " in str(sd.adapters)
    sd.adapters.remove("style")
    with pytest.raises(FileNotFoundError):
        sd.adapters.load(tmp_path / "absent.safetensors")


def test_recipes_name_adapters_and_replay_needs_them(tmp_path: Path) -> None:
    pipe = ldm.load(device="cpu", dtype="float32")
    first, second = (tmp_path / name for name in ("first.safetensors", "second.safetensors"))
    for seed, path in enumerate((first, second)):
        written(path, embedded_lora(pipe, seed))
    plain = pipe.text_to_image("a red apple", **CALL)
    assert "adapters" not in plain.recipe
    pipe.adapters.load(first, strength=0.5)
    pipe.adapters.fuse()
    pipe.adapters.load(second, strength=0.8, text_strength=0.0, blocks={"M00": 0.5, "IN04": 1.0})
    images = pipe.text_to_image("a red apple", **CALL)
    assert [(each["name"], each["strength"], each["fused"]) for each in images.recipe["adapters"]] == [
        ("first", 0.5, True),
        ("second", 0.8, False),
    ]
    images.save(tmp_path / "apple.png")
    recipe = read_recipe(tmp_path / "apple.png")
    assert torch.equal(replay(recipe, adapters=tmp_path).tensor, images.tensor)
    assert not torch.equal(plain.tensor, images.tensor)
    with pytest.raises(FileNotFoundError, match="made with the adapter 'second'.*pass adapters=PATH"):
        replay(recipe, adapters=first)
    written(second, embedded_lora(pipe, 7))
    with pytest.raises(FileNotFoundError, match="made with the adapter 'second'"):
        replay(recipe, adapters=[first, second])


def embedded_lora(pipe: Any, seed: int) -> dict[str, Tensor]:
    """Return a random LoRA of the embedded model's UNet, in its own names."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, module in targets(pipe.denoiser.net, ("to_q", "to_v")).items():
        down, up = lora_tensors(module, 2, generator)
        state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return state


def test_distilled_helpers_set_the_defaults(sd: Any, tmp_path: Path) -> None:
    plain = sd.text_to_image("a cat", seed=3, progress=False).recipe
    state = kohya_lora({"unet": peers(sd)["unet"]}, KOHYA)
    for file, sampler, steps, t in (
        ("my-lcm-lora.safetensors", "lcm", 4, 999),
        ("sdxl_lightning_2step_lora.safetensors", "euler", 2, 999),
        ("Hyper-SD15-8steps-lora.safetensors", "ddim", 8, 999),
        ("TCD-SD15-LoRA.safetensors", "tcd", 4, 999),
    ):
        path = written(tmp_path / file, state)
        with pytest.warns(DefaultsChanged, match=f"sampler {sampler}, {steps} steps, guidance 1"):
            loaded = sd.adapters.load(path)
        assert f"sampler {sampler}" in str(loaded)
        images = sd.text_to_image("a cat", seed=3, progress=False)
        recipe = images.recipe
        assert (recipe["sampler"], recipe["steps"], recipe["guidance"]) == (sampler, steps, 1.0)
        assert sd.settle("a cat").grid.t[0] == t
        changed = sd.text_to_image("a cat", seed=3, progress=False, sampler="ddim", steps=3, guidance=2.0)
        assert changed.recipe["sampler"] == "ddim" and changed.recipe["guidance"] == 2.0
        sd.adapters.remove(loaded.name)
        after = sd.text_to_image("a cat", seed=3, progress=False).recipe
        assert (after["sampler"], after["steps"]) == (plain["sampler"], plain["steps"])
    loaded = sd.adapters.load(path, helper="none")
    assert sd.settle("a cat").sampler == plain["sampler"]
    sd.adapters.remove(loaded.name)
    loaded = sd.adapters.load(path, helper="lcm-lora")
    assert sd.settle("a cat").sampler == "lcm"
    sd.adapters.remove(loaded.name)
    with pytest.raises(ValueError, match="helper 'lcm'; did you mean 'lcm-lora'"):
        sd.adapters.load(path, helper="lcm")


def test_saving_with_adapters(sd: Any, tmp_path: Path) -> None:
    path, _ = file_of(sd, tmp_path)
    pipe = copy.deepcopy(sd)
    pipe.adapters.load(path)
    with pytest.raises(ValueError, match="adapters are merged into the weights .style.: call"):
        ldm.save(pipe, tmp_path / "model")
    pipe.adapters.fuse()
    ldm.save(pipe, tmp_path / "model")
    again = ldm.load(sd.name, weights=tmp_path / "model", device="cpu", dtype="float32")
    assert same_bits(again, weights_of(pipe))
