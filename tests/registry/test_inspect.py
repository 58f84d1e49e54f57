"""What `inspect` reports of good and bad files, and that it executes nothing."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import malicious_files
import original_keys
import pytest
import torch
from sparse_files import sd1_shapes, sparse_file

from ldm.catalog.lookup import ASSETS
from ldm.models.unet import UNet, UNetConfig
from ldm.registry.inspection import Candidate, inspect
from ldm.support.config import read_yaml
from ldm.weights.detection import Detection
from ldm.weights.formats.safetensors import sha256, write_safetensors
from ldm.weights.rules.unet import unet_table


def cards(found: Detection) -> list[Candidate]:
    """Return two candidates, one of which fits."""
    cards = []
    for name, channels in (("plain", 4), ("inpainting", 9)):
        with torch.device("meta"):
            net = UNet(UNetConfig(in_channels=channels))
        shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
        cards.append(Candidate(name=name, parts={"unet": (unet_table(shapes), shapes)}))
    return cards


def test_a_full_size_file(tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "sd.safetensors", sd1_shapes())
    report = inspect(path, candidates=cards, digest=False)
    assert report.found is not None
    assert report.found.name == "sd1"
    unet, vae, text = report.parts
    assert (unet.name, unet.tensors, unet.parameters, unet.dtypes) == (
        "unet",
        686,
        859_520_964,
        {"float16": 686},
    )
    assert (vae.parameters, text.name) == (83_653_863, "text")
    assert report.fits["plain"]["unet"]
    assert report.fits["inpainting"]["unet"].misshapen == (
        "input_blocks.0.0.weight: (320, 4, 3, 3), expected (320, 9, 3, 3)",
    )
    assert not report.problems
    assert report.sha256 == {}
    for words in (
        "sd1: Stable Diffusion 1.x",
        "859,520,964 parameters",
        "plain, unet: all keys fit",
        "1 misshapen",
        "no EMA copies",
    ):
        assert words in report.text()


def test_a_file_is_compared_with_every_card_of_its_family(tmp_path: Path) -> None:
    report = inspect(sparse_file(tmp_path / "sd.safetensors", sd1_shapes()), digest=False)
    (fits,) = report.fits.values()
    assert list(report.fits) == ["sd-v1-1, sd-v1-2, sd-v1-3, sd-v1-4, sd-v1-5"]
    assert (
        fits["unet"] and fits["vae"] and len(fits["text"].missing) == 195
    )  # the text tower has only its table here
    assert "loads as  none of the cards" in report.text()


def test_averages_missing_and_stray_tensors_are_reported(tmp_path: Path) -> None:
    keys = sd1_shapes()
    averaged = {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}": shape
        for key, shape in keys.items()
        if key.startswith("model.d")
    }
    lost = keys.pop("model.diffusion_model.out.2.bias")
    report = inspect(
        sparse_file(tmp_path / "sd.safetensors", keys | averaged | {"odd.thing": lost}),
        candidates=cards,
        digest=False,
    )
    assert report.averaged == 685
    assert report.fits["plain"]["unet"].missing == ("out.2.bias",)
    assert any("odd.thing" in problem for problem in report.problems)
    assert "EMA copies of 685 tensors" in report.text()


def test_pickles_are_listed_and_never_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for legacy in (False, True):
        report = inspect(malicious_files.canary_ckpt(tmp_path / "bad.ckpt", mark, legacy=legacy))
        assert report.unsafe == ("posix.mkdir",)
        assert "UNSAFE: posix.mkdir" in report.text()
        assert any("refused" in problem for problem in report.problems)
        assert not mark.exists()
    report = inspect(malicious_files.plain_pickle(tmp_path / "plain.pkl", malicious_files.Canary(mark)))
    assert report.unsafe == ("posix.mkdir",)
    assert not mark.exists()
    torch.save(
        {"state_dict": {"a.lora_down.weight": torch.ones(2, 2)}, "global_step": 5}, tmp_path / "good.ckpt"
    )
    report = inspect(tmp_path / "good.ckpt")
    assert report.unsafe == ()
    assert report.values == {"global_step": 5}
    assert "nothing unsafe" in report.text()
    assert "added to a model" in report.text()


def test_nan_on_request_and_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, {"made": "here"})
    assert inspect(path).bad is None
    report = inspect(path, nan=True)
    assert report.bad == ("b",)
    assert report.sha256 == {"x.safetensors": sha256(path)}
    assert report.values == {"made": "here"}
    assert any("no family" in problem for problem in report.problems)
    assert report.parts[0].parameters == 4


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02", b"{}" * 20, b"\x10" + bytes(7) + b"{"]
)
def test_damaged_files_are_reported_not_raised(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.ckpt").write_bytes(content)
    report = inspect(tmp_path / "bad.ckpt")
    assert any("bad.ckpt" in problem for problem in report.problems)
    assert "PROBLEM" in report.text()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        inspect(tmp_path / "nowhere")


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "flag": true}',
        encoding="utf-8",
    )
    for name, keys in (
        ("unet", original_keys.unet(original_keys.UNETS["sd1"][0])),
        ("vae", original_keys.vae(original_keys.VAES["kl-f8"][0])),
    ):
        (tmp_path / name).mkdir()
        sparse_file(tmp_path / name / "diffusion_pytorch_model.safetensors", keys)
    report = inspect(tmp_path, digest=False)
    assert report.found is not None
    assert report.found.name == "sd1"
    assert {part.name: part.parameters for part in report.parts} == {"unet": 859_520_964, "vae": 83_653_863}
    assert report.values == {"class": "P", "flag": True}
    assert report.size == sum(
        math.prod(s) * 2 for s in original_keys.unet(original_keys.UNETS["sd1"][0]).values()
    ) + 2 * 83_653_863 + headers(tmp_path)
    mark = tmp_path / "executed"
    shutil.rmtree(tmp_path / "vae")
    (tmp_path / "vae").mkdir()
    malicious_files.canary_ckpt(tmp_path / "vae" / "diffusion_pytorch_model.bin", mark)
    report = inspect(tmp_path, digest=False)
    assert report.unsafe == ("vae/diffusion_pytorch_model.bin: posix.mkdir",)
    assert any("diffusion_pytorch_model.bin" in problem for problem in report.problems)
    assert not mark.exists()
    for name in ("other.bin", "model-00001-of-00002.bin", "training.pt"):  # files that are not loaded
        (tmp_path / "vae" / "diffusion_pytorch_model.bin").unlink(missing_ok=True)
        malicious_files.canary_ckpt(tmp_path / "vae" / name, mark)
        torch.save({"w": torch.ones(1)}, tmp_path / "vae" / "good.bin")
        report = inspect(tmp_path, digest=False)
        assert f"vae/{name}: posix.mkdir" in report.unsafe and "nothing unsafe" not in report.text()
    (tmp_path / "empty").mkdir()
    assert any("no weights" in problem for problem in inspect(tmp_path / "empty").problems)


def copied(path: Path, *names: str) -> Path:
    """Return a folder with copies of files of the embedded models."""
    path.mkdir()
    for name in names:
        shutil.copy(ASSETS / name, path / Path(name).name)
    return path


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("emoji-ldm", {"layout": "DiT", "text": "TextTower", "unet": "DiT", "vae": "PatchAutoencoder"}),
        ("emoji-clip", {"vision": "VisionTower"}),  # a training's export: no card
        (
            "emoji-unclip",
            {
                "decoder": "Decoder",
                "layout": "DiT",  # this one, vae and vision where the card locates them
                "prior": "Prior",
                "text": "TextTower",
                "upsampler": "UNet",
                "vae": "PatchAutoencoder",
                "vision": "VisionTower",
                "words": "TextTower",
            },
        ),
    ],
)
def test_the_embedded_folders_are_recognised(name: str, parts: dict[str, str]) -> None:
    report = inspect(ASSETS / name, digest=False, nan=True)
    assert report.problems == () and report.bad == ()
    assert {part: str(value).split(",")[0] for part, value in report.values.items()} == parts
    assert {part.name for part in report.parts} == set(parts) and report.size > 0
    assert "ldm layout" in report.kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("emoji-ldm/unet", "unet of emoji-ldm, in ldm layout"),
        ("emoji-ldm/layout", "layout of emoji-ldm, in ldm layout"),
        ("emoji-ldm/text", "text of emoji-ldm, in ldm layout"),
        ("emoji-unclip/prior", "prior of emoji-unclip, in ldm layout"),
        ("emoji-clip/vision", "vision of a model in ldm layout"),
    ],
)
def test_the_embedded_files_are_recognised(name: str, kind: str) -> None:
    path = ASSETS / f"{name}.safetensors"
    report = inspect(path)
    assert report.kind == kind and report.problems == () and report.found is None
    (part,) = report.parts
    assert part.name == path.stem and part.parameters > 0 and list(report.values) == [path.stem]
    assert report.sha256 == {path.name: sha256(path)}


def test_a_part_without_its_yaml(tmp_path: Path) -> None:
    path = copied(tmp_path / "alone", "emoji-ldm/layout.safetensors") / "layout.safetensors"
    report = inspect(path)
    assert report.parts[0].name == "layout" and "layout of a model in ldm layout" in report.kind
    assert report.problems == (
        "layout.yaml, which states the network of layout.safetensors, is not beside it",
    )


def test_parts_that_do_not_fit_their_yaml(tmp_path: Path) -> None:
    names = ("emoji-clip/vision.safetensors", "emoji-clip/vision.yaml")
    folder = copied(tmp_path / "clip", *names)
    about = (folder / "vision.yaml").read_text(encoding="utf-8")
    (folder / "vision.yaml").write_text(about.replace("layers: 4", "layers: 5"), encoding="utf-8")
    assert "vision.yaml: 12 missing" in inspect(folder, digest=False).problems[0]
    stated = read_yaml(folder / "vision.yaml")["sha256"]
    (folder / "vision.yaml").write_text(about.replace(stated, stated[::-1]), encoding="utf-8")
    for path in (folder, folder / "vision.safetensors"):
        assert inspect(path, digest=False).problems == ()
        assert "its sha256 differs" in inspect(path).problems[0]
    (folder / "vision.safetensors").unlink()
    report = inspect(folder)
    assert report.parts == () and "vision.safetensors is absent" in report.problems[0]


def test_a_folder_whose_card_needs_an_absent_part(tmp_path: Path) -> None:
    folder = copied(
        tmp_path / "ldm",
        *("emoji-ldm/card.yaml", "emoji-ldm/vae.yaml", "emoji-ldm/vae.safetensors"),
    )
    report = inspect(folder, digest=False)
    assert [part.name for part in report.parts] == ["vae"] and "emoji-ldm" in report.kind
    assert len(report.problems) == 2 and "no unet in" in report.problems[0]


def headers(path: Path) -> int:
    return sum(8 + int.from_bytes(file.open("rb").read(8), "little") for file in path.glob("*/*.safetensors"))
