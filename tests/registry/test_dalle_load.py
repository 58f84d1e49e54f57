"""Loading DALL·E Mini and DALL·E's autoencoder from every layout; wrong and hostile files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_peers import dall_e
from flax_files import flax_autoencoder, flax_tree, packed, whole_state
from pages import in_memory
from safetensors.torch import save_file
from tiny_dalle import (
    CARD,
    DECODER,
    ENCODER,
    TINY_DVAE,
    VQ,
    detokenizer_state,
    register_tiny,
    tiny_dalle,
    tiny_dvae,
    unit_scales,
    vocabulary,
    without_scales,
    write_min_dalle,
    write_tokenizer_files,
)
from torch import Tensor, nn

import ldm
from ldm.catalog.dalle_cards import DalleCard, DalleNetworks, DVAECard
from ldm.catalog.lookup import find_card
from ldm.models.dalle.detokenizer import Detokenizer
from ldm.models.dalle.dvae import DVAE
from ldm.models.vq import VQModel
from ldm.pipelines.dalle.pipeline import DalleMini
from ldm.registry.dalle.reading import load_dvae
from ldm.registry.inspection import inspect
from ldm.registry.locating import WeightsRequest
from ldm.support.memory import PAGEMAP
from ldm.weights.parts import to_layout

Write = Callable[[DalleMini, Path], Path]


def write_flax(pipe: DalleMini, folder: Path, *, scanned: bool = True) -> Path:
    write_tokenizer_files(folder)
    (folder / "flax_model.msgpack").write_bytes(packed(flax_tree(pipe, scanned=scanned)))
    (folder / "vqgan").mkdir()
    (folder / "vqgan" / "flax_model.msgpack").write_bytes(packed(flax_autoencoder(pipe.vae)))
    return folder


def write_layers(pipe: DalleMini, folder: Path) -> Path:
    return write_flax(pipe, folder, scanned=False)


def write_converted(pipe: DalleMini, folder: Path) -> Path:
    write_tokenizer_files(folder)
    torch.save(whole_state(pipe), folder / "pytorch_model.bin")
    (folder / "vqgan").mkdir()
    state = to_layout(pipe.vae, "original")
    content = {"state_dict": {**state, "loss.discriminator.weight": torch.ones(2)}}
    torch.save(content, folder / "vqgan" / "last.ckpt")
    return folder


def write_safetensors_tree(pipe: DalleMini, folder: Path) -> Path:
    """Write min-dalle's tree of folders, in safetensors, beside a model of another size."""
    own = folder / "dalle_bart_mini"
    write_tokenizer_files(own)
    for part, network in (("encoder", pipe.encoder), ("decoder", pipe.decoder)):
        save_file(without_scales(to_layout(network, "original")), own / f"{part}.safetensors")
    (folder / "vqgan").mkdir()
    save_file(detokenizer_state(pipe), folder / "vqgan" / "detoker.safetensors")
    other = folder / "dalle_bart_mega"  # comes first
    other.mkdir()
    wide = {"embed_tokens.weight": torch.zeros(301, 64), "layers.0.glu.fc0.weight": torch.zeros(2, 64)}
    save_file(wide, other / "encoder.safetensors")
    return folder


def write_mini(pipe: DalleMini, folder: Path) -> Path:
    return write_min_dalle(pipe, folder, suffix="_mini")


LAYOUTS: dict[str, Write] = {
    "min-dalle": write_min_dalle,
    "min-dalle-mini": write_mini,
    "tree": write_safetensors_tree,
    "flax": write_flax,
    "flax-layers": write_layers,
    "converted": write_converted,
}


@pytest.fixture(scope="module")
def pipe() -> DalleMini:
    return unit_scales(tiny_dalle())


def tokens(pipe: DalleMini) -> Tensor:
    call = pipe.settle("a red apple", n=2, seed=3, progress=False)
    with torch.no_grad():
        return list(pipe.drawn(call))[-1][1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(layout: str, pipe: DalleMini, tmp_path: Path) -> None:
    register_tiny()
    folder = LAYOUTS[layout](pipe, tmp_path / layout)
    loaded = ldm.load("tiny-dalle", weights=folder, device="cpu", dtype="float32")
    assert isinstance(loaded, DalleMini) and not loaded.training
    for name in ("encoder", "decoder"):
        state = loaded.networks()[name].state_dict()
        for key, value in pipe.networks()[name].state_dict().items():
            assert torch.equal(state[key], value), f"{name}: {key}"
    whole = layout in ("flax", "flax-layers", "converted")
    assert isinstance(loaded.vae, VQModel) and isinstance(loaded.vae, Detokenizer) != whole
    for key, value in loaded.vae.state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[key], value), key
    assert loaded.tokenizer.ids == pipe.tokenizer.ids and loaded.tokenizer.merges == pipe.tokenizer.merges
    assert torch.equal(tokens(loaded), tokens(pipe))
    assert len(loaded.origin) >= 5 and all(len(value) == 64 for value in loaded.origin.values())


def test_saving_and_loading_again(pipe: DalleMini, tmp_path: Path) -> None:
    folder = ldm.save(pipe, tmp_path / "model")
    loaded = ldm.load(weights=folder, device="cpu", dtype="float32")
    images = [each.text_to_image("a red apple", n=1, progress=False) for each in (pipe, loaded)]
    assert torch.equal(images[0].tensor, images[1].tensor)
    assert inspect(folder).problems == ()
    with pytest.raises(ValueError, match="expected 'native'"):
        ldm.save(pipe, tmp_path / "other", layout="original")
    (folder / "byte-tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="byte-tokenizer.json"):
        ldm.load(weights=folder)


def test_random_weights_need_no_file() -> None:
    register_tiny()
    pipe = ldm.load("tiny-dalle", weights="random", device="cpu", dtype="float32")
    assert pipe.text_to_image("a cat", n=1, progress=False).tensor.shape == (1, 3, 64, 64)


def test_half_precision_is_read_and_kept(pipe: DalleMini, tmp_path: Path) -> None:
    register_tiny()
    folder = write_min_dalle(pipe, tmp_path / "half")
    for path in folder.glob("*.pt"):
        torch.save({key: value.half() for key, value in torch.load(path).items()}, path)
    loaded = ldm.load("tiny-dalle", weights=folder, device="cpu", dtype="float16")
    kinds = {name: next(network.parameters()).dtype for name, network in loaded.networks().items()}
    assert kinds == {"encoder": torch.float16, "decoder": torch.float16, "vae": torch.float32}
    ldm.optimize(loaded)  # widens them where the processor does not multiply them
    assert loaded.text_to_image("a cat", n=1, progress=False).tensor.isfinite().all()


@pytest.mark.skipif(not PAGEMAP.exists(), reason="the system does not state its pages")
def test_networks_leave_memory_one_after_the_other(tmp_path: Path) -> None:
    """The peak of a call is that of its largest network, not of all; a changed weight stays."""
    sizes = {"width": 128, "inner": 96}
    wide = DalleNetworks(encoder=replace(ENCODER, **sizes), decoder=replace(DECODER, **sizes), vae=VQ)
    card = register_tiny(replace(CARD, networks=wide))
    folder = write_min_dalle(unit_scales(tiny_dalle(card)), tmp_path)
    loaded = ldm.load("tiny-dalle", weights=folder, dtype="float32")  # that of the files, so they are mapped

    def weight(network: nn.Module) -> Tensor:
        return max(network.parameters(), key=lambda p: p.numel())

    watched = {name: weight(network) for name, network in loaded.networks().items()}

    def there() -> set[str]:
        return {name for name, tensor in watched.items() if in_memory(tensor)}

    seen: dict[str, set[str]] = {}
    call = {"n": 1, "progress": False, "keep_steps": False}
    loaded.encoder.register_forward_pre_hook(lambda *_: seen.update(before=there()))
    loaded.vae.decoder.register_forward_pre_hook(lambda *_: seen.update(decoding=there()))
    first = loaded.text_to_image("an apple", on_step=lambda *_: seen.update(drawing=there()), **call)
    assert seen == {"before": set(), "drawing": {"decoder"}, "decoding": set()} and there() == set()
    watched["decoder"].data.neg_()
    changed = loaded.text_to_image("an apple", **call)
    assert there() == {"decoder"} and not torch.equal(changed.tensor, first.tensor)
    watched["decoder"].data.neg_()
    assert torch.equal(loaded.text_to_image("an apple", **call).tensor, first.tensor)


def damage(folder: Path, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    torch.save(change(torch.load(folder / name)), folder / name)


def drop(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("encoder.pt", drop("layers.1.glu.ln0.bias"), "1 missing .layers.1.glu.ln0.bias"),
        ("decoder.pt", drop("lm_head.weight"), "no decoder of 'tiny-dalle'"),
        ("decoder.pt", lambda s: {**s, "extra": torch.ones(1)}, "1 unexpected .extra"),
        ("decoder.pt", lambda s: {**s, "final_ln.weight": torch.ones(32)}, "missing"),  # not exactly the set
        ("encoder.pt", lambda s: {**s, "final_ln.bias": torch.ones(31)}, "misshapen"),
        ("detoker.pt", lambda s: {**s, "embedding.weight": torch.full((64, 8), float("nan"))}, "NaN"),
        ("detoker.pt", drop("decoder.conv_in.bias"), "1 missing .decoder.conv_in.bias"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    file: str, change: Callable[..., Any], message: str, pipe: DalleMini, tmp_path: Path
) -> None:
    register_tiny()
    folder = write_min_dalle(pipe, tmp_path / "model")
    damage(folder, file, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ldm.load("tiny-dalle", weights=folder, dtype="float32")


@pytest.mark.parametrize("missing", ["encoder.pt", "decoder.pt", "detoker.pt", "vocab.json", "merges.txt"])
def test_absent_files_are_named(missing: str, pipe: DalleMini, tmp_path: Path) -> None:
    register_tiny()
    folder = write_min_dalle(pipe, tmp_path / "model")
    (folder / missing).unlink()
    expected = {"detoker.pt": "no vae"}.get(missing, missing.split(".")[0])
    with pytest.raises(FileNotFoundError, match=expected):
        ldm.load("tiny-dalle", weights=folder)


class Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_nothing_in_a_file_is_executed(pipe: DalleMini, tmp_path: Path, monkeypatch) -> None:
    register_tiny()
    monkeypatch.chdir(tmp_path)
    folder = write_min_dalle(pipe, tmp_path / "model")
    torch.save({"a": torch.ones(1), "b": Runs()}, folder / "decoder.pt")
    with pytest.raises(ValueError, match="might run code"):
        ldm.load("tiny-dalle", weights=folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "encoder.pt"])
def test_damaged_files_are_named(file: str, pipe: DalleMini, tmp_path: Path) -> None:
    register_tiny()
    folder = write_min_dalle(pipe, tmp_path / "model")
    (folder / file).write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=file.split(".")[0]):
        ldm.load("tiny-dalle", weights=folder)


def test_a_tokenizer_of_another_model_is_refused(pipe: DalleMini, tmp_path: Path) -> None:
    register_tiny()
    folder = write_min_dalle(pipe, tmp_path / "model")
    (folder / "vocab.json").write_text(json.dumps({**vocabulary(), "zz": 300}), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer has 301 ids, the encoder 300"):
        ldm.load("tiny-dalle", weights=folder)


@pytest.mark.parametrize("merges", [list(map(str, ("a b", "c d"))), [["a", "b"], ["c", "d"]]])
def test_the_tokenizer_file_of_hugging_face(merges: list[Any], pipe: DalleMini, tmp_path: Path) -> None:
    register_tiny()
    folder = write_min_dalle(pipe, tmp_path / "model")
    (folder / "merges.txt").unlink()
    content = {"model": {"vocab": vocabulary(), "merges": merges}}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    loaded = ldm.load("tiny-dalle", weights=folder, dtype="float32")
    assert loaded.tokenizer.merges == ("a b", "c d")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}', encoding="utf-8")
    with pytest.raises(ValueError, match="model.merges"):
        ldm.load("tiny-dalle", weights=folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_model", 64, "d_model 64, expected 32"),
        ("use_glu", False, "use_glu False, expected True"),
        ("ln_positions", "postln", "ln_positions postln, expected normformer"),
        ("normalize_text", False, "normalize_text False, expected True"),
        ("decoder_start_token_id", 63, "decoder_start_token_id 63, expected 64"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    field: str, value: Any, message: str, pipe: DalleMini, tmp_path: Path
) -> None:
    register_tiny()
    folder = write_min_dalle(pipe, tmp_path / "model")
    stated = {"model_type": "dallebart", "d_model": 32, "dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    ldm.load("tiny-dalle", weights=folder, dtype="float32")
    (folder / "config.json").write_text(json.dumps({**stated, field: value}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ldm.load("tiny-dalle", weights=folder)


def test_unknown_fields_of_a_configuration_are_warned_of(pipe: DalleMini, tmp_path: Path) -> None:
    register_tiny()
    folder = write_min_dalle(pipe, tmp_path / "model")
    stated = {"model_type": "dallebart", "use_new_attention": True}
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    with pytest.warns(UserWarning, match="not known here and not followed: use_new_attention True"):
        ldm.load("tiny-dalle", weights=folder, dtype="float32")


def test_options_of_diffusion_models_are_refused() -> None:
    register_tiny()
    for options in ({"prediction": "v"}, {"ema": True}, {"vocabulary": "x"}):
        with pytest.raises(ValueError, match="no diffusion model"):
            ldm.load("tiny-dalle", weights="random", **options)
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        ldm.load("tiny-dalle", weights="nowhere")


def test_a_single_part_is_refused_with_advice(pipe: DalleMini, tmp_path: Path) -> None:
    folder = write_min_dalle(pipe, tmp_path / "model")
    report = inspect(folder / "decoder.pt")
    assert report.found is not None and report.found.name == "dalle-mini-decoder"
    for name, family in (("encoder.pt", "dalle-mini-encoder"), ("detoker.pt", "dalle-mini-detokenizer")):
        found = inspect(folder / name).found
        assert found is not None and found.name == family
    with pytest.raises(ValueError, match="part of a model|expected one of"):
        ldm.load("sd-v1-5", weights=folder / "decoder.pt")


def test_inspecting_a_whole_checkpoint(pipe: DalleMini, tmp_path: Path) -> None:
    register_tiny()
    folder = write_flax(pipe, tmp_path / "flax")
    report = inspect(folder / "flax_model.msgpack")
    assert report.found is not None and report.found.name == "dalle-mini" and report.problems == ()
    assert {part.name for part in report.parts} == {"encoder", "decoder"}
    assert all(bool(fit) for fit in report.fits["tiny-dalle"].values()), report.fits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspecting_a_folder(layout: str, pipe: DalleMini, tmp_path: Path) -> None:
    register_tiny()
    folder = LAYOUTS[layout](pipe, tmp_path / layout)
    report = inspect(folder, nan=True, digest=True)
    assert {"encoder", "decoder", "vae"} <= {part.name for part in report.parts}
    assert report.stated == ("the sizes are those of 'tiny-dalle'",)
    assert report.problems == () and report.bad == () and report.judged and not report.unsafe
    assert report.sha256 and all(len(value) == 64 for value in report.sha256.values())


def test_a_folder_of_many_files_is_none_of_these(tmp_path: Path) -> None:
    for i in range(41):
        save_file({"a": torch.ones(1)}, tmp_path / f"{i}.safetensors")
    assert inspect(tmp_path).kind == "folder"


def test_inspecting_shows_what_a_configuration_states(pipe: DalleMini, tmp_path: Path) -> None:
    register_tiny()
    folder = write_min_dalle(pipe, tmp_path / "model")
    stated = {"model_type": "dallebart", "d_model": 32, "ln_positions": "postln"}
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    report = inspect(folder)
    assert any("d_model = 32" in line for line in report.stated), report.stated
    assert any("ln_positions postln, expected normformer" in problem for problem in report.problems)
    (folder / "encoder.pt").write_bytes((folder / "encoder.pt").read_bytes()[:999])
    assert any("encoder.pt" in problem for problem in inspect(folder).problems)


# DALL·E's autoencoder


DVAE_CARD = DVAECard(name="tiny-dvae", family="dalle-dvae", summary="", licence="", vae=TINY_DVAE)


def request(path: Path | str) -> WeightsRequest:
    return WeightsRequest(weights=path, dtype=torch.float32)


def write_pickled(network: DVAE, folder: Path) -> Path:
    """Write encoder.pkl and decoder.pkl as OpenAI did: whole modules."""
    package, c = dall_e(), network.config
    sizes = {"n_hid": c.width, "n_blk_per_group": c.blocks, "vocab_size": c.codes}
    folder.mkdir()
    for half in ("encoder", "decoder"):
        first = {"n_init": c.first} if half == "decoder" else {}
        module = getattr(package, half.title())(**sizes, **first)
        module.load_state_dict(getattr(network, half).state_dict())
        torch.save(module, folder / f"{half}.pkl")
    return folder


def test_whole_pickled_modules_are_read_without_their_classes(tmp_path: Path) -> None:
    network = tiny_dvae()
    folder = write_pickled(network, tmp_path / "dvae")
    loaded = load_dvae(DVAE_CARD, request(folder))
    assert isinstance(loaded, DVAE)
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    for half in ("encoder", "decoder"):
        found = inspect(folder / f"{half}.pkl").found
        assert found is not None and found.name == f"dalle-dvae-{half}"
    (folder / "decoder.pkl").unlink()
    with pytest.raises(FileNotFoundError, match="no decoder of 'tiny-dvae'"):
        load_dvae(DVAE_CARD, request(folder))


def test_a_file_of_both_halves(tmp_path: Path) -> None:
    network = tiny_dvae()
    save_file(dict(network.state_dict()), tmp_path / "dvae.safetensors")
    loaded = load_dvae(DVAE_CARD, request(tmp_path / "dvae.safetensors"))
    assert torch.equal(
        loaded.state_dict()["decoder.blocks.input.w"], network.decoder.state_dict()["blocks.input.w"]
    )
    assert isinstance(load_dvae(DVAE_CARD, request("random")), DVAE)


def test_pickled_modules_that_are_none_are_refused(tmp_path: Path) -> None:
    cyclic = nn.Sequential()
    cyclic._modules["again"] = cyclic
    for content, message in (
        (cyclic, "at most 10,000 modules"),
        (nn.Identity(), "no tensors|no decoder|known"),
    ):
        torch.save(content, tmp_path / "decoder.pkl")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_dvae(DVAE_CARD, request(tmp_path))
    odd = nn.Sequential()
    odd._modules["text"] = "text"  # type: ignore[assignment]
    torch.save(odd, tmp_path / "decoder.pkl")
    with pytest.raises(ValueError, match="expected tensors or a module"):
        load_dvae(DVAE_CARD, request(tmp_path))
    torch.save(nn.Linear(2, 2), tmp_path / "decoder.pkl")
    with pytest.raises(ValueError, match="might run code"):
        load_dvae(DVAE_CARD, request(tmp_path))


def test_the_autoencoder_alone_in_flax(pipe: DalleMini, tmp_path: Path) -> None:
    folder = write_flax(pipe, tmp_path / "flax")
    card = find_card("vqgan-imagenet-f16-16384")[0]
    with pytest.raises(ValueError, match="misshapen"):  # a tiny one
        ldm.load(card.name, weights=folder / "vqgan", dtype="float32")


def test_cards_state_what_they_need() -> None:
    with pytest.raises(ValueError, match="networks"):
        DalleCard(name="x", summary="", licence="")
    with pytest.raises(ValueError, match="unknown shape 'dalle-min'"):
        DalleNetworks(encoder="dalle-min", decoder="dalle-mini")
    with pytest.raises(ValueError, match="no sampler"):
        CARD.main_stage()
