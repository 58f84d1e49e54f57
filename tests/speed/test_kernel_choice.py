"""The instruction set of the kernels: what is chosen, why, and what LDM_ISA limits."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ldm
from ldm.speed.kernels.choice import described, kernel_choice
from ldm.speed.kernels.ops import keys_at_once
from ldm.support import processor
from ldm.support.processor import (
    BASELINE,
    INSTRUCTION_SETS,
    cache_bytes,
    permitted_sets,
    processor_sets,
    shared_cache_bytes,
)

ROOT = Path(ldm.__file__).parents[1]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Let the processor be one of the given architecture and features."""
    monkeypatch.delenv("LDM_ISA", raising=False)
    monkeypatch.delenv("LDM_KERNELS", raising=False)
    monkeypatch.setattr(platform, "system", lambda: "Linux")

    def be(architecture, features, capability="AVX512", word="flags"):
        cpuinfo = tmp_path / "cpuinfo"
        lines = [f"processor\t: {i}\n{word}\t\t: {features[i]}\n" for i in range(len(features))]
        cpuinfo.write_text("\n".join(lines), encoding="utf-8")
        monkeypatch.setattr(processor, "CPU_FACTS", cpuinfo)
        monkeypatch.setattr(platform, "machine", lambda: architecture)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        processor_sets.cache_clear()

    yield be
    monkeypatch.undo()
    processor_sets.cache_clear()


AVX2 = "sse4_2 avx avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("architecture", "features", "best"),
    [
        ("x86_64", f"{AVX512} avx512_bf16", "avx512bf16"),
        ("x86_64", AVX512, "avx512"),
        ("x86_64", f"{AVX2} avx512f", "avx2"),  # some AVX-512, but not all of it
        ("x86_64", "sse4_2 avx avx2", None),  # no FMA
        ("x86_64", "", None),
        ("aarch64", "fp asimd", "neon"),
        ("riscv64", "", None),
    ],
)
def test_the_best_set_of_the_processor_is_chosen(machine, architecture, features, best):
    machine(architecture, [features, features], word="Features" if architecture == "aarch64" else "flags")
    choice = kernel_choice()
    assert (choice.isa.name if choice.isa else None) == best
    assert ("best" if best else "neither AVX2 nor NEON") in described(choice)


def test_all_cores_must_have_the_set(machine):
    machine("x86_64", [AVX512, AVX2])
    assert kernel_choice().isa.name == "avx2"


def test_ldm_isa_lowers_the_choice(machine, monkeypatch):
    machine("x86_64", [AVX512])
    chosen = {}
    for name in ("avx512", "avx2", BASELINE):
        monkeypatch.setenv("LDM_ISA", name)
        chosen[name] = described(kernel_choice())
    assert chosen == {
        "avx512": "avx512 (the best of this processor)",
        "avx2": "avx2 (LDM_ISA=avx2)",
        BASELINE: "baseline (LDM_ISA=baseline)",
    }
    for name in ("avx512bf16", "neon", "avx-2"):  # what the processor lacks, or nobody has
        monkeypatch.setenv("LDM_ISA", name)
        with pytest.raises(
            ValueError, match=rf"LDM_ISA='{name}' on this processor: .*avx2, avx512, baseline"
        ):
            permitted_sets()


@pytest.mark.parametrize(("capability", "best"), [("AVX2", "avx2"), ("DEFAULT", None)])
def test_the_kernels_use_no_more_than_pytorch(machine, capability, best):
    machine("x86_64", [AVX512], capability)
    choice = kernel_choice()
    assert (choice.isa.name if choice.isa else None) == best
    assert choice.reason == f"PyTorch is limited to {capability}"


def test_other_systems_and_switched_off_kernels(machine, monkeypatch):
    machine("x86_64", [AVX512])
    monkeypatch.setenv("LDM_KERNELS", "0")
    assert described(kernel_choice()) == "baseline (LDM_KERNELS=0)"
    monkeypatch.delenv("LDM_KERNELS")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert kernel_choice() == (None, "written for Linux, this is Darwin")


PROBE = """
import json, os
import ldm, torch
from ldm.speed.kernels.choice import kernel_choice
print(json.dumps([torch.backends.cpu.get_cpu_capability(), os.environ["ONEDNN_MAX_CPU_ISA"],
                  kernel_choice().isa and kernel_choice().isa.name]))
"""


@pytest.mark.parametrize(
    ("name", "expected"), [("avx2", ["AVX2", "AVX2", "avx2"]), (BASELINE, ["DEFAULT", "SSE41", None])]
)
def test_ldm_isa_limits_pytorch_in_a_new_process(name, expected):
    if INSTRUCTION_SETS["avx2"] not in processor_sets():
        pytest.skip("this processor has no AVX2")
    env = {**os.environ, "LDM_ISA": name, "PYTHONPATH": str(ROOT)}
    for variable in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "LDM_KERNELS"):
        env.pop(variable, None)
    shown = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, check=True)
    assert json.loads(shown.stdout) == expected


def test_cache_sizes_are_those_that_the_system_states(tmp_path, monkeypatch):
    stated = [
        ("index0", "Data", 1, "48K"),
        ("index1", "Instruction", 1, "32K"),
        ("index2", "Unified", 2, "2M"),
    ]
    for folder, kind, level, size in stated:
        (tmp_path / folder).mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (tmp_path / folder / name).write_text(f"{value}\n", encoding="utf-8")
    monkeypatch.setattr(processor, "CACHE_FOLDERS", tmp_path)
    cache_bytes.cache_clear()
    try:
        assert (cache_bytes(1), cache_bytes(2)) == (48 * 2**10, 2**21)
        cache_bytes.cache_clear()
        for size in ("", "x", "0K"):
            (tmp_path / "index2" / "size").write_text(size, encoding="utf-8")
            assert cache_bytes(2) == processor.DEFAULT_CACHES[2]
            cache_bytes.cache_clear()
    finally:
        monkeypatch.undo()
        cache_bytes.cache_clear()


@pytest.mark.parametrize(
    ("size", "cores", "share"),
    [
        ("32768K", "0-1", 2**24),
        ("32M", "0-3,8-11", 2**22),
        ("1024K", "0", 2**22),
        ("x", "0", 2**23),
        ("64M", "", 2**23),
    ],
)
def test_the_share_of_the_last_cache(tmp_path, monkeypatch, size, cores, share):
    (tmp_path / "index3").mkdir()
    for name, value in (("level", "3"), ("size", size), ("shared_cpu_list", cores)):
        (tmp_path / "index3" / name).write_text(f"{value}\n", encoding="utf-8")
    monkeypatch.setattr(processor, "CACHE_FOLDERS", tmp_path)
    shared_cache_bytes.cache_clear()
    try:
        assert shared_cache_bytes() == share
    finally:
        shared_cache_bytes.cache_clear()


@pytest.mark.parametrize("dim", [8, 40, 160, 512, 4096])
@pytest.mark.parametrize("size", [2**15, 2**18, 2**20, 2**24])
def test_blocks_of_keys_fit_in_the_cache(monkeypatch, dim, size):
    monkeypatch.setattr("ldm.speed.kernels.ops.cache_bytes", lambda level: size)
    keys = keys_at_once(dim)
    assert keys % 64 == 0 and 128 <= keys <= 1024
    assert keys == 128 or 4 * 2 * (48 + dim) * keys <= size
