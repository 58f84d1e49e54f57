"""Pickled checkpoints: read as torch reads them, without executing anything."""

from __future__ import annotations

import pickle
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import malicious_files
import numpy as np
import pytest
import torch
from torch import nn

from ldm.weights.formats.pickle_machine import StandIn
from ldm.weights.formats.pickles import LEGACY, examine, read_ckpt, read_pickle


def good_state() -> dict[str, torch.Tensor]:
    tensors = {
        str(dtype): torch.arange(6).to(dtype).view(2, 3)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
    base = torch.arange(12.0).view(3, 4)
    return tensors | {
        "view": base[1:, ::2],
        "transposed": base.t(),
        "base": base,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(5.0),
    }


def check(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_reads_what_torch_writes(tmp_path: Path, legacy: bool, flat: bool) -> None:
    state = good_state()
    content = state if flat else {"state_dict": OrderedDict(state), "global_step": 875000, "epoch": 3}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    checkpoint = read_ckpt(tmp_path / "a.ckpt")
    check(checkpoint.tensors, state)
    assert checkpoint.values == ({} if flat else {"global_step": 875000, "epoch": 3})


def test_modules_parameters_and_metadata(tmp_path: Path) -> None:
    net = nn.Linear(3, 4)
    torch.save({"state_dict": net.state_dict(), "p": net.weight}, tmp_path / "a.ckpt")
    check(read_ckpt(tmp_path / "a.ckpt").tensors, dict(net.state_dict()))
    assert torch.equal(read_pickle(tmp_path / "a.ckpt")["p"], net.weight)


def test_tensors_are_mapped(tmp_path: Path) -> None:
    """Storages shared in the file are shared in memory, and writing to them leaves the file as it is."""
    base = torch.zeros(4)
    torch.save({"a": base, "b": base[1:]}, tmp_path / "a.ckpt")
    tensors = read_ckpt(tmp_path / "a.ckpt").tensors
    tensors["b"].fill_(1)
    assert tensors["a"].tolist() == [0, 1, 1, 1]
    assert read_ckpt(tmp_path / "a.ckpt").tensors["a"].tolist() == [0, 0, 0, 0]


def test_training_frameworks_become_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    touched: list[object] = []

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = 1.0

        def __setstate__(self, state: object) -> None:
            touched.append(state)

    class Config(dict):  # type: ignore[type-arg]
        pass

    for cls in (ModelCheckpoint, Config):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {
        "callbacks": {ModelCheckpoint: {"best": np.float64(0.5)}},
        "object": ModelCheckpoint(),
        "config": Config(a=1),
        "state_dict": good_state(),
        "counts": defaultdict(int, {"a": 1}),
        "kinds": {1, 2},
        "array": np.arange(3),
        "path": Path("x"),
        "dtype": torch.float16,
    }
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.ckpt", weights_only=True)  # otherwise this test shows nothing
    checkpoint = read_ckpt(tmp_path / "a.ckpt")
    check(checkpoint.tensors, good_state())
    assert isinstance(read_pickle(tmp_path / "a.ckpt")["object"], StandIn)
    assert not touched
    assert set(checkpoint.dropped) == set(content) - {"state_dict"}


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, legacy: bool) -> None:
    mark = tmp_path / "executed"
    path = malicious_files.canary_ckpt(tmp_path / "bad.ckpt", mark, legacy=legacy)
    with pytest.raises(ValueError, match=r"posix\.mkdir") as error:
        read_ckpt(path)
    assert "bad.ckpt" in str(error.value)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # a reader that trusts the file does execute it
    assert mark.exists()


@pytest.mark.parametrize("module", ["os", "builtins"])
def test_names_given_as_strings_are_seen(tmp_path: Path, module: str) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "good.ckpt")
    mark = tmp_path / "executed"
    name, argument = (
        ("mkdir", str(mark)) if module == "os" else ("eval", f"__import__('os').mkdir({str(mark)!r})")
    )
    text = malicious_files.stack_global(module, name, argument)
    path = malicious_files.repacked(tmp_path / "good.ckpt", tmp_path / "bad.ckpt", data_pkl=text)
    with pytest.raises(ValueError, match=rf"{module}\.{name}"):
        read_ckpt(path)
    assert not mark.exists()
    pickle.loads(text)
    assert mark.exists()


def test_names_that_the_memo_and_the_stack_hide_are_seen(tmp_path: Path) -> None:
    good, bad = b"\x8c\x0bcollections", b"\x8c\x0bOrderedDict"
    # two strings are pushed and popped: os.system remains
    hidden = b"\x80\x04\x8c\x02os\x8c\x06system" + good + bad + b"00\x93."
    assert pickle.loads(hidden) is __import__("os").system
    (tmp_path / "hidden").write_bytes(hidden)
    assert examine(tmp_path / "hidden").refused == ("os.system",)


@pytest.mark.parametrize(
    ("text", "name"),
    [(b"\x80\x02csubprocess\ncall\n.", "subprocess.call"), (b"\x80\x02(ios\nsystem\n.", "os.system")],
)
def test_other_instructions_that_name_globals(text: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(text)
    assert examine(tmp_path / "bad").refused == (name,)
    (tmp_path / "bad").write_bytes(b"\x80\x04\x82\x01.")
    assert "registry of extensions" in examine(tmp_path / "bad").problem


def test_pickles_that_exhaust_memory_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "good.ckpt")
    path = malicious_files.repacked(
        tmp_path / "good.ckpt", tmp_path / "bad.ckpt", data_pkl=malicious_files.huge_memo()
    )
    with pytest.raises(ValueError, match="memo index"):
        read_ckpt(path)
    expanded = torch.ones(1).expand(10**12)
    torch.save({"w": expanded}, tmp_path / "wide.ckpt")
    with pytest.raises(ValueError, match=r"wide.ckpt.*does not fit its storage"):
        read_ckpt(tmp_path / "wide.ckpt")


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "good.ckpt")
    path = malicious_files.repacked(
        tmp_path / "good.ckpt", tmp_path / "bad.ckpt", compress=True, data_pkl=bytes(50_000_000)
    )
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"bad.ckpt.*compressed.*zip bomb"):
        read_ckpt(path)


def test_declared_sizes_and_overlaps_are_checked(tmp_path: Path) -> None:
    """An entry with more bytes than the file, and two entries with the same bytes."""
    torch.save({"w": torch.ones(100)}, tmp_path / "good.ckpt")
    content = (tmp_path / "good.ckpt").read_bytes()
    with zipfile.ZipFile(tmp_path / "good.ckpt") as archive:
        entries, start = archive.infolist(), archive.start_dir
    directory = bytearray(content[start:])
    at = directory.index(entries[-1].filename.encode()) - 46
    for offset, value in ((20, 10**8), (42, entries[0].header_offset)):
        changed = bytearray(directory)
        changed[at + offset : at + offset + 4] = value.to_bytes(4, "little")
        if offset == 20:
            changed[at + 24 : at + 28] = value.to_bytes(4, "little")
        (tmp_path / "bad.ckpt").write_bytes(content[:start] + changed)
        with pytest.raises(ValueError, match=r"bad.ckpt.*outside the archive or overlaps"):
            read_ckpt(tmp_path / "bad.ckpt")


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files_are_refused(tmp_path: Path, keep: float, legacy: bool) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    content = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"a\.ckpt"):
        read_ckpt(tmp_path / "a.ckpt")


def test_a_storage_of_another_size_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100)}, tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    key = next(name for name in entries if name.endswith("data/0"))
    malicious_files.zipped(tmp_path / "short.ckpt", entries | {key: bytes(40)})
    with pytest.raises(ValueError, match="storage '0' of 100"):
        read_ckpt(tmp_path / "short.ckpt")
    del entries[key]
    malicious_files.zipped(tmp_path / "without.ckpt", entries)
    with pytest.raises(ValueError, match="not in the archive"):
        read_ckpt(tmp_path / "without.ckpt")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_is_refused_with_advice(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"clip.pt.*TorchScript.*torch\.jit\.load"):
        read_ckpt(tmp_path / "clip.pt")


def test_other_files(tmp_path: Path) -> None:
    malicious_files.zipped(tmp_path / "outer.zip", {"model.ckpt": b"x"})
    malicious_files.plain_pickle(tmp_path / "plain.ckpt", {"a": 1})
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("hello", encoding="utf-8")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"optimizer": {}}, tmp_path / "none.ckpt")
    for name, words in {
        "outer.zip": "unpack it first.*model.ckpt",
        "plain.ckpt": "torch.save",
        "empty.ckpt": "empty",
        "text.ckpt": "torch.save",
        "list.ckpt": "dictionary",
        "none.ckpt": "no tensors.*optimizer",
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            read_ckpt(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_ckpt(tmp_path / "nowhere.ckpt")


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """Any change of the pickle's bytes either reads or is a ValueError that names the file."""
    torch.save({"state_dict": good_state(), "epoch": 1}, tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        text, entries = archive.read(name), {name: archive.read(name) for name in archive.namelist()}
    generator, refused = np.random.default_rng(0), 0
    for _ in range(150):
        changed = bytearray(text)
        changed[generator.integers(len(changed))] = generator.integers(256)
        path = malicious_files.zipped(tmp_path / "bad.ckpt", entries | {name: bytes(changed)})
        try:
            read_ckpt(path)
        except ValueError as error:
            refused += 1
            assert "bad.ckpt" in str(error)
    assert refused > 20


def test_the_magic_number_is_the_one_that_torch_writes(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a", _use_new_zipfile_serialization=False)
    assert (tmp_path / "a").read_bytes().startswith(LEGACY)
