"""What does a LoRA cost: loading and merging it, its memory, and a step with it on the fly?

    python benchmarks/adapters.py                    # Stable Diffusion 1.5's UNet, rank 32
    python benchmarks/adapters.py --file float32     # whose file has the dtype of the model
    python benchmarks/adapters.py --quick            # two levels of it, once

The UNet is loaded from a file, as models are: by default from one in float16. Each program runs in a process
of its own, in turn; the figure is the least of the repeats. Times are CPU time, as other programs may share
the cores. Applying is timed twice in a process; the first time the system provides memory too. The bars:
applying takes at most half of diffusers' time, and its peak memory is at most the model's plus 10 %; a step
on the fly takes at most 1.10 of a plain one.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import add_quick, where, write
from pairs import SMALL, our_unet, peer_unet
from torch import Tensor, nn

from ldm.catalog.shapes import UNETS
from ldm.diffusion.cond import Cond
from ldm.pipelines.adapters import Adapters
from ldm.weights.formats.safetensors import read_safetensors, write_safetensors
from ldm.weights.parts import build_network, fill_network

UNET, LORA = "unet.safetensors", "lora.safetensors"


def lora(net: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return a random LoRA of all linear layers and 1×1 convolutions of the transformers."""
    state: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if ".attentions." in name and isinstance(module, nn.Linear | nn.Conv2d):
            out, inner, *kernel = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = torch.randn(rank, inner, *kernel) * inner**-0.5
            state[f"unet.{name}.lora_B.weight"] = torch.randn(out, rank, *kernel) * 0.02
    return state


def peak(*, reset: bool = False) -> float:
    """Return the largest resident memory of this process in MB, since its start or since the last reset."""
    if reset:  # loading took more
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def timed(run: Any) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def write_files(folder: Path, small: bool, file: torch.dtype, rank: int) -> None:
    """Write the UNet of random weights in ldm's folder layout, and a LoRA for it."""
    net = our_unet("small" if small else "sd1", file)
    write_safetensors(folder / UNET, {k: v.contiguous() for k, v in net.state_dict().items()})
    write_safetensors(folder / LORA, lora(net, rank))


def loaded_unet(folder: Path, small: bool, dtype: torch.dtype) -> Any:
    """Return the UNet of the file, in a dtype."""
    network = build_network(UNETS["sd1"] if not small else SMALL)
    return fill_network(
        network, read_safetensors(folder / UNET), "diffusers", source=folder / UNET, dtype=dtype
    )


def measure(program: str, small: bool, dtype: torch.dtype, folder: Path) -> dict[str, float]:
    """Return the figures of one program."""
    path = str(folder / LORA)
    net = loaded_unet(folder, small, dtype)
    theirs: Any = None  # a model of diffusers
    if program == "diffusers":
        # in memory of its own, as diffusers loads models
        theirs = peer_unet(net)
        theirs.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()}, assign=True)
        net = theirs
    size = sum(p.numel() * p.element_size() for p in net.parameters()) / 2**20
    if program == "diffusers":
        from safetensors.torch import load_file

        before = peak(reset=True)

        def apply() -> None:
            theirs.load_lora_adapter(load_file(path), prefix="unet")
            theirs.fuse_lora()
            theirs.unload_lora()

        first = timed(apply)
        return {
            "seconds": timed(apply),
            "first_seconds": first,
            "model_mb": size,
            "added_mb": peak() - before,
        }
    adapters = Adapters(lambda: {"unet": net}, dict, "sd-v1-5")
    if program == "ldm":
        for p in net.parameters():  # mapped from the file, they are in memory when they were read
            p.detach().view(-1).view(torch.uint8)[::4096].sum()
        before = peak(reset=True)
        first = timed(lambda: adapters.load(path, name="a"))
        adapters.remove("a")
        return {
            "seconds": timed(lambda: adapters.load(path, name="a")),
            "first_seconds": first,
            "model_mb": size,
            "added_mb": peak() - before,
        }
    x, t = torch.randn(2, 4, 64, 64, dtype=dtype), torch.tensor([500.0, 500.0])
    cond = Cond(context=torch.randn(2, 77, 768, dtype=dtype))
    times: dict[str, list[float]] = {"plain": [], "on the fly": []}
    with torch.inference_mode():
        net(x, t, cond)
        for _ in range(3):  # alternately, as the machine may be busy
            times["plain"].append(timed(lambda: net(x, t, cond)))
            adapters.load(path, name="a", merge=False)
            times["on the fly"].append(timed(lambda: net(x, t, cond)))
            adapters.remove("a")
    return {name: min(values) for name, values in times.items()}


def ratios(found: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Return each ratio that the programs give, and its bar.

    Args:
        found: The figures of each program, from `measure`.
    """
    made: dict[str, tuple[float, float]] = {}
    if "ldm" in found:
        own = found["ldm"]
        made["peak memory of applying, of the model"] = 1 + own["added_mb"] / own["model_mb"], 1.10
        if "diffusers" in found:
            for name, field in (("time of applying", "first_seconds"), ("applying again", "seconds")):
                made[f"{name}, of diffusers'"] = own[field] / found["diffusers"][field], 0.5
    if "step" in found:
        made["step on the fly, of a plain one"] = found["step"]["on the fly"] / found["step"]["plain"], 1.10
    return made


def run(program: str, args: argparse.Namespace, path: str) -> dict[str, float]:
    """Return the figures of one program in a process of its own."""
    command = [sys.executable, __file__, "--run", program, "--path", path, "--dtype", args.dtype]
    command += ["--threads", str(args.threads), *(["--small"] * args.small)]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--small", action="store_true", help="two levels of the UNet")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument("--file", default="float16", choices=("float16", "float32"), help="dtype of the file")
    made.add_argument("--rank", type=int, default=32)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--programs", nargs="+", default=["ldm", "diffusers", "step"])
    made.add_argument("--json", type=Path, help="file for the figures")
    made.add_argument("--run", help=argparse.SUPPRESS)
    made.add_argument("--path", help=argparse.SUPPRESS)
    add_quick(made, small=True, repeats=1)
    args = made.parse_args()
    if args.run:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.run, args.small, getattr(torch, args.dtype), Path(args.path))))
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), args.small, getattr(torch, args.file), args.rank)
        for _ in range(args.repeats):
            for program in args.programs:
                figures = run(program, args, folder)
                best = found.setdefault(program, figures)
                found[program] = {name: min(value, best[name]) for name, value in figures.items()}
    for program, figures in found.items():
        print(program, ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    for name, (ratio, bar) in ratios(found).items():
        print(f"{name}: {ratio:.3f}    bar {bar}: {'met' if ratio <= bar else 'NOT met'}")
    if args.json:
        write(args.json, {"where": where(args.threads), "figures": found, "ratios": ratios(found)})


if __name__ == "__main__":
    main()
