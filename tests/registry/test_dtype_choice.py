"""`dtype="auto"` chooses by the size of the model and the memory that is free."""

from __future__ import annotations

import logging

import pytest
import torch

import ldm
from ldm.registry import dtype_choice
from ldm.registry.dtype_choice import choose_dtype, count_parameters
from ldm.support import memory
from ldm.support.memory import free_memory

CPU = torch.device("cpu")


def machine(monkeypatch, *, fast, free):
    monkeypatch.setattr(dtype_choice, "fast_dtype", lambda device: fast)
    monkeypatch.setattr(dtype_choice, "free_memory", lambda device: free)


@pytest.mark.parametrize(
    ("fast", "free", "expected", "words"),
    [
        (torch.bfloat16, 10**9, torch.bfloat16, "multiplies it"),
        (torch.float32, 64 * 10**9, torch.float32, "free are 64.0 GB"),
        (torch.float32, 5 * 10**9, torch.float16, "widens"),
        (torch.float32, 10**9, torch.float16, "memory=True"),
        (torch.float32, None, torch.float32, "does not state"),
    ],
)
def test_the_choice_and_its_reason(monkeypatch, fast, free, expected, words):
    machine(monkeypatch, fast=fast, free=free)
    choice = choose_dtype(10**9, CPU)
    assert choice.dtype == expected and words in choice.reason


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_memory_decides_by_the_byte(monkeypatch, device):
    factor = dtype_choice.PACKED if device == "cpu" else 1
    need = int(4 * 10**8 * factor) + dtype_choice.WORKING
    for free, expected in ((need, torch.float32), (need - 1, torch.float16)):
        machine(monkeypatch, fast=torch.float32, free=free)
        assert choose_dtype(10**8, torch.device(device)).dtype == expected


def test_a_model_is_loaded_in_the_dtype_that_is_chosen_and_it_is_said(monkeypatch, caplog):
    for free, expected in ((64 * 10**9, torch.float32), (10**6, torch.float16)):
        machine(monkeypatch, fast=torch.float32, free=free)
        with caplog.at_level(logging.INFO):
            pipe = ldm.load(device="cpu", dtype="auto")
        assert pipe.dtype == expected == pipe.dtype_choice.dtype
        assert pipe.dtype_choice.reason in caplog.text and str(expected).removeprefix("torch.") in caplog.text
    counted = sum(p.numel() for network in pipe.networks().values() for p in network.parameters())
    assert f"{counted / 1e6:.0f} M parameters" in pipe.dtype_choice.reason
    assert ldm.load(device="cpu", dtype="float32").dtype_choice.reason == "it was asked for"
    with pytest.raises(ValueError, match="'aut'; did you mean 'auto'"):
        ldm.load(dtype="aut")
    with pytest.raises(ValueError, match="torch.int8"):
        ldm.load(dtype=torch.int8)


def test_parameters_are_those_of_the_published_networks():
    from ldm.catalog.lookup import find_card

    counted = count_parameters(find_card("sd-v1-5")[0].shapes())
    assert counted == 859_520_964 + 83_653_863 + 123_060_480  # UNet, autoencoder, text tower


def test_a_control_group_limits_what_is_free(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n", encoding="utf-8")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_memory(CPU) == 1000 * 1024
    for name, text in (("max", "900000\n"), ("current", "500000\n"), ("stat", "anon 5\ninactive_file 300\n")):
        (tmp_path / f"memory.{name}").write_text(text, encoding="utf-8")
    assert free_memory(CPU) == 400_300
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert free_memory(CPU) == 1000 * 1024
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert free_memory(CPU) is None and free_memory(torch.device("meta")) is None
