"""What does a LoRA cost: loading and merging it, its memory, and a step with it on the fly?

    python benchmarks/adapters.py              # Stable Diffusion 1.5's UNet, rank 32
    python benchmarks/adapters.py --small      # two levels of it, for a small machine

Each program runs in a process of its own; times are CPU time, as other programs may share the cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.cond import Cond
from ldm.models.unet import UNet, UNetConfig
from ldm.pipelines.adapters import Adapters
from ldm.weights.formats.safetensors import write_safetensors
from ldm.weights.parts import build_network, randomise

SMALL = UNetConfig(channels=(320, 640), depth=(1, 1), blocks=2, heads=8, context_dim=768)


def network(small: bool, dtype: torch.dtype) -> UNet:
    net = build_network(SMALL if small else UNetConfig())
    assert isinstance(net, UNet)
    randomise(net, dtype=dtype)
    return net


def lora(net: nn.Module, rank: int) -> dict[str, Tensor]:
    """Return a random LoRA of all linear layers and 1×1 convolutions of the transformers."""
    state: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if ".attentions." in name and isinstance(module, nn.Linear | nn.Conv2d):
            out, inner, *kernel = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = torch.randn(rank, inner, *kernel) * inner**-0.5
            state[f"unet.{name}.lora_B.weight"] = torch.randn(out, rank, *kernel) * 0.02
    return state


def peak() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(run: Any) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(program: str, small: bool, dtype: torch.dtype, path: str, rank: int) -> dict[str, float]:
    """Return the figures of one program."""
    net = network(small, dtype)
    if not Path(path).exists():
        write_safetensors(path, lora(net, rank))
    size = sum(p.numel() * p.element_size() for p in net.parameters()) / 2**20
    if program == "diffusers":
        from diffusers_pipelines import diffusers_network
        from safetensors.torch import load_file

        theirs: Any = diffusers_network(net)
        gc.collect()
        before = peak()

        def apply() -> None:
            theirs.load_lora_adapter(load_file(path), prefix="unet")
            theirs.fuse_lora()
            theirs.unload_lora()

        return {"seconds": timed(apply), "model_mb": size, "added_mb": peak() - before}
    adapters = Adapters(lambda: {"unet": net}, dict, "sd-v1-5")
    if program == "ldm":
        before = peak()
        return {"seconds": timed(lambda: adapters.load(path)), "model_mb": size, "added_mb": peak() - before}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="two levels of the UNet")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--programs", nargs="+", default=["ldm", "diffusers", "step"])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.run:
        print(json.dumps(measure(args.run, args.small, dtype, args.path, args.rank)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/lora.safetensors"
        for program in args.programs:
            command = [sys.executable, __file__, "--run", program, "--path", path, "--dtype", args.dtype]
            command += ["--rank", str(args.rank), *(["--small"] if args.small else [])]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            print(program, ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
