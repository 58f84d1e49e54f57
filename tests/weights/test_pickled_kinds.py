"""The kinds of tensors and objects in pickled checkpoints: read as torch reads them, or refused by name."""

from __future__ import annotations

import sys
import types
import uuid
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from malicious_files import zip_entries
from torch import nn

from ldm.registry.inspection import inspect
from ldm.weights.formats.pickle_machine import Global, StandIn
from ldm.weights.formats.pickle_names import ENTRY_TYPES, INERT, REBUILDERS, STORAGE_TYPES, UNREAD
from ldm.weights.formats.pickles import examine, read_ckpt, read_pickle

FLOATS = [name for name in sorted(ENTRY_TYPES) if "float" in name]
OTHERS = [
    "torch.uint16",
    "torch.uint32",
    "torch.uint64",
    "torch.complex64",
    "torch.complex128",
]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", [*FLOATS, *OTHERS])
def test_every_type_that_torch_has_is_read(name: str, legacy: bool, tmp_path: Path) -> None:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if dtype is None:
        pytest.skip(f"this PyTorch has no {name}")
    base = torch.arange(48, dtype=torch.uint8).view(dtype)
    state = {"base": base, "part": base[1::2], "parameter": base.view(-1, 1), "empty": base[:0]}
    torch.save(state, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    tensors = read_ckpt(tmp_path / "a.ckpt").tensors
    for key, tensor in state.items():
        found = tensors[key]
        assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        raw = [
            each.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()
            for each in (found, tensor)
        ]
        assert raw[0] == raw[1]
    assert tensors["part"].untyped_storage().data_ptr() == tensors["base"].untyped_storage().data_ptr()
    assert inspect(tmp_path / "a.ckpt").unsafe == ()


def test_a_type_that_torch_lacks_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.ckpt")
    monkeypatch.delattr(torch, "float8_e4m3fn")
    with pytest.raises(ValueError, match=r"type torch\.float8_e4m3fn, which PyTorch .* lacks"):
        read_ckpt(tmp_path / "a.ckpt")
    assert inspect(tmp_path / "a.ckpt").unsafe == ()


class Marked(torch.Tensor):
    """A tensor of a class of its own."""


def kinds_that_are_not_read() -> dict[str, torch.Tensor]:
    return {
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "a sparse tensor": torch.eye(3).to_sparse(),
        "a tensor without data": torch.ones(2, device="meta"),
        "complex numbers of 32 bits": torch.ones(2, dtype=torch.complex64).to(torch.complex32),
        "properties": torch.ones(2, dtype=torch.complex64).conj(),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    ["quantised", "a sparse tensor", "a tensor without data", "complex numbers of 32 bits", "properties"],
)
def test_other_kinds_are_refused_by_name_and_not_accused(kind: str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": kinds_that_are_not_read()[kind]}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"a\.ckpt.*{kind}"):
        read_ckpt(tmp_path / "a.ckpt")
    report = inspect(tmp_path / "a.ckpt")
    assert report.unsafe == () and "code" not in report.text()


def test_tensors_with_attributes_and_parameters(tmp_path: Path) -> None:
    tensor, parameter = torch.arange(3.0), nn.Parameter(torch.ones(2))
    tensor.note, parameter.note = "a", {"b": 1}  # type: ignore[attr-defined]
    torch.save(
        {"t": tensor, "p": parameter, "q": nn.Parameter(torch.ones(1)), "b": nn.Buffer(torch.ones(1))},
        tmp_path / "a.ckpt",
    )
    found = read_ckpt(tmp_path / "a.ckpt")
    assert found.tensors["t"].tolist() == [0, 1, 2] and found.tensors["p"].tolist() == [1, 1]
    assert found.tensors.keys() == {"t", "p", "q", "b"}
    torch.save({"w": torch.ones(2).as_subclass(Marked)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="test_pickled_kinds.Marked"):
        read_ckpt(tmp_path / "a.ckpt")


def framework_class(monkeypatch: pytest.MonkeyPatch, name: str, *bases: type) -> type:
    """Return a class that pickles name as one of a training framework, which is not installed."""
    module, _, own = name.rpartition(".")
    made = type(own, bases or (object,), {"__module__": module})
    parts = module.split(".")
    for i in range(len(parts)):
        part = types.ModuleType(".".join(parts[: i + 1]))
        monkeypatch.setitem(sys.modules, part.__name__, part)
    setattr(sys.modules[module], own, made)
    return made


def test_a_checkpoint_of_lightning_with_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Lightning, OmegaConf, NumPy and Python's own types leave in checkpoints of Stable Diffusion."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    classes = {
        name: framework_class(monkeypatch, name)
        for name in (
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
            "pytorch_lightning.utilities.parsing.AttributeDict",
            "lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor",
            "lightning_fabric.utilities.data.AttributeDict",
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.base.ContainerMetadata",
            "omegaconf.nodes.AnyNode",
        )
    }
    config = framework_class(monkeypatch, "omegaconf.listconfig.ListConfig", list)([1, 2])
    config.note = 3
    objects = [made() for made in classes.values()]
    for each in objects:
        each.state = {"path": Path("x"), "deep": [(1, 2)]}  # type: ignore[attr-defined]
    content = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": net.state_dict(),
        "callbacks": {next(iter(classes.values())): {"best": np.float64(0.5), "score": torch.tensor(1.0)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).state_dict()],
        "hyper_parameters": {"config": config, "objects": objects},
        "rng": {"numpy": np.random.default_rng(0).bytes(3), "torch": torch.get_rng_state()},
        "arrays": [np.arange(3), np.ones((2, 2), order="F"), np.array("text"), np.float32(2), np.bool_(True)],
        "dtypes": [np.dtype("float32"), torch.float16, torch.float8_e5m2, torch.device("cuda:0")],
        "python": [
            *({1, 2}, frozenset({3}), b"bytes", bytearray(b"x"), 1 + 2j, range(3), slice(1, 2), None, True),
            *(deque([1]), Counter("aab"), defaultdict(list, {"a": [1]}), OrderedDict(a=1), 2**100, -(2**70)),
            *(
                datetime(2022, 8, 22, tzinfo=timezone(timedelta(0))),
                timedelta(1),
                uuid.uuid4(),
                Decimal("1.5"),
            ),
        ],
        "version": torch.__version__,
    }
    for protocol in (2, 3, 4, 5):
        torch.save(content, tmp_path / "a.ckpt", pickle_protocol=protocol)
        found = read_ckpt(tmp_path / "a.ckpt")
        assert found.tensors.keys() == net.state_dict().keys()
        assert all(torch.equal(found.tensors[key], value) for key, value in net.state_dict().items())
        assert {"epoch": 3, "global_step": 470000}.items() <= found.values.items()
        read = read_pickle(tmp_path / "a.ckpt")
        state = read["optimizer_states"][0]
        assert torch.equal(state["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
        assert isinstance(read["hyper_parameters"]["objects"][0], StandIn)
        assert [type(key) for key in read["callbacks"]] == [Global]
        report = inspect(tmp_path / "a.ckpt", digest=False)
        assert report.unsafe == () and "nothing unsafe" in report.text()


def test_dictionaries_of_python_2_are_read(tmp_path: Path) -> None:
    """They are built from a list of pairs; strings are bytes."""
    pickled = (
        b"\x80\x02ccollections\nOrderedDict\n](](U\x01wctorch._utils\n_rebuild_tensor\n((U\x07storage"
        b"ctorch\nFloatStorage\nU\x010U\x03cpuK\x02tQK\x00K\x02\x85K\x01\x85tRee\x85R."
    )
    (tmp_path / "a.ckpt").write_bytes(zip_entries({"a/data.pkl": pickled, "a/data/0": bytes(8)}))
    assert read_ckpt(tmp_path / "a.ckpt").tensors["w"].tolist() == [0, 0]


def test_files_of_protocol_0_are_read(tmp_path: Path) -> None:
    """Numbers and names in text."""
    content = {
        "state_dict": {"w": torch.arange(3.0)},
        "global_step": 12,
        "rate": 0.5,
        "name": "é",
        "on": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, tmp_path / "a.ckpt", pickle_protocol=1)
    found = read_ckpt(tmp_path / "a.ckpt")
    assert found.tensors["w"].tolist() == [0, 1, 2]
    assert found.values == {"global_step": 12, "rate": 0.5, "name": "é", "on": True}


def test_a_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_ckpt(tmp_path / "a.ckpt")


def test_the_lists_of_names_do_not_overlap_and_hold_no_function_that_runs_code() -> None:
    lists = (set(STORAGE_TYPES), set(ENTRY_TYPES), set(REBUILDERS), set(UNREAD), set(INERT))
    assert sum(map(len, lists)) == len(set().union(*lists))
    for name in ("eval", "exec", "getattr", "__import__", "open", "compile", "map", "apply", "print", "type"):
        for module in ("builtins", "__builtin__"):
            assert f"{module}.{name}" not in set().union(*lists)


def test_shown_values_of_a_file_are_short(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(1)}, "note": "x" * 10**6, "\x1b[2J": 1}, tmp_path / "a.ckpt")
    text = inspect(tmp_path / "a.ckpt", digest=False).text()
    assert len(text) < 2000 and "\x1b" not in text
    assert examine(tmp_path / "a.ckpt").checkpoint().values["note"] == "x" * 10**6
