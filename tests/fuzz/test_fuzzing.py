"""The fuzzing itself: what must not happen is noticed, and mutants follow from their number."""

from __future__ import annotations

import ctypes
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from fuzzing import Target, check
from mutations import mixed, mutated_bytes, mutated_json

SEED = b'{"a": [1, 2.5], "b": {"c": "text"}}'


def fine(path: Path) -> None:
    if path.read_bytes() != SEED:
        raise ValueError("mutant is refused")


def wrong(path: Path) -> None:
    fault = path.read_bytes().decode()
    if fault == "class":
        raise KeyError("mutant")
    if fault == "name":
        raise ValueError("a file")
    if fault == "escape":
        raise ValueError("mutant \x1b[2J")
    if fault == "long":
        raise ValueError("mutant" * 1000)
    if fault == "time":
        begin = time.process_time()
        while time.process_time() - begin < 0.3:
            pass
    if fault == "hang":
        time.sleep(100)
    if fault == "memory":
        np.ones(260 << 20, dtype=np.uint8)
    if fault == "hidden memory":
        try:
            bytearray(1 << 40)
        except MemoryError:
            raise ValueError("mutant is too large") from None
    if fault == "crash":
        ctypes.string_at(0)
    if fault == "exit":
        raise SystemExit
    if fault == "process":
        os.system("true")
    if fault == "write":
        (path.parent / "other").write_text("", encoding="utf-8")
    if fault == "code":
        eval("1 + 1")


@pytest.mark.parametrize(
    ("fault", "words"),
    {
        "class": "KeyError is not documented",
        "name": "does not name 'mutant'",
        "escape": "control characters",
        "long": "6000 characters",
        "time": r"it took \d\.\d s",
        "hang": "no answer",
        "memory": "MB",
        "hidden memory": "asked for more than",
        "crash": r"the process ended \(exit code -11\)",
        "exit": "SystemExit is not documented",
        "process": "it did os.system",
        "write": "it did open.*other",
        "code": "it did compile",
    }.items(),
)
def test_what_must_not_happen_is_noticed(
    fault: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_FUZZ", "1")
    target = Target(name=fault, read=wrong, seconds=0.2)
    with pytest.raises(AssertionError, match=words):
        check(target, [b"valid"], lambda seeds, rng: fault.encode(), tmp_path)
    assert (tmp_path / "fault-0").read_bytes() == fault.encode()


def test_a_target_without_faults_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(Target(name="fine", read=fine), [SEED], mixed(mutated_bytes, mutated_json), tmp_path)
    assert ", 0 faults; ValueError " in capsys.readouterr().out


def test_mutants_follow_from_their_number_and_differ() -> None:
    for mutate in (mutated_bytes, mutated_json):
        made = [mutate([SEED], random.Random(f"x/{i}")) for i in range(200)]
        assert made == [mutate([SEED], random.Random(f"x/{i}")) for i in range(200)]
        assert len(set(made)) > 120 and sum(data != SEED for data in made) > 180
