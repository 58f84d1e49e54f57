"""Bad files are refused with a message that names them and nothing executed; good files load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import malicious_files
import original_keys
import pytest
import reduced_families
import torch
from sparse_files import sd1_shapes, sparse_file

import ldm
from ldm.__main__ import main
from ldm.catalog.lookup import REGISTERED
from ldm.weights.formats.safetensors import read_safetensors, write_safetensors


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Return a card's name and a folder with its model as one.safetensors, one.ckpt and a folder."""
    before, path = dict(REGISTERED), tmp_path_factory.mktemp("good")
    name = reduced_families.register("sd-v1-5", path).name
    pipe = reduced_families.load(name)
    one = ldm.save(pipe, path / "one.safetensors", layout="original", dtype="float16")
    torch.save({"state_dict": dict(read_safetensors(one)), "global_step": 7}, path / "one.ckpt")
    ldm.save(pipe, path / "folder", layout="diffusers", dtype="float16")
    yield name, path
    REGISTERED.clear()
    REGISTERED.update(before)


def test_good_files_pass_and_touch_no_network(
    good: tuple[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, path = good
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    for file in ("one.safetensors", "one.ckpt", "folder"):
        assert (
            reduced_families.load(name, weights=path / file)
            .text_to_image("a cat", progress=False)
            .tensor.isfinite()
            .all()
        )
        assert main(["inspect", str(path / file), "--nan"]) == 0
        out = capsys.readouterr().out
        assert "no NaN and no infinity" in out and "UNSAFE" not in out


def refused(name: str, path: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    """Check that load refuses a file with a message that names it, and the command line in one line."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        reduced_families.load(name, weights=path)
    assert path.name in str(error.value)
    capsys.readouterr()
    assert main(["a cat", "--model", name, "--weights", str(path), "-o", str(path.parent / "out.png")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and path.name in captured.err
    assert not (path.parent / "out.png").exists()


def test_a_pickle_that_would_run_code(
    good: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "executed"
    for legacy in (False, True):
        path = malicious_files.canary_ckpt(tmp_path / "bad.ckpt", mark, legacy=legacy)
        refused(good[0], path, capsys, "might run code. Nothing was executed")
        assert main(["inspect", str(path)]) == 1
        assert "UNSAFE: posix.mkdir" in capsys.readouterr().out
        assert not mark.exists()
    torch.load(malicious_files.canary_ckpt(tmp_path / "bad.ckpt", mark), weights_only=False)
    assert mark.exists()  # a reader that trusts the file does execute it


def damaged(good: tuple[str, Path], tmp_path: Path, kind: str) -> Path:
    """Return a copy of a good file, damaged in one way."""
    one, ckpt = good[1] / "one.safetensors", good[1] / "one.ckpt"
    content = one.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    path = tmp_path / f"bad.{'ckpt' if 'ckpt' in kind or kind == 'zip bomb' else 'safetensors'}"
    if kind == "truncated":
        path.write_bytes(content[:-1000])
    elif kind == "truncated header":
        path.write_bytes(content[: length // 2])
    elif kind == "truncated ckpt":
        path.write_bytes(ckpt.read_bytes()[:-5000])
    elif kind == "lying offsets":
        names = [key for key in header if key != "__metadata__"]
        header[names[0]]["data_offsets"][1] += 8
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    elif kind == "zip bomb":
        malicious_files.repacked(ckpt, path, compress=True)
    else:
        state = {key: tensor.clone() for key, tensor in read_safetensors(one).items()}
        state["model.diffusion_model.out.2.bias"][0] = float("nan")
        write_safetensors(path, state)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "is truncated"),
        ("truncated header", "is truncated"),
        ("truncated ckpt", "truncated or damaged"),
        ("lying offsets", "the header contradicts itself"),
        ("zip bomb", "zip bomb"),
        ("nan", "NaN or infinity in 1 tensors"),
    ],
)
def test_damaged_files(
    good: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, message: str
) -> None:
    path = damaged(good, tmp_path, kind)
    refused(good[0], path, capsys, message)
    assert main(["inspect", str(path), "--nan"]) == 1
    assert "PROBLEM" in (out := capsys.readouterr().out) or "NaN or infinity in 1 tensors" in out


def test_a_missing_shard_and_a_missing_part(
    good: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(good[1] / "folder", tmp_path / "folder"))
    unet = folder / "unet"
    state = dict(read_safetensors(unet / "diffusion_pytorch_model.safetensors"))
    halves = sorted(state)[::2], sorted(state)[1::2]
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for keys, shard in zip(halves, names, strict=True):
        write_safetensors(unet / shard, {key: state[key].clone() for key in keys})
    index = {
        "metadata": {},
        "weight_map": {key: shard for keys, shard in zip(halves, names, strict=True) for key in keys},
    }
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    top = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    del top["_ldm_sha256"]  # which would not name the shards
    (folder / "model_index.json").write_text(json.dumps(top), encoding="utf-8")
    assert torch.equal(
        reduced_families.load(good[0], weights=folder).denoiser.net.conv_in.weight,
        state["conv_in.weight"].float(),
    )  # undamaged, it loads
    (unet / names[1]).unlink()
    refused(good[0], folder, capsys, names[1])
    shutil.rmtree(unet)
    refused(good[0], folder, capsys, "unet")


def test_weights_of_another_family(
    good: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sparse_file(tmp_path / "sd.safetensors", sd1_shapes())
    refused(
        "sdxl-base",
        path,
        capsys,
        r"is a file of the family sd1 \(Stable Diffusion 1\.x.*expected one of sdxl .*; the cards for it:"
        r" .*sd-v1-5",
    )
    inpaint = sparse_file(
        tmp_path / "nine.safetensors",
        sd1_shapes("sd1-inpaint") if "sd1-inpaint" in original_keys.UNETS else nine(),
    )
    refused(
        "sd-v1-5",
        inpaint,
        capsys,
        "is a file of the family sd1-inpainting .*; the cards for it: sd-v1-5-inpainting",
    )
    with pytest.raises(ValueError, match=r"one\.safetensors"):  # the shapes of a registered card decide
        reduced_families.load("sd-v1-5", weights=good[1] / "one.safetensors")
    write_safetensors(
        tmp_path / "lora.safetensors",
        {"a.lora_down.weight": torch.zeros(2, 2), "a.lora_up.weight": torch.zeros(2, 2)},
    )
    refused("sd-v1-5", tmp_path / "lora.safetensors", capsys, "lora")
    refused("emoji-ldm", good[1] / "one.safetensors", capsys, "of no published family")


def nine() -> dict[str, tuple[int, ...]]:
    return sd1_shapes() | {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}


def test_files_that_hold_a_part_alone(good: tuple[str, Path], tmp_path: Path) -> None:
    state = read_safetensors(good[1] / "one.safetensors")
    prefix = "model.diffusion_model."
    write_safetensors(
        tmp_path / "unet.safetensors", {key: t.clone() for key, t in state.items() if key.startswith(prefix)}
    )
    with pytest.raises(ValueError, match=r"unet\.safetensors' holds unet, and no vae, text"):
        reduced_families.load(good[0], weights=tmp_path / "unet.safetensors")
    with pytest.raises(FileNotFoundError, match="weights of one part alone"):
        reduced_families.load(good[0], weights=good[1] / "folder" / "unet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither model_index.json"):
        reduced_families.load(good[0], weights=tmp_path / "empty")


def test_an_autoencoder_alone(tmp_path: Path) -> None:
    vae = ldm.load("taesd", weights="random", device="cpu", dtype="float32")
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert vae.decode(vae.encode(x).mode()).shape == x.shape
    keys = {key: tensor.clone() for key, tensor in vae.state_dict().items()}
    write_safetensors(tmp_path / "taesd.safetensors", keys)
    again = ldm.load("taesd", weights=tmp_path / "taesd.safetensors", device="cpu", dtype="float32")
    (tmp_path / "folder").mkdir()
    write_safetensors(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", keys)
    folder = ldm.load("taesd", weights=tmp_path / "folder", device="cpu", dtype="float32")
    for other in (again, folder):
        assert all(
            torch.equal(a, b)
            for a, b in zip(vae.state_dict().values(), other.state_dict().values(), strict=True)
        )
    with pytest.raises(ValueError, match="taesd.safetensors"):
        ldm.load("kl-f8", weights=tmp_path / "taesd.safetensors", device="cpu")


def test_the_local_cache_by_name(
    good: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="names no place in the hub: pass weights=PATH"):
        ldm.load(good[0], device="cpu")
    shutil.copy(good[1] / "one.safetensors", tmp_path / f"{good[0]}.safetensors")
    assert ldm.load(good[0], device="cpu", dtype="float32").origin.keys() == {
        f"{good[0]}.safetensors",
        "card",
    }
