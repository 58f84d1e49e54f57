"""Measure time and memory of loading a half-precision single file of Stable Diffusion 1.5's size in bfloat16.

    python benchmarks/load.py --json load.json

The peer is diffusers' `from_single_file`; the sides alternate in separate processes, on a file of random
weights (2.1 GB, written first). Time counts from the imported library to the pipeline. Memory is what is
added after the imports, by the kernel's count of anonymous pages (RssAnon), read from outside every 2 ms. The
file is in the page cache for both. Bars: half of the peer's time, 1.15 times the model's own size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WHO = ("ldm", "diffusers")
TIME_BAR, MEMORY_BAR = 0.5, 1.15


def name_of(card: str) -> str:
    """Return the name of a card; register it first if a YAML file is given."""
    import ldm

    return ldm.register(card).name if card.endswith((".yaml", ".yml")) else card


def child(who: str, weights: Path, config: Path, threads: int, card: str) -> None:
    """Run in a separate process: import, print a line, wait for a line, load, and report."""
    import torch

    torch.set_num_threads(threads)
    if who == "ldm":
        import ldm
        import ldm.registry  # noqa: F401  (what `ldm.load` imports when first called)

        name = name_of(card)

        def load() -> Any:
            return ldm.load(name, weights=weights, device="cpu", dtype="bfloat16")

    else:
        import accelerate  # noqa: F401
        import diffusers.models
        import transformers

        _ = (  # so that its lazy modules are imported before the clock starts
            transformers.CLIPTextModel,
            transformers.CLIPTokenizer,
            diffusers.AutoencoderKL,
            diffusers.UNet2DConditionModel,
        )
        diffusers.utils.logging.disable_progress_bar()

        def load() -> Any:
            return diffusers.StableDiffusionPipeline.from_single_file(
                str(weights),
                config=str(config),
                torch_dtype=torch.bfloat16,
                safety_checker=None,
                local_files_only=True,
            )

    print("imported", flush=True)
    sys.stdin.readline()
    begin = time.perf_counter()
    pipe = load()
    seconds = time.perf_counter() - begin
    networks = pipe.networks().values() if who == "ldm" else (pipe.unet, pipe.vae, pipe.text_encoder)
    tensors = [p for network in networks for p in network.parameters()]
    net = pipe.denoiser.net if who == "ldm" else pipe.unet
    sample = net.conv_in.weight.detach().float().sum().item()  # both must hold the same numbers
    report = {
        "seconds": seconds,
        "parameters": sum(p.numel() for p in tensors),
        "bytes": sum(p.numel() * p.element_size() for p in tensors),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in tensors}),
        "conv_in": sample,
    }
    print(json.dumps(report), flush=True)
    sys.stdin.readline()


def anonymous(pid: int) -> int:
    """Return a process's anonymous memory in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def measure(who: str, weights: Path, config: Path, threads: int, card: str) -> dict[str, Any]:
    """Measure one run of one side in a new process."""
    command = [
        sys.executable,
        __file__,
        "--child",
        who,
        "--weights",
        str(weights),
        "--config",
        str(config),
        "--threads",
        str(threads),
    ]
    command += ["--card", card]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=env,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        if process.stdout.readline().strip() != "imported":
            raise RuntimeError(f"{who} could not be imported: {process.stderr.read()[-2000:]}")
        before = peak = anonymous(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        text = b""
        while not text.endswith(b"\n"):
            peak = max(peak, anonymous(process.pid))
            if select.select([process.stdout], [], [], 0.002)[0]:
                text += (piece := os.read(process.stdout.fileno(), 1 << 16))
                if not piece:
                    raise RuntimeError(f"{who} could not load: {process.stderr.read()[-2000:]}")
        process.stdin.write("\n")
        process.stdin.flush()
    return {"who": who, "before": before, "peak": peak - before, **json.loads(text)}


def prepare(folder: Path, card: str) -> tuple[Path, Path]:
    """Return the file and the peer's folder of configurations and tokenizers; create what is missing."""
    weights, config = folder / "random-fp16.safetensors", folder / "config"
    if not weights.is_file() or not (config / "model_index.json").is_file():
        import ldm

        folder.mkdir(parents=True, exist_ok=True)
        pipe = ldm.load(name_of(card), weights="random", device="cpu", dtype="float16")
        ldm.save(pipe, weights, layout="original", dtype="float16")
        ldm.save(pipe, config, layout="diffusers", dtype="float16")
        for file in config.glob("*/*.safetensors"):
            file.unlink()
    with weights.open("rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass
    return weights, config


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure time and memory of loading, against diffusers.")
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of each side, alternating (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count() or 1,
        help="torch threads on each side (default: all)",
    )
    parser.add_argument(
        "--folder", type=Path, help="folder to keep the file in (default: a temporary folder)"
    )
    parser.add_argument(
        "--card",
        default="sd-v1-5",
        help="a card of Stable Diffusion 1's family, or its YAML file (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", choices=WHO, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.weights, args.config, args.threads, args.card)
        return
    with tempfile.TemporaryDirectory() as temporary:
        weights, config = prepare(args.folder or Path(temporary), args.card)
        runs = [
            measure(who, weights, config, args.threads, args.card)
            for _ in range(args.rounds + 1)
            for who in WHO
        ]
        size = weights.stat().st_size
    report = summary(runs[len(WHO) :], size, args.threads)  # the first round warms up
    print_table(report)
    if args.json:
        from ldm.support.files import write_atomically

        write_atomically(args.json, (json.dumps(report, indent=1) + "\n").encode())


def summary(runs: list[dict[str, Any]], size: int, threads: int) -> dict[str, Any]:
    """Return median times, maximum memory, and the two ratios that have bars."""
    import torch

    if len({run["parameters"] for run in runs}) > 1 or len({run["conv_in"] for run in runs}) > 1:
        raise RuntimeError(f"the two sides do not hold the same model: {runs[:2]}")
    sides = {
        who: {
            "seconds": statistics.median(run["seconds"] for run in runs if run["who"] == who),
            "peak": max(run["peak"] for run in runs if run["who"] == who),
            "bytes": next(run["bytes"] for run in runs if run["who"] == who),
        }
        for who in WHO
    }
    ratios = {
        "time": sides["ldm"]["seconds"] / sides["diffusers"]["seconds"],
        "memory": sides["ldm"]["peak"] / sides["ldm"]["bytes"],
    }
    where = {
        "threads": threads,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    met = {"time": ratios["time"] <= TIME_BAR, "memory": ratios["memory"] <= MEMORY_BAR}
    return {"file_bytes": size, "sides": sides, "ratios": ratios, "met": met, "where": where, "runs": runs}


def print_table(report: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"a file of {report['file_bytes'] / 1e9:.2f} GB to bfloat16, {report['where']['threads']} threads")
    print(f"{'':<10} {'seconds (median)':>17} {'peak anonymous':>15} {'/ model':>8}")
    for who, side in report["sides"].items():
        print(
            f"{who:<10} {side['seconds']:>17.2f} {side['peak'] / 1e9:>12.2f} GB"
            f" {side['peak'] / side['bytes']:>8.2f}"
        )
    for name, bar in (("time", TIME_BAR), ("memory", MEMORY_BAR)):
        what = "ldm / diffusers" if name == "time" else "ldm's peak / model"
        print(
            f"{name:<10} {what}: {report['ratios'][name]:.2f} (bar {bar}:"
            f" {'met' if report['met'][name] else 'NOT met'})"
        )


if __name__ == "__main__":
    main()
