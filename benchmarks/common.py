"""Shared by the speed benchmarks: alternating sides, medians with their spread, and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ldm.support.calls import separate_call
from ldm.support.files import write_atomically

Side = Callable[[], Any]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parser(description: str, *, repeats: int = 7) -> argparse.ArgumentParser:
    """Return the parser with the options of every speed benchmark."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument(
        "--repeats", type=int, default=repeats, help="runs of each side, alternating, after one warm-up run"
    )
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of every side")
    made.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts processor time: use it with one thread on a busy machine",
    )
    made.add_argument("--json", type=Path, help="write the figures to this file")
    return made


class Quick(argparse.Action):
    """Option without a value that sets others to values for a quick look; options after it count instead."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, values: Mapping[str, Any], **rest: Any
    ) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, **rest)
        self.values = values

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        for name, value in {**self.values, self.dest: True}.items():
            setattr(namespace, name, value)


def add_quick(parser: argparse.ArgumentParser, **values: Any) -> None:
    """Add `--quick`, which ends within five minutes on two cores without AVX-512.

    Args:
        parser: The parser, which has the other options.
        values: What these are set to.

    Raises:
        ValueError: If there is no option of a name.
    """
    unknown = values.keys() - {action.dest for action in parser._actions}
    if unknown:
        raise ValueError(f"--quick sets options that do not exist: {', '.join(sorted(unknown))}")
    shown = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())
    parser.add_argument("--quick", action=Quick, values=values, help=f"end within five minutes: {shown}")


def settle(args: argparse.Namespace) -> None:
    """Set the number of threads and turn gradients off."""
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)


def measure(sides: Mapping[str, Side], repeats: int, clock: str = "wall") -> dict[str, list[float]]:
    """Return the seconds of each side's runs, alternating A B C A B C …, after one warm-up round.

    Evaluations of networks are timed as inside a call of a pipeline, which compares the contents of the
    weights once (`ldm.support.calls`). Calls of a pipeline include that comparison.
    """
    read = time.process_time if clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {who: [] for who in sides}
    with separate_call(torch.nn.Identity()):
        for turn in range(repeats + 1):
            for who, run in sides.items():
                begin = read()
                run()
                if turn:
                    seconds[who].append(read() - begin)
    return seconds


def bar_here(*, avx512: float, avx2: float) -> float:
    """Return the largest ratio that is accepted on this machine: with AVX-512, or without."""
    return avx512 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else avx2


def where(threads: int) -> dict[str, Any]:
    """Return the machine and the versions of the packages."""
    names = ("torch", "diffusers", "openvino", "transformers")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        **versions,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def report(
    question: str,
    settings: Mapping[str, Any],
    seconds: Mapping[str, list[float]],
    args: argparse.Namespace,
    *,
    bars: Mapping[str, float] | None = None,
    extra: Mapping[str, Any] | None = None,
    unit: str = "s",
) -> dict[str, Any]:
    """Print medians, spreads and the ratio of ldm to each peer; write them as JSON if `args.json` is set.

    Args:
        question: What is measured.
        settings: The settings, for the first line and the file.
        seconds: The runs of each side; "ldm", if it was measured, is compared with every other one.
        args: The parsed options (`threads`, `clock`, `json`).
        bars: The largest ratio that is accepted, by peer.
        extra: Further figures to print, by name.
        unit: The unit of the runs. Default: "s".

    Returns:
        The report as it is written.
    """
    sides = {
        who: {"median": statistics.median(runs), "low": min(runs), "high": max(runs), "runs": runs}
        for who, runs in seconds.items()
        if runs
    }
    peers = [who for who in sides if who != "ldm"] if "ldm" in sides else []
    ratios = {who: sides["ldm"]["median"] / sides[who]["median"] for who in peers}
    where_ = where(args.threads)
    print(
        f"{question}: {', '.join(f'{k} {v}' for k, v in settings.items())}; {args.threads} threads,"
        f" {where_['cpu']}, {args.clock} clock"
    )
    for who, side in sides.items():
        print(f"  {who:<18} {side['median']:9.3f} {unit}  ({side['low']:.3f} to {side['high']:.3f})")
    for who, ratio in ratios.items():
        bar = (bars or {}).get(who)
        print(
            f"  ldm / {who:<12} {ratio:9.3f}"
            + ("" if bar is None else f"    bar {bar}: {'met' if ratio <= bar else 'NOT met'}")
        )
    for name, value in (extra or {}).items():
        print(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}")
    result = {
        "question": question,
        "settings": dict(settings),
        "unit": unit,
        "clock": args.clock,
        "sides": sides,
        "ratios": ratios,
        "bars": dict(bars or {}),
        "extra": dict(extra or {}),
        "where": where_,
    }
    if args.json:
        write(args.json, result)
    return result


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the RMS difference relative to the standard deviation of `theirs`."""
    return float((ours.float() - theirs.float()).square().mean().sqrt() / theirs.float().std())
